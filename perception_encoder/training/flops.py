"""How many operations a batch takes: what speed is measured against.

N tokens of an item  P numbers in the matrices of a tower  D width
"""

from typing import Any

from torch import nn

from perception_encoder.vision import VisionTransformer


def vision_flops(tower: VisionTransformer, side: int, *, blocks: int | None = None) -> float:
    """Multiplications and additions for a picture of so many pixels a side; `blocks` when not all of them run."""
    tokens = (side // tower.patch_size) ** 2 + int(tower.config.class_token)
    return tower_flops(tower, tokens, blocks=blocks)


def tower_flops(tower: Any, tokens: int, *, causal: bool = False, blocks: int | None = None) -> float:
    """Multiplications and additions for one item, forward and, where the tower learns, backward.

    2 N P forward, and twice that backward; attention 4 N^2 D a block, half of it where it is causal. What only a single
    token goes through, the pool and the last projection, is left out.
    """
    run = tower.blocks if blocks is None else tower.blocks[:blocks]
    matrices = [*run, *([tower.patch_embed] if hasattr(tower, "patch_embed") else [])]
    numbers = sum(p.numel() for module in matrices for p in module.parameters() if p.ndim >= 2)
    attention = 4 * tokens**2 * tower.width * len(run) / (2 if causal else 1)
    return (3 if _learns(tower) else 1) * (2 * tokens * numbers + attention)


def _learns(tower: nn.Module) -> bool:
    return any(p.requires_grad for p in tower.parameters())
