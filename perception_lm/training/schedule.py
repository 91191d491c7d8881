"""The optimiser and the learning-rate schedule of the published models."""

import math

import torch
from torch import nn

from perception.errors import ConfigError


def cosine_factor(step: int, *, warmup: int, steps: int, floor: float = 0.01) -> float:
    """What the learning rate is multiplied by at a step: a linear warm-up, then half a cosine down to `floor`.

    step  0 is the first update, whose factor is 0

    Raises ConfigError for a warm-up that does not end before `steps`.
    """
    if not 0 <= warmup < steps or not 0 <= floor <= 1:
        raise ConfigError(f"warmup={warmup}, steps={steps}, floor={floor}: expected 0 <= warmup < steps, floor in 0..1")
    if step < warmup:
        return step / warmup
    done = min(1.0, (step - warmup) / (steps - warmup))
    return floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2


def adamw(model: nn.Module, lr: float, weight_decay: float = 0.1) -> torch.optim.AdamW:
    """AdamW as published: betas 0.9 and 0.95, and the decay on every parameter that learns, norms and biases too."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
