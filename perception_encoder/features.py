"""Dense features of pictures: which layer, on which grid.

B pictures  h w patch grid  D width
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perception_encoder.images import as_list
from perception_encoder.protocol import Features


@torch.inference_mode()
def features(
    tower: Any, images: Any, layers: Sequence[int] = (-1,), *, norm: bool = False, size: int | None = None
) -> list[Features]:
    """Features of one picture or several at the layers asked for, in one pass.

    tower   an encoder with `preprocess` and `intermediates`: ours, or one loaded as "timm/..." or "open_clip/..."
    images  whatever `tower.preprocess` reads, or B 3 H W prepared pixels
    size    another side in pixels, a multiple of the patch; more pixels give a finer grid
    return  one Features a layer: patches B h w D, prefix B P D, on the tower's device
    """
    pixels = prepare(tower, images, size)
    return tower.intermediates(pixels, list(layers), norm=norm)


def prepare(tower: Any, images: Any, size: int | None = None) -> Tensor:
    """B 3 S S on the tower's device and in its dtype."""
    if not (isinstance(images, Tensor) and images.is_floating_point()):
        preprocess = resized(tower.preprocess, size)
        images = torch.stack([preprocess(image) for image in as_list(images)])
    first = next(tower.parameters(), None) if hasattr(tower, "parameters") else None
    pixels = images if images.ndim == 4 else images[None]
    return pixels if first is None else pixels.to(first.device, first.dtype)


def resized(preprocess: Any, size: int | None) -> Any:
    """The same preprocessing at another size."""
    if size is None:
        return preprocess
    from dataclasses import is_dataclass, replace

    from perception.errors import ConfigError

    if not is_dataclass(preprocess):
        raise ConfigError("this encoder brings a preprocessing of its own at a fixed size; leave `size` out")
    return replace(preprocess, size=size)  # type: ignore[type-var]
