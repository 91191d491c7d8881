"""The encoders that `perception doctor --speed` measures, and what a forward pass costs in arithmetic."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from perception.optimize import optimize
from perception.speed import Case
from perception_encoder.config import VisionConfig
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import list_models, load_encoder

PACKAGED = "PE-Core-nano"
DEFAULT = (PACKAGED, "PE-Core-B16-224")


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """The image towers named, of those known here; the small one and the smallest large one by default.

    What is not in the package is built with random weights: nothing is downloaded, and speed does not depend on them.
    """
    for name in (name for name in names or DEFAULT if name in list_models()):
        tower = load_encoder(name, pretrained=name == PACKAGED, device="cpu", dtype="float32")
        if not isinstance(tower, VisionTransformer):
            continue  # another distribution's: its arithmetic is not known
        side = tower.config.image_size
        # Eight of the small one, for a single picture would measure the interpreter.
        batch = 8 if flops(tower.config) < 1e9 else 1
        pixels = torch.randn(batch, 3, side, side)
        name = f"{name}, {batch} picture{'s' * (batch > 1)} of {side}"
        yield Case(name, batch * flops(tower.config), partial(_call(tower), pixels), partial(_fast, tower, pixels))


def flops(config: VisionConfig) -> float:
    """Of one picture of native size: every matrix product, those of attention and of the pool among them."""
    n, D = config.grid**2 + config.class_token, config.width
    block = 2 * n * D * (4 * D + 2 * config.mlp_width) + 4 * n * n * D
    # Keys and values of all tokens; query, output and a fourfold MLP of the one that asks; the projection.
    pool = 4 * n * D * D + 4 * n * D + 4 * D * D + 16 * D * D + 2 * D * (config.output_width or 0) if config.pool else 0
    return float(config.depth * block + 2 * config.grid**2 * D * 3 * config.patch_size**2 + pool)


def _fast(tower: VisionTransformer, pixels: Tensor) -> Callable[[], object]:
    return partial(_call(optimize(tower, build=False)), pixels)


def _call(tower: VisionTransformer) -> Callable[[Tensor], object]:
    return tower.pooled if tower.config.pool else tower
