"""The seam for encoders that are not ours."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor


class Features(NamedTuple):
    """What every vision encoder returns.

    patches   B h w D   one vector a patch, on its grid: nobody downstream has to guess a square root
    prefix    B P D     class token and registers; P may be 0
    """

    patches: Tensor
    prefix: Tensor

    def tokens(self) -> Tensor:
        """B P+h*w D: prefix first, then the grid row by row."""
        return torch.cat([self.prefix, self.patches.flatten(1, 2)], dim=1)


@runtime_checkable
class VisionEncoder(Protocol):
    """Pixels in, features out. A class that fits this shape is an encoder; it inherits nothing from us."""

    width: int  # D of the features
    patch_size: int

    def __call__(self, pixels: Tensor) -> Features: ...  # B 3 H W, normalised -> features
