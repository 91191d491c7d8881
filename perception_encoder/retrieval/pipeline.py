"""Inputs to parts: reading, preprocessing and the model at work at the same time, nothing done twice.

One thread walks the source, a few more decode and resize, and hand finished batches over a short queue; the calling
thread runs the model and writes parts. A batch never reaches across a part, so a part's bytes do not depend on which
parts are made before it.

B batch  N rows  S image side  C embedding width
"""

import contextlib
import logging
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from perception.errors import ConfigError, LimitError, MediaError
from perception.files import sweep_temporaries
from perception.media import PICTURE_FORMATS, open_media
from perception.pixels import check_on_error
from perception_encoder.retrieval.columns import Column, column, id_hashes
from perception_encoder.retrieval.embed import embed_pixels, embed_texts, fingerprint
from perception_encoder.retrieval.parts import (
    PLAN_FORMAT,
    PartFailure,
    Parts,
    Plan,
    is_finished,
    read_chunks,
    write_part,
    write_plan,
)
from perception_encoder.retrieval.sources import Item, Source, as_source, open_source

log = logging.getLogger(__name__)
QUEUE = 2  # batches that may wait for the model


def embed_parts(
    model: Any,
    source: Any,
    out: str | Path,
    *,
    batch_size: int = 64,
    part_rows: int = 8192,
    normalize: bool = True,
    dtype: str = "float32",
    file_format: str = "safetensors",
    on_error: str = "log",
    progress: bool = False,
    workers: int | None = None,
    rank: int | None = None,
    world: int | None = None,
    verify: bool = True,
) -> Parts:
    """Embed a source into parts in the folder `out`; what is finished there already is not made again.

    source      whatever `as_source` takes: a folder, tars, Parquet, text, videos, or a Source
    part_rows   rows of a part, and what a kill can cost
    dtype       of the vectors on disk: "float32" or "float16"; `file_format`: "safetensors" or "parquet"
    on_error    "raise" stops at an input that cannot be read; "log" and "skip" leave it out and name it in the sidecar
    workers     threads that read and resize
    rank, world  this process makes parts rank, rank + world, ...; RANK and WORLD_SIZE of `torchrun` by default
    verify      finished parts are hashed before they are believed; False compares their sizes alone

    Raises ConfigError when `out` holds parts of another model, preprocessing or source.
    """
    check_on_error(on_error)
    rank, world = share(rank, world)
    folder = Path(out)
    plan = make_plan(
        model,
        source,
        folder,
        batch_size=batch_size,
        part_rows=part_rows,
        normalize=normalize,
        dtype=dtype,
        file_format=file_format,
    )
    if world == 1:
        sweep_temporaries(folder)
    run_parts(
        model,
        folder,
        range(rank, plan.parts, world),
        on_error=on_error,
        progress=progress,
        workers=workers,
        verify=verify,
    )
    return Parts(folder)


def share(rank: int | None, world: int | None) -> tuple[int, int]:
    """Which process this is and of how many: as given, as `torchrun` says, or the only one."""
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    world = int(os.environ.get("WORLD_SIZE", "1")) if world is None else world
    if not 0 <= rank < world:
        raise ConfigError(f"rank={rank} of world={world}; expected 0 to world - 1")
    return rank, world


def make_plan(
    model: Any,
    source: Any,
    folder: Path,
    *,
    batch_size: int = 64,
    part_rows: int = 8192,
    normalize: bool = True,
    dtype: str = "float32",
    file_format: str = "safetensors",
) -> Plan:
    """The plan in `folder`, written if there is none. Of a source that grew since, the plan keeps the first listing."""
    found = as_source(source)
    plan = plan_of(
        model,
        found,
        batch_size=batch_size,
        part_rows=part_rows,
        normalize=normalize,
        dtype=dtype,
        file_format=file_format,
    )
    return write_plan(folder, plan, lambda: found.chunks(part_rows))


def plan_of(
    model: Any,
    found: Source,
    *,
    batch_size: int = 64,
    part_rows: int = 8192,
    normalize: bool = True,
    dtype: str = "float32",
    file_format: str = "safetensors",
) -> Plan:
    """The settings as a plan, before its inputs are listed."""
    return Plan(
        format=PLAN_FORMAT,
        kind=found.kind,
        source=found.settings(),
        parts=0,
        rows=None,
        part_rows=part_rows,
        batch_size=batch_size,
        normalize=normalize,
        dtype=dtype,
        file_format=file_format,
        model=getattr(model, "source", None),
        fingerprint=fingerprint(model),
        preprocess=str(model.preprocess.fingerprint()),
        chunks="chunks-.jsonl",
    )


def run_parts(
    model: Any,
    folder: Path,
    numbers: Iterable[int],
    *,
    on_error: str = "log",
    progress: bool = False,
    workers: int | None = None,
    verify: bool = True,
    echo: Callable[[int], None] | None = None,
) -> None:
    """Make those of the parts that are not finished: all an engine has to call, in any process, in any order."""
    plan = Parts(folder).plan
    numbers = list(numbers)
    todo = [number for number in numbers if not is_finished(folder, number, verify=verify)]
    source, done = open_source(plan.source), len(numbers) - len(todo)
    if done:
        log.info("%d of %d parts in %s are finished", done, len(numbers), folder)
    job = _Job(model, plan, source, on_error, workers)
    with _bar(folder, plan, numbers, todo, progress) as bar, _above(bar), torch.inference_mode():
        making: _Making | None = None
        for batch in batches_ahead(job.batches(read_chunks(folder, plan, todo))):
            if making is None or making.number != batch.number:
                making = _Making(batch.number)
            making.add(batch, job)
            bar.update(len(batch.items))
            if batch.last:
                making.write(folder, plan)
                if echo is not None:
                    echo(batch.number)


class _Batch(NamedTuple):
    """What the model is shown at once.

    inputs  B 3 S S pixels, or texts
    counts  of frames that make one row; None when each makes its own
    items   all B inputs and those that failed, in order
    failed  position in the part -> why
    last    of its part
    """

    number: int
    inputs: Any
    counts: list[int] | None
    items: list[tuple[int, Item, tuple[int, int]]]
    failed: dict[int, MediaError | LimitError]
    last: bool


@dataclass
class _Job:
    """Everything the reading threads need."""

    model: Any
    plan: Plan
    source: Source
    on_error: str
    workers: int | None

    def batches(self, chunks: Iterator[tuple[int, Any]]) -> Iterator[_Batch]:
        """Batches of all chunks in order, while the items of the next ones are being read."""
        threads = min(8, os.cpu_count() or 1) if self.workers is None else max(1, self.workers)
        with ThreadPoolExecutor(threads, thread_name_prefix="perception-read") as pool:
            waiting: list[tuple[int, Item, Any]] = []
            number, position = -1, 0
            for number, position, item, result in in_order(
                pool, self.prepare, self._walk(chunks), 2 * self.plan.batch_size
            ):
                if item is None:  # the chunk ends here
                    yield self._batch(number, waiting, last=True)
                    waiting = []
                    continue
                waiting.append((position, item, result))
                if len(waiting) == self.plan.batch_size:
                    yield self._batch(number, waiting, last=False)
                    waiting = []

    def _walk(self, chunks: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, int, Item | None]]:
        for number, chunk in chunks:
            position = 0
            for position, item in enumerate(self.source.items(chunk)):
                yield number, position, item
            yield number, position, None

    def prepare(self, item: Item) -> Any:
        """Pixels and size of a picture or a clip, a text as it is, or the error."""
        data = item.data
        if isinstance(data, MediaError | LimitError):
            return data
        if self.plan.kind == "text":
            return data, (0, 0)
        try:
            if self.plan.kind == "clip":
                return torch.stack([self.model.preprocess(frame) for frame in data]), (data.shape[3], data.shape[2])
            return self.model.preprocess(data), picture_size(data)
        except (MediaError, LimitError) as error:
            return error

    def _batch(self, number: int, waiting: list[tuple[int, Item, Any]], *, last: bool) -> _Batch:
        failed = {position: result for position, _, result in waiting if isinstance(result, MediaError | LimitError)}
        for position, item, _ in waiting:
            if position in failed:
                self._report(number, item, failed[position])
        good = [result for position, _, result in waiting if position not in failed]
        items = [(p, item, (0, 0) if p in failed else result[1]) for p, item, result in waiting]
        counts = [len(pixels) for pixels, _ in good] if self.plan.kind == "clip" else None
        inputs: Any = [one for one, _ in good]
        if self.plan.kind != "text" and good:
            inputs = torch.cat(inputs) if counts else torch.stack(inputs)
        return _Batch(number, inputs, counts, items, failed, last)

    def _report(self, number: int, item: Item, error: Exception) -> None:
        if self.on_error == "raise":
            raise type(error)(f"{item.id}: {error}") from error
        if self.on_error == "log":
            log.warning("left out %s: %s", item.id, error)

    def vectors(self, batch: _Batch) -> Tensor:
        """N C float32 of the inputs that could be read."""
        if self.plan.kind == "text":
            x = embed_texts(self.model, batch.inputs)
        elif batch.counts is None:
            x = embed_pixels(self.model, batch.inputs)
        else:
            frames = [embed_pixels(self.model, some) for some in batch.inputs.split(self.plan.batch_size)]
            unit = F.normalize(torch.cat(frames).float(), dim=-1)
            x = torch.stack([clip.mean(dim=0) for clip in unit.split(batch.counts)])
        x = x.float()
        return (F.normalize(x, dim=-1) if self.plan.normalize else x).cpu()


@dataclass
class _Making:
    """A part while it is made."""

    number: int
    vectors: list[Tensor] = field(default_factory=list)
    rows: list[tuple[Item, tuple[int, int]]] = field(default_factory=list)
    failures: list[PartFailure] = field(default_factory=list)

    def add(self, batch: _Batch, job: _Job) -> None:
        kept = [(position, item, size) for position, item, size in batch.items if position not in batch.failed]
        failures = [(p, item, str(batch.failed[p])) for p, item, _ in batch.items if p in batch.failed]
        if kept:
            x = job.vectors(batch)
            good = (x.isfinite().all(dim=1) & (x != 0).any(dim=1)).tolist()
            failures += [(p, item, BAD_VECTOR) for ok, (p, item, _) in zip(good, kept, strict=True) if not ok]
            self.vectors.append(x if all(good) else x[torch.tensor(good)])
            self.rows += [(item, size) for ok, (_, item, size) in zip(good, kept, strict=True) if ok]
        self.failures += [PartFailure(p, item.id, why) for p, item, why in sorted(failures, key=lambda one: one[0])]

    def write(self, folder: Path, plan: Plan) -> None:
        vectors = torch.cat(self.vectors) if self.vectors else torch.empty(0, 0)
        write_part(folder, self.number, vectors, item_columns(self.rows), plan, self.failures)


BAD_VECTOR = "the model's vector for it is zero, infinite or not a number"


def item_columns(rows: list[tuple[Item, tuple[int, int]]]) -> dict[str, Column]:
    """The columns of a part: what each item says of itself, and `meta.NAME` for what came with it."""
    columns = {
        "id": column(item.id for item, _ in rows),
        "source": column(item.source for item, _ in rows),
        "inside": column(item.inside for item, _ in rows),
        "width": column(size[0] for _, size in rows),
        "height": column(size[1] for _, size in rows),
    }
    for name in ("text", "start", "end"):
        values = [getattr(item, name) for item, _ in rows]
        if any(value is not None for value in values):
            columns[name] = column(values)
    columns["hash"] = Column(id_hashes([item.id for item, _ in rows]))
    names = sorted({str(key) for item, _ in rows for key in item.metadata})
    return columns | {f"meta.{name}": column(item.metadata.get(name) for item, _ in rows) for name in names}


def picture_size(data: Any) -> tuple[int, int]:
    """Width and height as a person sees it, from the header alone; (0, 0) when Pillow cannot tell."""
    if isinstance(data, Tensor):
        return int(data.shape[-1]), int(data.shape[-2])
    try:
        with open_media(data) as file, Image.open(file, formats=_formats()) as image:
            turned = image.getexif().get(0x0112, 1) >= 5
            return (image.height, image.width) if turned else (image.width, image.height)
    except Exception:  # it was decoded a moment ago; its size is a remark, not worth losing it for
        return 0, 0


def _formats() -> list[str]:
    Image.init()
    return [known for known in PICTURE_FORMATS if known in Image.OPEN]


def in_order(
    pool: ThreadPoolExecutor, work: Callable[[Item], Any], items: Iterable[tuple[int, int, Item | None]], ahead: int
) -> Iterator[tuple[int, int, Item | None, Any]]:
    """The items with `work` done on them, in their order, at most `ahead` of them under way."""
    waiting: deque[tuple[int, int, Item | None, Future[Any] | None]] = deque()
    try:
        for number, position, item in items:
            waiting.append((number, position, item, None if item is None else pool.submit(work, item)))
            if len(waiting) > ahead:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    finally:
        for *_, future in waiting:
            if future is not None:
                future.cancel()


def _finished(number: int, position: int, item: Item | None, future: Future[Any] | None) -> Any:
    return number, position, item, None if future is None else future.result()


def batches_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches, made in a thread of their own while the caller works on the one before."""
    ready: queue.Queue[Any] = queue.Queue(maxsize=QUEUE)
    stop = threading.Event()

    def make() -> None:
        end: Any = None
        try:
            for batch in batches:
                if not _put(ready, batch, stop):
                    return
        except BaseException as error:  # raised where the batches are used
            end = error
        finally:
            batches.close()  # type: ignore[attr-defined]
        _put(ready, end, stop)

    thread = threading.Thread(target=make, name="perception-batches", daemon=True)
    thread.start()
    try:
        while (batch := ready.get()) is not None:
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        stop.set()
        thread.join()


def _put(ready: "queue.Queue[Any]", what: Any, stop: threading.Event) -> bool:
    while not stop.is_set():
        try:
            ready.put(what, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _bar(folder: Path, plan: Plan, numbers: list[int], todo: list[int], progress: bool) -> Any:
    """Rate and time left, on a terminal. Rows are counted where the plan knows them."""
    from tqdm import tqdm

    waiting = set(todo)
    rows = {number: chunk["rows"] for number, chunk in read_chunks(folder, plan, numbers)} if plan.rows else {}
    total = sum(rows.values()) if rows else None
    done = sum(count for number, count in rows.items() if number not in waiting)
    return tqdm(total=total, initial=done, unit=plan.kind, desc="embedding", disable=None if progress else True)


def _above(bar: Any) -> Any:
    """Messages above the bar rather than in it."""
    from tqdm.contrib.logging import logging_redirect_tqdm

    return contextlib.nullcontext() if bar.disable else logging_redirect_tqdm()
