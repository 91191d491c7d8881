"""Training of two towers: losses, augmentation, optimizers, a loop that can be stopped; `nano` is the recipe in use."""

from perception_encoder.training.augment import Augment, plain
from perception_encoder.training.loop import Loop, LoopConfig
from perception_encoder.training.losses import (
    clip_loss,
    concept_loss,
    cosine_distillation,
    similarity_distillation,
)
from perception_encoder.training.optim import Muon, make_optimizers, warmup_stable_decay

__all__ = [
    "Augment",
    "Loop",
    "LoopConfig",
    "Muon",
    "clip_loss",
    "concept_loss",
    "cosine_distillation",
    "make_optimizers",
    "plain",
    "similarity_distillation",
    "warmup_stable_decay",
]
