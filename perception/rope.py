"""Rotary position embedding (Su et al. 2021). Two neighbouring channels are one rotating plane.

N tokens  h w patch grid  P prefix tokens  heads  head_dim
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from perception.errors import ConfigError

Rope = tuple[Tensor, Tensor]  # cos, sin; each N head_dim/2, float32


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3.1's stretch of the slow planes to a longer context (Meta 2024, `rope_scaling` type "llama3")."""

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_context < 1 or not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ConfigError(f"{self} cannot be: factor >= 1, context >= 1 and 0 < low_freq_factor < high_freq_factor")


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turn each plane by its position's angle, in float32 whatever the dtype of x.

    x       B N heads head_dim
    rope    cos, sin, each N head_dim/2
    return  B N heads head_dim, dtype of x
    """
    cos, sin = (t[:, None] for t in rope)  # N 1 head_dim/2
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2).to(x.dtype)


def rope_2d(
    h: int, w: int, head_dim: int, *, prefix: int = 0, device: torch.device | None = None, theta: float = 10_000.0
) -> Rope:
    """The table of a patch grid: the first half of the planes turns with the column, the second with the row.

    return  cos, sin, each P+h*w head_dim/2, float32

    Positions are whole patches and are never scaled with the resolution. Prefix tokens come first and do not turn;
    the grid then counts from 1. Raises ConfigError when head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise ConfigError(f"2-D rotary embedding needs a head_dim that is a multiple of 4; given {head_dim}")
    start = 1 if prefix else 0
    y = angles(torch.arange(h, device=device) + start, head_dim // 2, theta)  # h head_dim/4
    x = angles(torch.arange(w, device=device) + start, head_dim // 2, theta)  # w head_dim/4
    grid = torch.cat([x.expand(h, w, -1), y[:, None].expand(h, w, -1)], dim=-1).flatten(0, 1)
    table = torch.cat([grid.new_zeros(prefix, grid.shape[-1]), grid])  # P+h*w head_dim/2
    return table.cos(), table.sin()


def rope_1d(positions: Tensor, head_dim: int, *, theta: float = 500_000.0, scaling: RopeScaling | None = None) -> Rope:
    """The table of a token sequence.

    positions  N
    return     cos, sin, each N head_dim/2, float32
    """
    if head_dim % 2:
        raise ConfigError(f"rotary embedding needs an even head_dim; given {head_dim}")
    table = positions.float()[:, None] * frequencies(head_dim, theta, scaling, positions.device)
    return table.cos(), table.sin()


def frequencies(
    dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians a position of each plane: theta ** (-2j / dim), j < dim/2, float32.

    With `scaling`, planes slower than `original_context / low_freq_factor` a turn are slowed by `factor`, those faster
    than `original_context / high_freq_factor` are left alone, and the ones between blend from one to the other.
    """
    freqs = theta ** -(torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    if scaling is None:
        return freqs
    turns = scaling.original_context * freqs / (2 * math.pi)  # of each plane over the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * freqs / scaling.factor + blend * freqs


def angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """N -> N dim/2"""
    return positions.float()[:, None] * frequencies(dim, theta, device=positions.device)
