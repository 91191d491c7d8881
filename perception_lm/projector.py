"""The encoder's patch grid to the decoder's tokens.

M media items (images, tiles, frames)  h w patch grid  n tokens an item  D encoder  E decoder
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from perception.errors import ConfigError
from perception_lm.config import ProjectorConfig


class PoolingProjector(nn.Module):
    """A two-layer MLP with the exact GELU, then the mean of pool x pool patches (Cho et al. 2025, arXiv:2504.13180).

    patches  M h w D
    return   M n E    n = tokens(h, w), row by row

    The mean comes after the MLP: what is not linear does not commute with it. Raises ConfigError for grids that do
    not pool.
    """

    def __init__(self, in_width: int, width: int, pool: int = 2):
        super().__init__()
        self.in_width, self.width, self.pool = in_width, width, pool
        self.fc1, self.fc2 = nn.Linear(in_width, width), nn.Linear(width, width)

    def forward(self, patches: Tensor) -> Tensor:
        self.tokens(*patches.shape[1:3])
        x = self.fc2(F.gelu(self.fc1(patches)))  # M h w E
        x = F.avg_pool2d(x.permute(0, 3, 1, 2), self.pool)  # M E h/pool w/pool
        return x.flatten(2).transpose(1, 2)

    def tokens(self, h: int, w: int) -> int:
        """How many decoder tokens an h x w grid becomes; the processor keeps this many slots in the prompt."""
        return pooled_tokens(h, w, self.pool)


class PixelShuffleProjector(nn.Module):
    """pool x pool patches side by side as one vector, then one linear map: nothing is averaged away.

    patches  M h w D
    return   M n E    n = tokens(h, w), row by row

    Space to depth, as in Shi et al. 2016 the other way round. Raises ConfigError for grids that do not divide.
    """

    def __init__(self, in_width: int, width: int, pool: int = 2):
        super().__init__()
        self.in_width, self.width, self.pool = in_width, width, pool
        self.fc = nn.Linear(in_width * pool**2, width)

    def forward(self, patches: Tensor) -> Tensor:
        self.tokens(*patches.shape[1:3])
        p = self.pool
        return self.fc(rearrange(patches, "m (h i) (w j) d -> m (h w) (i j d)", i=p, j=p))

    def tokens(self, h: int, w: int) -> int:
        """How many decoder tokens an h x w grid becomes; the processor keeps this many slots in the prompt."""
        return pooled_tokens(h, w, self.pool)


def pooled_tokens(h: int, w: int, pool: int) -> int:
    """Squares of pool x pool patches on an h x w grid; ConfigError when some patches would be left over."""
    if h % pool or w % pool or not h or not w:
        raise ConfigError(f"a {h} x {w} patch grid does not pool by {pool}; choose an image size that does")
    return (h // pool) * (w // pool)


PROJECTORS: dict[str, type[PoolingProjector] | type[PixelShuffleProjector]] = {
    "pooling": PoolingProjector,
    "pixel_shuffle": PixelShuffleProjector,
}


def build_projector(config: ProjectorConfig) -> PoolingProjector | PixelShuffleProjector:
    """A fresh projector of the kind asked for."""
    return PROJECTORS[config.kind](config.in_width, config.width, config.pool)
