"""Pictures in, batches of pixels out: order kept, failures named, decoding ahead of the model."""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perception.errors import MediaError, PerceptionError

log = logging.getLogger(__name__)
ON_ERROR = ("raise", "skip", "log")


class Failure(NamedTuple):
    position: int  # in the batch it was part of
    row: int  # in everything given
    source: str
    reason: str


def as_list(images: Any) -> Sequence[Any]:
    """One picture or many to a sequence of pictures; a folder stands for the pictures in it."""
    from perception.media import iter_images

    if isinstance(images, str | Path) and Path(images).is_dir():
        return list(iter_images(images))
    if isinstance(images, str | Path | bytes) or hasattr(images, "convert"):  # a path, bytes, a PIL image
        return [images]
    shape = getattr(images, "shape", None)
    if shape is not None:
        return [images] if len(shape) in (2, 3) else list(images)
    return images if isinstance(images, Sequence) else list(images)


def pixel_batches(
    images: Any,
    preprocess: Callable[[Any], Tensor],
    *,
    batch_size: int = 32,
    on_error: str = "raise",
    workers: int = 2,
    progress: bool = False,
) -> Iterator[tuple[Tensor, list[Failure]]]:
    """Batches of pixels B 3 S S, in order, each with the failures among its pictures.

    images    one or many of whatever `preprocess` reads; a floating tensor B 3 S S is taken as prepared
    on_error  "raise": the first picture that cannot be read stops everything, its index named; "skip" and "log" leave
              it out, "log" says so
    workers   threads that read and resize while the model works; at most two batches wait in memory

    Raises ValueError for settings that cannot be, MediaError with the index for a bad picture.
    """
    if on_error not in ON_ERROR:
        raise ValueError(f"on_error={on_error!r}; choose from {', '.join(ON_ERROR)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}; give at least 1")
    if isinstance(images, Tensor) and images.is_floating_point():
        pixels = images if images.ndim == 4 else images[None]
        yield from ((chunk, []) for chunk in pixels.split(batch_size))
        return
    items = as_list(images)
    with ThreadPoolExecutor(max(1, workers)) as pool, progress_bar(items, enabled=progress) as bar:
        waiting: deque[tuple[int, Any, Future[Tensor]]] = deque()
        source, done = iter(enumerate(items)), False
        try:
            while True:
                while not done and len(waiting) < 2 * batch_size:
                    try:
                        index, item = next(source)
                    except StopIteration:
                        done = True
                    else:
                        waiting.append((index, item, pool.submit(preprocess, item)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
                yield _collect(batch, on_error)
                bar.update(len(batch))
        finally:
            for _, _, future in waiting:
                future.cancel()


def _collect(batch: list[tuple[int, Any, "Future[Tensor]"]], on_error: str) -> tuple[Tensor, list[Failure]]:
    pixels, failures = [], []
    for position, (index, item, future) in enumerate(batch):
        try:
            pixels.append(future.result())
        except (PerceptionError, OSError) as error:
            name = describe(item)
            if on_error == "raise":
                raise MediaError(f"picture {index} ({name}): {error}") from error
            if on_error == "log":
                log.warning("picture %d (%s) left out: %s", index, name, error)
            failures.append(Failure(position, index, name, str(error)))
    return torch.stack(pixels) if pixels else torch.empty(0, 3, 0, 0), failures


def describe(item: Any) -> str:
    """A picture's name for a message, with nothing in it that could disturb a terminal."""
    text = str(item) if isinstance(item, str | Path) else type(item).__name__
    return text.encode("unicode_escape", errors="backslashreplace").decode("ascii") if not text.isprintable() else text


def progress_bar(items: Iterable[Any], *, enabled: bool, unit: str = "image", total: int | None = None) -> Any:
    """A tqdm bar on a terminal; silent elsewhere."""
    from tqdm import tqdm

    total = len(items) if total is None and isinstance(items, Sized) else total
    return tqdm(total=total, unit=unit, disable=None if enabled else True)
