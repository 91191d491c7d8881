"""From host memory to a device, the next part on its way while this one is worked on."""

from collections.abc import Iterator

import torch
from torch import Tensor


def parts_on(x: Tensor, size: int | None, like: Tensor) -> Iterator[Tensor]:
    """`size` rows of x at a time (all at once for None), on the device and in the dtype of `like`.

    To a GPU each part goes through page-locked memory on a stream of its own, one part ahead of the work.
    """
    parts = x.split(size or max(len(x), 1))
    if like.device.type != "cuda" or x.device.type != "cpu":
        for part in parts:
            yield part.to(like)
        return
    side = torch.cuda.Stream(like.device)
    coming = _send(parts[0], like, side)
    for after in (*parts[1:], None):
        moved, done = coming
        if after is not None:
            coming = _send(after, like, side)
        stream = torch.cuda.current_stream(like.device)
        stream.wait_event(done)
        moved.record_stream(stream)
        yield moved.to(like.dtype)


def _send(part: Tensor, like: Tensor, side: torch.cuda.Stream) -> tuple[Tensor, torch.cuda.Event]:
    with torch.cuda.stream(side):
        moved = part.pin_memory().to(like.device, non_blocking=True)  # the pinned copy is freed after the transfer
        done = torch.cuda.Event()
        done.record(side)
    return moved, done
