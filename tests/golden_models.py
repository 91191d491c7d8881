"""The tiny reference models of tests/golden, loaded through the library's own tables."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

import perception_encoder as pe

TOWERS = ["core_cls", "core_nocls_hd24", "lang_cls_ls", "lang_nocls_ls", "spatial_cls_nols"]
SIZES = ["native", "square", "nonsquare"]


def vision_config(fields: dict) -> pe.VisionConfig:
    """The reference's constructor fields in our words."""
    return pe.VisionConfig(
        image_size=fields["image_size"],
        patch_size=fields["patch_size"],
        width=fields["width"],
        depth=fields["layers"],
        heads=fields["heads"],
        mlp_width=int(fields["width"] * fields["mlp_ratio"]),
        class_token=fields["use_cls_token"],
        layer_scale=fields["ls_init_value"],
        norm_post=fields["use_ln_post"],
        pool="attention" if fields["pool_type"] == "attn" else None,
        pool_heads=fields["attn_pooler_heads"],
        output_width=fields["output_dim"],
    )


def tower_config(golden: Path, name: str) -> pe.VisionConfig:
    return vision_config(json.loads((golden / "pe" / "configs.json").read_text())[name])


def load_tower(golden: Path, name: str) -> pe.VisionTransformer:
    return pe.load_encoder(
        golden / "pe" / f"{name}.weights.safetensors", config=tower_config(golden, name), device="cpu"
    )


def tower_io(golden: Path, name: str) -> dict[str, Tensor]:
    return {key: tensor.float() for key, tensor in load_file(golden / "pe" / f"{name}.io.safetensors").items()}


def clip_config(golden: Path) -> pe.ClipConfig:
    fields = json.loads((golden / "clip" / "config.json").read_text())
    text = fields["text"]
    return pe.ClipConfig(
        vision=vision_config(fields["vision"]),
        text=pe.TextConfig(
            context=text["context_length"],
            width=text["width"],
            depth=text["layers"],
            heads=text["heads"],
            output_width=text["output_dim"],
            vocab=text["vocab_size"],
        ),
    )


def relative(got: Tensor, wanted: Tensor) -> float:
    """The largest relative L2 error of any one vector (a token, an embedding) along the last axis."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    error = torch.linalg.vector_norm(got.float() - wanted.float(), dim=-1)
    return float((error / torch.linalg.vector_norm(wanted.float(), dim=-1)).max())
