"""The tiny reference language models of tests/golden/plm, and a tiny random one, with batches for both."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from perception.rope import RopeScaling
from perception_encoder.config import VisionConfig
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.model import PerceptionLM, build
from perception_lm.processor import Batch
from perception_lm.zoo import load_model

GOLDEN = Path(__file__).parent / "golden" / "plm"
MODELS = ["A", "B"]
CASES = ["one", "tile", "video", "multi", "inter", "strip", "text"]
END_OF_TEXT, MEDIA, EOT = 434, 435, 442


def load(name: str) -> PerceptionLM:
    """A fresh copy of model A (class token, tied, scaled RoPE) or B (none of them), in float32."""
    return load_model(GOLDEN / name / "original", device="cpu", dtype="float32")[0]


@cache
def facts(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "cases.json").read_text())


@cache
def values(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "io.safetensors")


def pixels(name: str, case: str) -> Tensor | None:
    key = facts(name)["cases"][case].get("media_pixels")
    return None if key is None else values(name)[key].float() / 127.5 - 1


def greedy(name: str, case: str) -> list[int]:
    return facts(name)["cases"][case]["greedy_ids"]


def batch(name: str, cases: Sequence[str]) -> Batch:
    """The prompts of some cases side by side."""
    found = facts(name)["cases"]
    return pack([found[case]["prompt_ids"] for case in cases], [pixels(name, case) for case in cases], pad=END_OF_TEXT)


def pack(prompts: Sequence[Sequence[int]], media: Sequence[Tensor | None], pad: int = 0) -> Batch:
    """Prompts of different length with the pixels of each, M 3 S S or None."""
    width = max(map(len, prompts), default=0)
    tokens = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in prompts], dtype=torch.long)
    items = [part for part in media if part is not None]
    return Batch(
        tokens=tokens,
        lengths=tuple(map(len, prompts)),
        pixels=torch.cat(items) if items else None,
        media_counts=tuple(0 if part is None else len(part) for part in media),
    )


def words(ids: Sequence[int]) -> str:
    """A decoder of ids that loses nothing."""
    return "".join(f"<{id}>" for id in ids)


VOCAB, SLOT = 61, 60
TINY = PlmConfig(
    vision=VisionConfig(
        image_size=8, patch_size=2, width=16, depth=1, heads=2, mlp_width=32, norm_post=False, pool=None
    ),
    projector=ProjectorConfig(in_width=16, width=24),
    decoder=DecoderConfig(
        width=24,
        depth=2,
        heads=4,
        kv_heads=2,
        mlp_width=48,
        vocab=VOCAB,
        head_dim=8,
        rope_scaling=RopeScaling(factor=4, original_context=64),
        context=512,
    ),
    media=MediaConfig(tile=8, max_tiles=4, frames=4, context=512),
)
PER_ITEM = 4  # slots of one item


@cache
def tiny(seed: int = 0) -> PerceptionLM:
    """A random model whose answers wander: 8-pixel tiles of 4 tokens, ids below 61, slots are id 60."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(TINY, SLOT).eval()
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and name.startswith(("decoder.blocks", "projector")):
                nn.init.normal_(parameter, std=2 * parameter.shape[1] ** -0.5)
    return model


def random_prompt(seed: int, items: int, length: int) -> tuple[list[int], Tensor | None]:
    """`length` words with `items` media somewhere among them, each whole or split by a word."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, SLOT, (length,), generator=g).tolist()
    for _ in range(items):
        at = int(torch.randint(0, len(ids) + 1, (), generator=g))
        ids[at:at] = [SLOT] * PER_ITEM
    return ids, (torch.randn(items, 3, 8, 8, generator=g) if items else None)
