"""Chance in the training of a vision tower: stochastic depth."""

import torch
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.layers import LayerScale
from perception_encoder.vision import VisionTransformer


class DropPath(nn.Module):
    """Leave out a branch of some rows, and make up for it in the others (Huang et al. 2016). Only in training.

    B ... -> B ...
    """

    def __init__(self, rate: float, scale: nn.Module):
        super().__init__()
        self.rate = rate
        if isinstance(scale, LayerScale):  # its gain keeps its name: this stands in its place
            self.gamma = scale.gamma

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gamma if hasattr(self, "gamma") else x
        if not self.training or not self.rate:
            return x
        kept = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept.to(x.dtype) / (1 - self.rate)


def add_drop_path(tower: nn.Module, rate: float) -> None:
    """Stochastic depth for the blocks of a tower of ours, the same for each, as published.

    Names in its state dict stay as they are, so it saves and loads as before. Raises ConfigError for other towers.
    """
    if not 0 <= rate < 1:
        raise ConfigError(f"drop_path={rate}; expected 0 to 1")
    if not isinstance(tower, VisionTransformer):
        raise ConfigError(f"drop_path is for towers of ours; given {type(tower).__name__}")
    for block in tower.blocks:
        block.ls1, block.ls2 = DropPath(rate, block.ls1), DropPath(rate, block.ls2)
