"""Pictures in, batches of pixels out: order kept, failures named, decoding ahead of the model."""

from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from perception.errors import ConfigError
from perception.media import describe, iter_images
from perception.pixels import LoadedBatch, check_on_error, load_batch


class Failure(NamedTuple):
    """A picture that was left out.

    position  in its batch
    row       in everything given
    """

    position: int
    row: int
    source: str
    reason: str


def as_list(images: Any) -> Sequence[Any]:
    """One picture or many to a sequence of pictures; a folder stands for the pictures in it."""
    if isinstance(images, str | Path) and Path(images).is_dir():
        return list(iter_images(images))
    if is_one(images):
        return [images]
    return images if isinstance(images, Sequence) else list(images)


def is_one(images: Any) -> bool:
    """Whether this is a picture, rather than several: a path, bytes, an open file, a PIL image, an array.

    Arrays of four axes are several.
    """
    if isinstance(images, str | Path):
        return not Path(images).is_dir()
    if isinstance(images, bytes | bytearray | memoryview) or hasattr(images, "read") or hasattr(images, "convert"):
        return True  # before the shape, which a memoryview has as well
    return 0 < len(getattr(images, "shape", ())) < 4


def pixel_batches(
    images: Any,
    preprocess: Callable[..., Tensor],
    *,
    batch_size: int = 32,
    on_error: str = "raise",
    workers: int | None = None,
    progress: bool = False,
) -> Iterator[tuple[Tensor, list[Failure]]]:
    """Batches of pixels B 3 S S, in order, each with the failures among its pictures.

    images    one or many of whatever `preprocess` reads; a floating tensor B 3 S S is taken as prepared
    on_error  as in `load_batch`
    workers   threads that read and resize; they work on the next batch while the model works on this one

    Raises ConfigError for settings that cannot be, MediaError or LimitError with its row for a bad picture.
    """
    check_on_error(on_error)
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}; give at least 1")
    if isinstance(images, Tensor) and images.is_floating_point():
        pixels = images if images.ndim == 4 else images[None]
        yield from ((chunk, []) for chunk in pixels.split(batch_size))
        return
    items = as_list(images)

    def load(start: int) -> LoadedBatch:
        chunk = items[start : start + batch_size]
        return load_batch(chunk, preprocess, on_error=on_error, workers=workers, first=start)

    with ThreadPoolExecutor(1) as ahead, progress_bar(items, enabled=progress) as bar:
        coming = ahead.submit(load, 0)
        for start in range(0, len(items), batch_size):
            batch = coming.result()
            if start + batch_size < len(items):
                coming = ahead.submit(load, start + batch_size)
            failures = [Failure(at, start + at, describe(items[start + at]), str(why)) for at, why in batch.errors]
            yield batch.pixels, failures
            bar.update(len(batch.indices) + len(failures))


def progress_bar(items: Any, *, enabled: bool) -> Any:
    """A tqdm bar on a terminal; silent elsewhere."""
    from tqdm import tqdm

    total = len(items) if isinstance(items, Sized) else None
    return tqdm(total=total, unit="image", disable=None if enabled else True)
