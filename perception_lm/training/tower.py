"""What the stages change about a vision tower: its size, its depth, its gains, and chance in training."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.layers import LayerScale
from perception.pixels import PixelSpec
from perception_encoder.vision import VisionTransformer


def adapt_tower(
    tower: VisionTransformer,
    *,
    image_size: int | None = None,
    depth: int | None = None,
    layer_scale: float | None = None,
) -> VisionTransformer:
    """A tower for a language model from one that was trained alone: no final norm, no pooling head, same weights.

    image_size   positions are stretched bilinearly to its grid, once, and learn from there
    depth        the first blocks that stay (23 of PE-Core-L's 24, 47 of PE-Core-G's 50)
    layer_scale  gains of the blocks' branches begin at this; those that are there stay

    Raises ConfigError for a depth it does not have.
    """
    old = tower.config
    depth = old.depth if depth is None else depth
    if not 1 <= depth <= old.depth:
        raise ConfigError(f"depth={depth} of a tower of {old.depth} blocks")
    size = old.image_size if image_size is None else image_size
    config = replace(
        old,
        image_size=size,
        depth=depth,
        layer_scale=old.layer_scale if layer_scale is None or old.layer_scale is not None else layer_scale,
        norm_post=False,
        pool=None,
        output_width=None,
    )
    like = tower.pos_embed
    # Weights that are not carried over are few, and have fixed values: the global generator is left alone.
    with torch.random.fork_rng(devices=[]), torch.device(like.device):
        new = VisionTransformer(config, replace(tower.preprocess, size=size)).to(like.dtype)
    state = {name: tensor for name, tensor in tower.state_dict().items() if name in new.state_dict()}
    with torch.no_grad():
        state["pos_embed"] = tower.positions(config.grid, config.grid).detach().clone()
    missing = [name for name in new.load_state_dict(state, strict=False).missing_keys if "gamma" not in name]
    if missing:
        raise ConfigError(f"the tower lacks {missing[:3]}")
    return new


def as_tile(spec: PixelSpec, size: int) -> PixelSpec:
    """Pixels of a language model's tile: bicubic, with the tower's own mean and deviation."""
    return replace(spec, size=size, interpolation="bicubic")


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
