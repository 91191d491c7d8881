"""What an assistant keeps of the last conversations, so that a second question about a picture starts behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

from perception.errors import ConfigError
from perception_lm.generation import Session, name_of, prompts_of
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch
from perception_lm.sampling import GenerationConfig


class Memory:
    """The sessions of the last `size` conversations; the one unused for longest goes first.

    A session is lent to one caller at a time, so threads may share a memory. Raises ConfigError for a size below 0.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ConfigError(f"{size!r} conversations cannot be remembered; give a whole number, 0 for none")
        self.size, self.sessions = size, list[Session]()  # the latest used last
        # One that its own thread may take again: a reader's stream that is dropped ends whenever garbage is collected.
        self._lock = RLock()

    @contextmanager
    def lent(
        self, model: PerceptionLM, batch: Batch, config: GenerationConfig, reuse: Session | None = None
    ) -> Iterator[Session | None]:
        """A session for one prompt: the one it shares most with, or a new one; `reuse` itself when it is given.

        None for batches, for several samples, and without a cache. What fails in between is not kept.
        """
        if reuse is not None or not self.size or len(batch) != 1 or config.samples != 1 or not config.cache:
            yield reuse
            return
        session = self._take(model, batch)
        yield session
        with self._lock:
            self.sessions = [*self.sessions, session][-self.size :]

    @property
    def nbytes(self) -> int:
        """What the kept keys and values take."""
        return sum(getattr(session.cache, "nbytes", 0) for session in self.sessions)

    def _take(self, model: PerceptionLM, batch: Batch) -> Session:
        (ids,) = prompts_of(batch)
        coming = [] if batch.pixels is None else [name_of(item) for item in batch.pixels]
        with self._lock:
            alike = [session for session in self.sessions if session.model is model]
            best = max(alike, key=lambda session: session.shared(ids, coming), default=None)
            # a few words of template in common are no reason to give up what another conversation has
            if best is None or (best.items and best.items[:1] != coming[:1]):
                return Session()
            self.sessions = [session for session in self.sessions if session is not best]
            return best
