"""Training of two towers: losses, augmentation, optimizers, recipes, probes, run files; `nano` is the recipe in use.

config.py, launch.py   a run file to a trained encoder, on one process or many (`perception train-encoder`)
pairs.py, tasks.py     pictures with texts; what a pass makes of a batch
recipes.py             towers from towers
probe.py, probing.py   linear probes of frozen features; a run file of one
nano.py                PE-Core-nano from registry packages, on a CPU
"""

from perception_encoder.training.augment import Augment, plain
from perception_encoder.training.losses import (
    clip_loss,
    concept_loss,
    cosine_distillation,
    similarity_distillation,
)
from perception_encoder.training.optim import Muon, layer_groups, make_optimizers, warmup_cosine, warmup_stable_decay
from perception_encoder.training.probe import Probe, linear_probe
from perception_encoder.training.recipes import SelfDistillation, to_lang, to_spatial

__all__ = [
    "Augment",
    "Muon",
    "Probe",
    "SelfDistillation",
    "clip_loss",
    "concept_loss",
    "cosine_distillation",
    "layer_groups",
    "linear_probe",
    "make_optimizers",
    "plain",
    "similarity_distillation",
    "to_lang",
    "to_spatial",
    "warmup_cosine",
    "warmup_stable_decay",
]
