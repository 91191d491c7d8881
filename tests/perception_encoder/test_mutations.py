"""The parity tests see every known way of getting this model silently wrong.

Each mutation is a mistake that real re-implementations have made and that still gives a cosine above 0.999 or so. It
is put in, and the very comparison that test_parity.py makes must then fail, wherever the mistake can act.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_models import clip_config, load_tower, relative, tower_io
from safetensors.torch import load_file
from torch import Tensor, nn

import perception.layers
import perception_encoder as pe
import perception_encoder.vision
from perception.rope import angles, rope_2d

TOLERANCE = 1e-5
CLS, NO_CLS, LANG = "core_cls", "core_nocls_hd24", "lang_cls_ls"


@contextmanager
def replaced(module: object, name: str, value: object) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def rope_with(change: Callable[..., Tensor]):
    """A context that swaps the angle table: change(h, w, head_dim, prefix) -> P+h*w head_dim/2."""

    def table(h: int, w: int, head_dim: int, *, prefix: int = 0, device=None, theta: float = 10_000.0):
        turned = change(h, w, head_dim, prefix)
        return turned.cos(), turned.sin()

    return lambda tower: replaced(perception_encoder.vision, "rope_2d", table)


def grid_angles(h: int, w: int, head_dim: int, start: float, *, swap=False, scale=(1.0, 1.0), dim=None) -> Tensor:
    y = angles((torch.arange(h) + start) * scale[0], dim or head_dim // 2, 10_000.0)[:, : head_dim // 4]
    x = angles((torch.arange(w) + start) * scale[1], dim or head_dim // 2, 10_000.0)[:, : head_dim // 4]
    x, y = x.expand(h, w, -1), y[:, None].expand(h, w, -1)
    return torch.cat([y, x] if swap else [x, y], dim=-1).flatten(0, 1)


def zeros_first(grid: Tensor, prefix: int) -> Tensor:
    return torch.cat([grid.new_zeros(prefix, grid.shape[-1]), grid])


def half_split(x: Tensor, rope) -> Tensor:
    cos, sin = (t[:, None] for t in rope)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@contextmanager
def bicubic(tower):
    real = F.interpolate
    wrong = lambda x, **k: real(x, size=k["size"], mode="bicubic", align_corners=False, antialias=True)  # noqa: E731
    with replaced(F, "interpolate", wrong):
        yield


@contextmanager
def align_corners(tower):
    real = F.interpolate
    with replaced(F, "interpolate", lambda x, **k: real(x, **{**k, "align_corners": True})):
        yield


@contextmanager
def gelu(approximate: str, tower):
    real = F.gelu
    quick = lambda x: x * torch.sigmoid(1.702 * x)  # noqa: E731
    wrong = quick if approximate == "quick" else lambda x: real(x, approximate="tanh")
    with replaced(F, "gelu", wrong):
        yield


@contextmanager
def eps(tower):
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-6
    yield


@contextmanager
def attribute(tower, path: str, value: object):
    owner, _, name = path.rpartition(".")
    with replaced(tower.get_submodule(owner), name, value):
        yield


@contextmanager
def swapped_qk(tower):
    for block in tower.blocks:
        D = tower.width
        for p in (block.attn.qkv.weight, block.attn.qkv.bias):
            p.data = torch.cat([p.data[D : 2 * D], p.data[:D], p.data[2 * D :]])
    yield


@contextmanager
def pool_without_prefix(tower):
    real = tower.pool.forward
    with replaced(tower.pool, "forward", lambda x: real(x[:, 1:])):
        yield


@contextmanager
def probe_residual(tower):
    pool = tower.pool
    real_mlp = pool.mlp.forward
    # x + probe reaches both the norm and the sum
    real_proj = pool.proj.forward
    with replaced(pool.proj, "forward", lambda x: real_proj(x) + pool.probe), replaced(pool.mlp, "forward", real_mlp):
        yield


@contextmanager
def projection_not_transposed(tower):
    C, D = tower.project.weight.shape
    tower.project.weight.data = tower.project.weight.data.reshape(D, C).T.contiguous()
    yield


@contextmanager
def ls_swapped(tower):
    for block in tower.blocks:
        block.ls1, block.ls2 = block.ls2, block.ls1
    yield


@contextmanager
def norms_swapped(tower):
    for block in tower.blocks:
        block.norm1, block.norm2 = block.norm2, block.norm1
    yield


@contextmanager
def layer_scale_ignored(tower):
    for block in tower.blocks:
        block.ls1 = block.ls2 = nn.Identity()
    yield


# name: (how to break it, the models and sizes where it can act)
BOTH = [(CLS, "native"), (CLS, "nonsquare"), (NO_CLS, "native"), (NO_CLS, "nonsquare")]
ONLY_CLS = [case for case in BOTH if case[0] == CLS]
RESIZED = [case for case in BOTH if case[1] == "nonsquare"]
start_of = lambda prefix: 1 if prefix else 0  # noqa: E731

MUTATIONS: dict[str, tuple[Callable, list[tuple[str, str]]]] = {
    "rope: y before x": (
        rope_with(lambda h, w, d, p: zeros_first(grid_angles(h, w, d, start_of(p), swap=True), p)),
        BOTH,
    ),
    "rope: no +1 beside a class token": (
        rope_with(lambda h, w, d, p: zeros_first(grid_angles(h, w, d, 0), p)),
        ONLY_CLS,
    ),
    "rope: exponent over head_dim": (
        rope_with(lambda h, w, d, p: zeros_first(grid_angles(h, w, d, start_of(p), dim=d), p)),
        BOTH,
    ),
    "rope: half-split planes": (lambda tower: replaced(perception_encoder.vision, "rotate", half_split), BOTH),
    "rope: scaled to the native grid": (
        rope_with(lambda h, w, d, p: zeros_first(grid_angles(h, w, d, start_of(p), scale=(5 / h, 5 / w)), p)),
        RESIZED,
    ),
    "rope: class token's row last": (
        rope_with(lambda h, w, d, p: zeros_first(grid_angles(h, w, d, start_of(p)), p).roll(-p, 0)),
        ONLY_CLS,
    ),
    "rope: none": (lambda tower: replaced(perception_encoder.vision, "rotate", lambda x, rope: x), BOTH),
    "rope: angles in bfloat16": (
        lambda tower: replaced(
            perception_encoder.vision, "rope_2d", lambda *a, **k: tuple(t.bfloat16().float() for t in rope_2d(*a, **k))
        ),
        BOTH,
    ),
    "positions: bicubic, antialiased": (bicubic, RESIZED),
    "positions: corners aligned": (align_corners, RESIZED),
    "positions: none": (lambda tower: attribute(tower, "positions", lambda h, w: torch.zeros(())), BOTH),
    "norm: eps 1e-6": (eps, BOTH),
    "norm: none before": (lambda tower: attribute(tower, "norm_pre", nn.Identity()), BOTH),
    "norm: none after": (lambda tower: attribute(tower, "norm_post", nn.Identity()), BOTH),
    "norm: the two of a block swapped": (norms_swapped, BOTH),
    "gelu: tanh": (lambda tower: gelu("tanh", tower), BOTH),
    "gelu: quick": (lambda tower: gelu("quick", tower), BOTH),
    "attention: q and k swapped": (swapped_qk, BOTH),
    "pool: 4 heads": (lambda tower: attribute(tower, "pool.heads", 4), BOTH),
    "pool: without the class token": (pool_without_prefix, ONLY_CLS),
    "pool: probe residual": (probe_residual, BOTH),
    "projection: not transposed": (projection_not_transposed, BOTH),
    "layer scale: ignored": (layer_scale_ignored, [(LANG, "native"), (LANG, "nonsquare")]),
    "layer scale: the two swapped": (ls_swapped, [(LANG, "native"), (LANG, "nonsquare")]),
}
CASES = [(name, *case) for name, (_, cases) in MUTATIONS.items() for case in cases]


def error(golden: Path, tower: pe.VisionTransformer, model: str, size: str) -> float:
    """What test_parity.py looks at: the worst token of the last layer, and the pooled output where there is one."""
    io = tower_io(golden, model)
    pixels = io[f"{size}.input"]
    found = [relative(tower(pixels).tokens(), io[f"{size}.layer{tower.config.depth - 1}"])]
    if tower.pool:
        found.append(relative(tower.pooled(pixels), io[f"{size}.forward"]))
    return max(found)


@pytest.mark.parametrize(("name", "model", "size"), CASES, ids=lambda value: str(value).replace(" ", "-"))
@torch.inference_mode()
def test_mistake_is_seen(golden: Path, name: str, model: str, size: str) -> None:
    assert error(golden, load_tower(golden, model), model, size) < TOLERANCE
    tower = load_tower(golden, model)
    with MUTATIONS[name][0](tower):
        assert error(golden, tower, model, size) > 5 * TOLERANCE
    assert perception.layers.F.gelu is F.gelu
    assert error(golden, load_tower(golden, model), model, size) < TOLERANCE  # nothing leaked


TEXT_MUTATIONS: dict[str, Callable] = {
    "text: bidirectional": lambda clip: replaced(
        __import__("perception_encoder.text").text, "attend", lambda q, k, v, causal: pe_attend(q, k, v)
    ),
    "text: pooled at the last token": lambda clip: replaced(
        Tensor, "argmax", lambda self, dim: torch.full(self.shape[:1], self.shape[1] - 1)
    ),
    "text: projection not transposed": lambda clip: transposed(clip),
    "text: tanh gelu": lambda clip: gelu("tanh", clip),
}


def pe_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from perception.attention import attend

    return attend(q, k, v)


@contextmanager
def transposed(clip):
    C, D = clip.text.project.weight.shape
    clip.text.project.weight.data = clip.text.project.weight.data.reshape(D, C).T.contiguous()
    yield


@pytest.mark.parametrize("name", TEXT_MUTATIONS)
@torch.inference_mode()
def test_text_mistake_is_seen(golden: Path, name: str) -> None:
    io = load_file(golden / "clip" / "io.safetensors")
    clip = pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")
    wanted = io["output.text_features"]
    assert relative(clip.encode_text(io["input.token_ids"]), wanted) < TOLERANCE
    with TEXT_MUTATIONS[name](clip):
        assert relative(clip.encode_text(io["input.token_ids"]), wanted) > 5 * TOLERANCE
