"""Tiny language models: the golden ones of the reference, and random ones with nothing at its default."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from perception.rope import RopeScaling
from perception_encoder.config import VisionConfig
from perception_lm.checkpoints import builder
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.model import PerceptionLM

SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)


def tiny_config(*, tied: bool = True, class_token: bool = True, scaled: bool = True, **decoder: object) -> PlmConfig:
    """The golden models' vocabulary (433 ranks, 256 specials), other sizes than theirs; heads differ from kv heads."""
    sizes = {"width": 40, "depth": 2, "heads": 6, "kv_heads": 3, "mlp_width": 72, "vocab": 689, "head_dim": 8}
    vision = VisionConfig(
        image_size=24,
        patch_size=6,
        width=24,
        depth=2,
        heads=2,
        mlp_width=70,
        class_token=class_token,
        layer_scale=0.1,
        norm_post=False,
        pool=None,
    )
    text = DecoderConfig(**{**sizes, **decoder}, tied=tied, rope_scaling=SCALING if scaled else None, context=900)
    return PlmConfig(
        vision=vision,
        projector=ProjectorConfig(in_width=24, width=text.width),
        decoder=text,
        media=MediaConfig(tile=24, max_tiles=4, frames=32, context=900),
    )


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights with nothing at its default, so that no tensor can stand in for another."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=g)
        parameter += (0.3 if parameter.ndim == 1 else 0.1) * noise
    return model.eval()


def tiny_model(config: PlmConfig | None = None, seed: int = 0) -> PerceptionLM:
    config = config or tiny_config()
    torch.manual_seed(seed)
    return perturb(builder(config, config.decoder.vocab - 254), seed)  # type: ignore[return-value]


def golden_case(golden: Path, name: str, case: str = "one") -> tuple[Tensor, Tensor, Tensor]:
    """Tokens 1 T, pixels M 3 S S, and the reference's last logits V."""
    io = load_file(golden / "plm" / name / "io.safetensors")
    cases = json.loads((golden / "plm" / name / "cases.json").read_text())
    ids = torch.tensor([cases["cases"][case]["prompt_ids"]])
    return ids, (io[f"{case}.pixel_codes"].float() / 255 - 0.5) / 0.5, io[f"{case}.last_logits"]
