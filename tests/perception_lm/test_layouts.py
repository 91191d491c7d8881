"""Every layout in and out, to the bit; and every way in which a folder can be wrong."""

import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plm_tiny import SCALING, golden_case, tiny_config, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perception import rope
from perception.checkpoint import Rule, load_into
from perception.errors import CheckpointError, ConfigError
from perception.pixels import PixelSpec
from perception_lm import checkpoints
from perception_lm import foreign_configs as foreign
from perception_lm.checkpoints import Found, config_of, export, open_folder, same_bits, save, to_halves, to_neighbours
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.zoo import MODELS, load_model

LAYOUTS = [("A", "original"), ("A", "hf"), ("B", "original"), ("B", "hf")]
VARIANTS = [{"tied": True}, {"tied": False, "class_token": False, "scaled": False, "heads": 5, "kv_heads": 1}]


def load(folder: Path, **options: object) -> PerceptionLM:
    return load_model(folder, device="cpu", **{"dtype": "stored", **options})[0]


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return list(ours) == list(theirs) and all(same_bits(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def tokenizer(golden: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_file(golden / "plm" / "tokenizer.model")


@pytest.fixture
def copy(golden: Path, tmp_path: Path) -> Callable[..., Path]:
    """A golden folder to break."""

    def make(name: str = "A", layout: str = "original") -> Path:
        return Path(shutil.copytree(golden / "plm" / name / layout, tmp_path / f"{name}-{layout}"))

    return make


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


# --- The golden folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
@torch.inference_mode()
def test_golden_folders_give_the_reference_logits(golden: Path, name: str, layout: str) -> None:
    model = load(golden / "plm" / name / layout, dtype="float32")
    tokens, pixels, wanted = golden_case(golden, name)
    assert (model(tokens, pixels)[0, -1] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["A", "B"])
def test_both_golden_layouts_are_one_model(golden: Path, name: str) -> None:
    a, a_config, _ = load_model(golden / "plm" / name / "original", device="cpu")
    b, b_config, _ = load_model(golden / "plm" / name / "hf", device="cpu")
    assert equal(a, b)
    assert (a.media_token, b.media_token) == (435, 435)
    # What Hugging Face's config has no words for: frames of a video, and tiles without a processor's config.
    assert b_config == replace(a_config, media=replace(a_config.media, frames=32, max_tiles=36))


def test_golden_configs_say_what_the_reference_says(golden: Path) -> None:
    a, b = (open_folder(golden / "plm" / name / "original") for name in "AB")
    assert isinstance(a.config, PlmConfig)
    assert isinstance(b.config, PlmConfig)
    assert a.config.decoder == DecoderConfig(
        width=48,
        depth=2,
        heads=4,
        kv_heads=2,
        mlp_width=96,
        vocab=689,
        head_dim=12,
        rope_scaling=SCALING,
        tied=True,
        context=1024,
    )
    assert b.config.decoder == DecoderConfig(
        width=40, depth=3, heads=5, kv_heads=1, mlp_width=144, vocab=689, head_dim=8, context=1024
    )
    assert (a.config.vision.mlp_width, a.config.vision.class_token) == (128, True)
    assert (b.config.vision.mlp_width, b.config.vision.class_token) == (140, False)
    assert a.config.projector == ProjectorConfig(in_width=32, width=48, pool=2)
    assert a.config.media == MediaConfig(tile=32, max_tiles=4, frames=4, context=1024)
    assert b.config.media == MediaConfig(tile=30, max_tiles=4, frames=4, context=1024)
    assert a.pixels == PixelSpec(size=32, interpolation="bicubic")
    assert a.tokenizer == golden / "plm" / "A" / "original" / "tokenizer.model"


def test_the_published_params_and_configs_read_as_the_zoo_says() -> None:
    """The `model` table of the published runs, as their YAML files give it, and Hugging Face's for the 1B."""
    large = {"image_size": 448, "patch_size": 14, "width": 1024, "layers": 23, "heads": 16, "use_cls_token": True}
    large |= {"mlp_ratio": 4.0, "ls_init_value": 0.1, "use_ln_post": False, "pool_type": "none"}
    giant = large | {"width": 1536, "layers": 47, "use_cls_token": False, "mlp_ratio": 5.833333334}
    common = {"vocab_size": 128256, "norm_eps": 1e-5, "rope_theta": 500000.0, "max_seqlen": 11520, "pooling_ratio": 2}
    scaled = {"rope_scale_factor": 32, "high_freq_factor": 4, "weight_tying": True, "multiple_of": 256}
    models = {
        "1B": {"dim": 2048, "n_layers": 16, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.5, **scaled},
        "3B": {"dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, **scaled},
        "8B": {"dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3}
        | {"multiple_of": 1024, "weight_tying": False},
    }
    data = {"vision_input_type": "thumb+tile", "max_num_tiles": 36, "max_video_frames": 32, "image_res": 448}
    for size, model in models.items():
        vision = giant if size == "8B" else large
        params = {"model": {**common, **model, "vision_model": vision}, "data": data}
        config = MODELS.get(f"Perception-LM-{size}").config
        assert foreign.read_params(params) == config, size
        # And back: what we write reads as the same model, in the reference's words and in Hugging Face's.
        assert foreign.read_params(json.loads(json.dumps(foreign.write_params(config)))) == config
        special = {"bos": 128000, "end": 128001, "eot": 128009}
        hf = foreign.write_hugging_face(config, media_tokens=(128002, 128003), special=special, dtype="bfloat16")
        assert foreign.read_hugging_face(json.loads(json.dumps(hf))) == config


# --- Round trips -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_golden_folders_come_back_to_the_bit(
    golden: Path, tmp_path: Path, tokenizer: LlamaTokenizer, name: str, layout: str
) -> None:
    """Theirs -> ours -> theirs: the same keys, shapes and bits, and a config that reads as the same model."""
    source, out = golden / "plm" / name / layout, tmp_path / "out"
    model, config, _ = load_model(source, device="cpu", dtype="stored")
    export(model, out, layout, media=config.media, tokenizer=tokenizer)
    if layout == "hf":
        before, after = load_file(source / "model.safetensors"), load_file(out / "model.safetensors")
    else:
        before, after = (torch.load(f / "consolidated.pth", weights_only=True) for f in (source, out))
        assert (out / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert {key: (t.shape, t.dtype) for key, t in before.items()} == {k: (t.shape, t.dtype) for k, t in after.items()}
    assert all(same_bits(before[key], after[key]) for key in before)
    again, config_again, _ = load_model(out, device="cpu", dtype="stored")
    assert equal(model, again)
    assert replace(config_again, media=config.media) == config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["native", "original", "hf"])
def test_ours_come_back_to_the_bit(
    tmp_path: Path, tokenizer: LlamaTokenizer, layout: str, variant: dict, dtype: torch.dtype
) -> None:
    """Ours -> theirs -> ours, at heads that are not kv heads and a head_dim that is not width / heads."""
    config = tiny_config(**variant)
    model = tiny_model(config).to(dtype)
    export(model, tmp_path / "out", layout, media=config.media, tokenizer=tokenizer)
    again, config_again, path = load_model(tmp_path / "out", device="cpu", dtype="stored")
    assert equal(model, again)
    assert config_again == config
    assert again.media_token == model.media_token
    assert path is not None
    assert LlamaTokenizer.from_file(path).encode("hello") == tokenizer.encode("hello")
    spec = again.encoder.preprocess
    assert spec == PixelSpec(size=24, interpolation="bicubic")


def test_the_order_of_rows_is_undone_exactly() -> None:
    """Row 2i of a head is row i of the half-split order, row 2i + 1 row head_dim/2 + i."""
    weight = torch.arange(12.0)[:, None]  # 2 heads of 6
    assert to_halves(weight, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert torch.equal(to_neighbours(to_halves(weight, 2), 2), weight)
    assert not torch.equal(to_neighbours(weight, 2), to_halves(weight, 2))


def test_an_exported_original_has_the_reference_names(tmp_path: Path, tokenizer: LlamaTokenizer) -> None:
    """One key a row of the format's table, with its shape; the tied copy is the same storage, so no larger."""
    config = tiny_config()
    export(tiny_model(config), tmp_path / "o", "original", media=config.media, tokenizer=tokenizer)
    state = torch.load(tmp_path / "o" / "consolidated.pth", weights_only=True)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    expected = {
        "tok_embeddings.weight": (689, 40),
        "output.tied_module.weight": (689, 40),
        "norm.weight": (40,),
        "layers.1.attention.wq.weight": (48, 40),
        "layers.1.attention.wk.weight": (24, 40),
        "layers.1.attention.wv.weight": (24, 40),
        "layers.1.attention.wo.weight": (40, 48),
        "layers.0.feed_forward.w1.weight": (72, 40),
        "layers.0.feed_forward.w3.weight": (72, 40),
        "layers.0.feed_forward.w2.weight": (40, 72),
        "layers.0.attention_norm.weight": (40,),
        "layers.0.ffn_norm.weight": (40,),
        "vision_model.class_embedding": (24,),
        "vision_model.positional_embedding": (17, 24),
        "vision_model.conv1.weight": (24, 3, 6, 6),
        "vision_model.ln_pre.bias": (24,),
        "vision_model.transformer.resblocks.1.attn.in_proj_weight": (72, 24),
        "vision_model.transformer.resblocks.1.attn.out_proj.bias": (24,),
        "vision_model.transformer.resblocks.1.ls_2.gamma": (24,),
        "vision_model.transformer.resblocks.1.mlp.c_fc.weight": (70, 24),
        "vision_projector.projector.0.weight": (40, 24),
        "vision_projector.projector.2.bias": (40,),
    }
    assert expected.items() <= shapes.items()
    assert len(state) == 3 + 9 * 2 + 1 + 5 + 14 * 2 + 4 - 1
    tied = state["output.tied_module.weight"], state["tok_embeddings.weight"]
    assert tied[0].data_ptr() == tied[1].data_ptr()


@pytest.mark.parametrize(("size", "count"), [("1B", 478), ("3B", 586), ("8B", 957)])
def test_trap_7_key_counts_of_the_published_models(size: str, count: int) -> None:
    """Trap 7: a block too many is 14 keys more (16 with LayerScale's), a final norm 2. Counted without a weight."""
    config = MODELS.get(f"Perception-LM-{size}").config
    with torch.device("meta"):
        state = checkpoints.builder(config, 128002).state_dict()
    keys = set(checkpoints.convert(state, checkpoints.original(config), back=True))
    assert len(keys) + config.decoder.tied == count
    assert not any("ln_post" in key or "attn_pool" in key or key == "vision_model.proj" for key in keys)
    assert ("output.weight" in keys) == (size == "8B")
    hf = set(checkpoints.convert(state, checkpoints.hugging_face(config), back=True))
    assert len(hf) == len(keys)
    assert ("lm_head.weight" in hf) == (size == "8B")
    assert ("model.vision_tower.timm_model.cls_token" in hf) == (size != "8B")


# --- Traps: each wrong table is seen to be wrong -------------------------------------------------------------------


def drift(
    golden: Path, name: str, layout: str, monkeypatch: pytest.MonkeyPatch, change: Callable[[Found], Found]
) -> float:
    """Largest error of the logits with a table or a config that was changed."""
    real = checkpoints.open_folder
    monkeypatch.setattr("perception_lm.zoo.open_folder", lambda folder: change(real(folder)))
    model = load(golden / "plm" / name / layout, dtype="float32")
    tokens, pixels, wanted = golden_case(golden, name)
    with torch.inference_mode():
        return float((model(tokens, pixels)[0, -1] - wanted).abs().max())


def with_rule(found: Found, ours: str, change: Callable[[Tensor], Tensor]) -> Found:
    """The table with one more change on the way to `ours`."""

    def rule(old: Rule) -> Rule:
        if old.ours not in (ours, (ours,)):
            return old
        return Rule(old.theirs, old.ours, lambda t: change(old.change(t)))  # type: ignore[arg-type]

    table = tuple(rule(old) for old in found.table)
    assert table != found.table
    return replace(found, table=table)


@pytest.mark.parametrize("part", ["q", "k", "v"])
@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_trap_1_a_wrong_order_of_rows_shows(
    golden: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: str, part: str
) -> None:
    """Trap 1: q or k left in the other order, or v put into it. Right: below 3e-5; wrong: 0.5 to 10."""
    config = open_folder(golden / "plm" / name / layout).config.decoder  # type: ignore[union-attr]
    heads = config.heads if part == "q" else config.kv_heads
    ours = f"decoder.blocks.*.attn.{part}.weight"
    error = drift(golden, name, layout, monkeypatch, lambda f: with_rule(f, ours, lambda t: to_halves(t, heads)))
    assert error > 0.2


@pytest.mark.parametrize("name", ["A", "B"])
def test_trap_1_the_tower_is_never_turned(golden: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Trap 1: the vision tower's qkv is in neighbouring pairs in both formats; turned, logits move by 0.02 and more."""
    heads = open_folder(golden / "plm" / name / "hf").config.vision.heads * 3  # type: ignore[union-attr]
    ours = "encoder.blocks.*.attn.qkv.*"

    def wrong(t: Tensor) -> Tensor:
        return to_neighbours(t, heads) if t.ndim == 2 else t

    assert drift(golden, name, "hf", monkeypatch, lambda f: with_rule(f, ours, wrong)) > 0.01


@pytest.mark.parametrize("name", ["A", "B"])
def test_trap_2_keys_are_turned_by_their_own_heads(golden: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Trap 2: k turned as if it had as many heads as q: 4 for 2 in A, 5 for 1 in B (where the rows do not divide)."""
    config = open_folder(golden / "plm" / name / "hf").config.decoder  # type: ignore[union-attr]

    def wrong(t: Tensor) -> Tensor:
        return to_neighbours(to_halves(t, config.kv_heads), config.heads)

    change = lambda f: with_rule(f, "decoder.blocks.*.attn.k.weight", wrong)  # noqa: E731
    if name == "B":
        with pytest.raises(CheckpointError, match="cannot become decoder"):
            drift(golden, name, "hf", monkeypatch, change)
    else:
        assert drift(golden, name, "hf", monkeypatch, change) > 0.2


@pytest.mark.parametrize(
    ("name", "scaling", "least"),
    [
        ("A", None, 0.1),
        ("A", replace(SCALING, factor=8.0), 0.01),
        ("A", replace(SCALING, high_freq_factor=32.0), 0.5),
        ("B", replace(SCALING, factor=8.0), 0.3),
    ],
)
def test_trap_3_a_wrong_rope_scaling_shows(
    golden: Path, monkeypatch: pytest.MonkeyPatch, name: str, scaling: rope.RopeScaling | None, least: float
) -> None:
    """Trap 3: no scaling on A moves logits by 0.22, factor 8 by 0.022, high factor 32 by 2.3; factor 8 on B by 0.8."""

    def change(found: Found) -> Found:
        assert isinstance(found.config, PlmConfig)
        decoder = replace(found.config.decoder, rope_scaling=scaling)
        return replace(found, config=replace(found.config, decoder=decoder))

    assert drift(golden, name, "original", monkeypatch, change) > least


@pytest.mark.parametrize(("head_dim", "split"), [(64, (15, 3, 14)), (128, (29, 6, 29))])
def test_trap_3_the_published_scaling_has_its_split(head_dim: int, split: tuple[int, int, int]) -> None:
    """Trap 3: planes left alone, blended and divided by 32: 15/3/14 at a head of 64, 29/6/29 at one of 128."""
    plain = rope.frequencies(head_dim, 500_000.0)
    scaled = rope.frequencies(head_dim, 500_000.0, MODELS.get("Perception-LM-1B").config.decoder.rope_scaling)
    same, divided = torch.isclose(scaled, plain, rtol=1e-6), torch.isclose(scaled, plain / 32, rtol=1e-6)
    assert (int(same.sum()), int((~same & ~divided).sum()), int(divided.sum())) == split
    assert MODELS.get("Perception-LM-8B").config.decoder.rope_scaling is None


def test_trap_3_the_reference_defaults_are_its_own(golden: Path) -> None:
    """Trap 3: a factor without a `high_freq_factor` means 32 there, not Llama's 4; a factor of 1 is no scaling."""
    params = json.loads((golden / "plm" / "A" / "original" / "params.json").read_text())
    del params["model"]["high_freq_factor"]
    assert foreign.read_params(params).decoder.rope_scaling == replace(SCALING, high_freq_factor=32.0)
    params["model"]["rope_scale_factor"] = 1
    assert foreign.read_params(params).decoder.rope_scaling is None
    del params["model"]["rope_scale_factor"]
    assert foreign.read_params(params).decoder.rope_scaling is None


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_trap_7_another_depth_or_a_final_norm_is_refused(copy: Callable[..., Path], layout: str) -> None:
    """Trap 7: one layer more or fewer, or `ln_post` in the file, never loads."""
    folder = copy("A", layout)
    name = "params.json" if layout == "original" else "config.json"
    for depth in (1, 3):
        if layout == "original":
            edit(folder / name, lambda d, n=depth: d["model"]["vision_model"].update(layers=n))
        else:
            edit(folder / name, lambda d, n=depth: d["vision_config"]["model_args"].update(depth=n))
        with pytest.raises(CheckpointError, match="missing" if depth == 3 else "not known"):
            load(folder)
    if layout == "original":
        edit(folder / name, lambda d: d["model"]["vision_model"].update(layers=2))
        state = torch.load(folder / "consolidated.pth", weights_only=True)
        for end in ("weight", "bias"):
            state[f"vision_model.ln_post.{end}"] = torch.ones(32)
        torch.save(state, folder / "consolidated.pth")
        with pytest.raises(CheckpointError, match=r"norm_post"):
            load(folder)
        edit(folder / name, lambda d: d["model"]["vision_model"].update(use_ln_post=True))
        with pytest.raises(ConfigError, match="use_ln_post"):
            load(folder)
    else:
        edit(folder / name, lambda d: d["vision_config"]["model_args"].update(depth=2, use_post_transformer_norm=True))
        with pytest.raises(ConfigError, match="use_post_transformer_norm"):
            load(folder)


@pytest.mark.parametrize("layout", ["original", "hf"])
@torch.inference_mode()
def test_trap_8_the_class_token_comes_first(golden: Path, layout: str) -> None:
    """Trap 8: the class token's position as the last row, not the first: 0.29 (its rotary row last: 1.9)."""
    model = load(golden / "plm" / "A" / layout, dtype="float32")
    tokens, pixels, wanted = golden_case(golden, "A")
    assert (model(tokens, pixels)[0, -1] - wanted).abs().max() < 1e-4
    model.encoder.pos_embed.copy_(model.encoder.pos_embed.roll(-1, 0))
    assert (model(tokens, pixels)[0, -1] - wanted).abs().max() > 0.1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ref_feat_shape": [24, 24]}, r"'ref_feat_shape' is \[24, 24\] and the grid 8 x 8"),
        ({"ref_feat_shape": None}, "'ref_feat_shape'"),
        ({"global_pool": "map"}, "global_pool"),
        ({"global_pool": None}, "global_pool"),
        ({"rope_grid_offset": 0.0}, "rope_grid_offset"),
        ({"num_classes": 1000}, "num_classes"),
        ({"qk_norm": True}, "not known"),
        ({"img_size": [32, 28]}, "square"),
    ],
)
def test_trap_9_a_tower_that_timm_would_build_otherwise_is_refused(
    copy: Callable[..., Path], change: dict, match: str
) -> None:
    """Trap 9: the default reference grid (24 x 24) rescales positions, `global_pool="map"` pools: both refused."""
    folder = copy("A", "hf")
    edit(folder / "config.json", lambda d: d["vision_config"]["model_args"].update(change))
    with pytest.raises(ConfigError, match=match):
        load(folder)


def test_trap_9_only_model_args_count(copy: Callable[..., Path]) -> None:
    """Trap 9: the level above still says `global_pool: map` and `do_pooling: true` in the published files."""
    folder = copy("A", "hf")
    data = json.loads((folder / "config.json").read_text())["vision_config"]
    assert (data["global_pool"], data["do_pooling"]) == ("map", True)
    assert load(folder).encoder.pool is None


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_trap_10_every_gamma_is_needed(copy: Callable[..., Path], name: str, layout: str) -> None:
    """Trap 10: LayerScale missing is an error, not 0.1 (which moves the logits by 4 and 9) and not the identity."""
    folder = copy(name, layout)
    _rewrite(folder, lambda s: {k: v for k, v in s.items() if "gamma" not in k})
    with pytest.raises(CheckpointError, match=r"missing 4 parameters \(encoder\.blocks\.0\.ls1\.gamma"):
        load(folder)
    name = "params.json" if layout == "original" else "config.json"
    folder = copy("B" if folder.name[0] == "A" else "A", layout)
    if layout == "original":
        edit(folder / name, lambda d: d["model"]["vision_model"].update(ls_init_value=None))
    else:
        edit(folder / name, lambda d: d["vision_config"]["model_args"].update(init_values=None))
    with pytest.raises(CheckpointError, match=r"not known 4 keys \(encoder\.blocks"):
        load(folder)


@pytest.mark.parametrize("name", ["A", "B"])
def test_trap_19_slots_are_kept_with_perception_lms_own_id(golden: Path, name: str, tokenizer: LlamaTokenizer) -> None:
    """Trap 19: `<|image|>` is the third after the ranks: 435 here and 128002 in the published models, never 128256."""
    found = open_folder(golden / "plm" / name / "original")
    assert (found.media_token, tokenizer.image_token) == (435, 435)
    assert 128_256 - 254 == 128_002


def test_trap_28_a_tied_matrix_is_one(golden: Path) -> None:
    """Trap 28: one parameter serves both ends, so a gradient step moves both; no second copy is kept."""
    model = load(golden / "plm" / "A" / "original", dtype="float32")
    assert model.decoder.head is None
    assert not any("head" in name for name in model.state_dict())
    x = torch.randn(1, 3, 48)
    before = model.decoder.logits(x)
    with torch.no_grad():
        model.decoder.token_embed.weight.mul_(2)
    torch.testing.assert_close(model.decoder.logits(x), 2 * before)
    untied = load(golden / "plm" / "B" / "original", dtype="float32")
    assert untied.decoder.head.weight.data_ptr() != untied.decoder.token_embed.weight.data_ptr()


@pytest.mark.parametrize(("layout", "copy_name"), [("original", "output.weight"), ("hf", "lm_head.weight")])
def test_trap_28_a_tied_copy_must_be_equal(copy: Callable[..., Path], layout: str, copy_name: str) -> None:
    """Trap 28: the redundant copy is accepted when equal to the bit, absent or present, and refused when not."""
    folder = copy("A", layout)
    embedding = {"original": "tok_embeddings.weight", "hf": "model.language_model.embed_tokens.weight"}[layout]
    plain = load(folder)
    _rewrite(folder, lambda s: {k: v for k, v in s.items() if "tied_module" not in k})
    assert equal(load(folder), plain)
    _rewrite(folder, lambda s: {**s, copy_name: s[embedding].clone()})
    assert equal(load(folder), plain)

    def differ(state: dict) -> dict:
        state[copy_name] = state[copy_name].clone()
        state[copy_name][3, 1] += 1
        return state

    _rewrite(folder, differ)
    with pytest.raises(CheckpointError, match=f"{copy_name} and .* are one matrix in a tied model, and differ here"):
        load(folder)


def test_the_golden_tied_copy_is_checked_too(copy: Callable[..., Path]) -> None:
    folder = copy("A", "original")

    def differ(state: dict) -> dict:
        return {**state, "output.tied_module.weight": -state["tok_embeddings.weight"]}

    _rewrite(folder, differ)
    with pytest.raises(CheckpointError, match=r"output\.tied_module\.weight"):
        load(folder)


def test_bits_are_compared() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not same_bits(torch.zeros(2), torch.zeros(2, dtype=torch.float16))
    assert not same_bits(torch.zeros(2), torch.zeros(1, 2))
    assert not same_bits(torch.zeros(4)[:2], torch.ones(2))


def _rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    """Change the weights of a folder, whatever they are in."""
    if (folder / "model.safetensors").exists():
        state = load_file(folder / "model.safetensors")
        save_file({k: v.contiguous() for k, v in change(dict(state)).items()}, folder / "new.safetensors")
        (folder / "new.safetensors").replace(folder / "model.safetensors")  # a loaded model still maps the old file
    else:
        state = torch.load(folder / "consolidated.pth", weights_only=True)
        torch.save(change(dict(state)), folder / "new.pth")
        (folder / "new.pth").replace(folder / "consolidated.pth")


# --- The original folder in all its shapes -------------------------------------------------------------------------


def test_the_original_subfolder_of_a_repository_is_found(copy: Callable[..., Path], tmp_path: Path) -> None:
    source = copy("A", "original")
    repository = tmp_path / "repository"
    repository.mkdir()
    source.rename(repository / "original")
    model, _, tokenizer = load_model(repository, device="cpu", dtype="stored")
    assert tokenizer == repository / "original" / "tokenizer.model"
    (repository / "original" / "tokenizer.model").rename(repository / "tokenizer.model")
    again, _, tokenizer = load_model(repository, device="cpu", dtype="stored")
    assert tokenizer == repository / "tokenizer.model"
    assert equal(model, again)


def test_a_folder_in_both_layouts_is_read_without_unpickling(
    golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(golden / "plm" / "A" / "hf", tmp_path / "both")
    shutil.copytree(golden / "plm" / "A" / "original", tmp_path / "both" / "original")
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    found = open_folder(tmp_path / "both")
    assert found.layout == "hf"
    assert found.tokenizer == tmp_path / "both" / "original" / "tokenizer.model"


def test_a_snapshot_of_the_hubs_cache_is_links_into_its_blobs(golden: Path, tmp_path: Path) -> None:
    """The cache keeps files as blobs, and a snapshot, `original/` too, is links to them; other links are refused."""
    repository = tmp_path / "models--facebook--Perception-LM-1B"
    snapshot = repository / "snapshots" / "abc" / "original"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for n, path in enumerate(sorted((golden / "plm" / "A" / "original").iterdir())):
        shutil.copy(path, repository / "blobs" / str(n))
        (snapshot / path.name).symlink_to(f"../../../blobs/{n}")
    model = load(snapshot.parent)
    assert equal(model, load(golden / "plm" / "A" / "original"))
    (snapshot / "consolidated.pth").unlink()
    (snapshot / "consolidated.pth").symlink_to(golden / "plm" / "A" / "original" / "consolidated.pth")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        load(snapshot.parent)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_parts_are_merged(copy: Callable[..., Path], suffix: str) -> None:
    """The reference reads part 00 of several and leaves the rest random, with a warning; here all are one."""
    folder = copy("B")
    whole = load(folder)
    state = torch.load(folder / "consolidated.pth", weights_only=True)
    (folder / "consolidated.pth").unlink()
    keys = sorted(state)
    cuts = [keys[:20], keys[20:21], keys[21:]]
    for n, names in enumerate(cuts):
        part = {key: state[key] for key in [*names, "norm.weight"]}  # what all parts repeat is one, if it is equal
        path = folder / f"consolidated.{n:02}.{suffix}"
        torch.save(part, path) if suffix == "pth" else save_file(part, path)
    assert equal(load(folder), whole)
    part = folder / f"consolidated.01.{suffix}"
    kept = part.read_bytes()
    part.unlink()
    with pytest.raises(CheckpointError, match=f"1 of 3 parts are missing, such as consolidated.01.{suffix}"):
        load(folder)
    part.write_bytes(kept)
    changed = {"norm.weight": state["norm.weight"] + 1}
    torch.save(changed, part) if suffix == "pth" else save_file(changed, part)
    with pytest.raises(CheckpointError, match=r"both hold 'norm\.weight', and not the same"):
        load(folder)
    part.write_bytes(kept)
    torch.save(state, folder / "consolidated.pth")
    with pytest.raises(CheckpointError, match="which of them is the model"):
        load(folder)


def test_what_a_trainer_wraps_is_unwrapped(copy: Callable[..., Path]) -> None:
    folder = copy("A")
    model = load(folder)
    _rewrite(folder, lambda s: {"model": s})
    assert equal(load(folder), model)


def test_a_stored_rope_table_is_known_and_not_wanted(copy: Callable[..., Path]) -> None:
    folder = copy("B")
    model = load(folder)
    _rewrite(folder, lambda s: {**s, "rope.freqs": torch.ones(4)})
    assert equal(load(folder), model)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: d.pop("model"), ConfigError, "no 'model' with a 'vision_model'"),
        (lambda d: d["model"].pop("vision_model"), ConfigError, "no 'model' with a 'vision_model'"),
        (lambda d: d["model"].update(vision_model=[]), ConfigError, "expected a table"),
        (lambda d: d["model"].update(dim="48"), ConfigError, "'dim' is '48'; expected a whole number"),
        (lambda d: d["model"].update(dim=True), ConfigError, "'dim' is True"),
        (lambda d: d["model"].update(n_layers=10**9), ConfigError, "expected 0 to"),
        (lambda d: d["model"].update(n_layers=10**4000), ConfigError, "expected 0 to|not sound JSON"),
        (lambda d: d["model"].update(n_layers=-1), ConfigError, "expected 0 to"),
        (lambda d: d["model"].update(n_heads=0), ConfigError, "expected 1 to"),
        (lambda d: d["model"].update(n_kv_heads=3), ConfigError, "cannot be shared"),
        (lambda d: d["model"].update(norm_eps=float("nan")), ConfigError, "expected a number"),
        (lambda d: d["model"].update(ffn_dim_multiplier=float("inf")), ConfigError, "expected a number"),
        (lambda d: d["model"].update(rope_theta="big"), ConfigError, "expected a number"),
        (lambda d: d["model"].update(sliding_window=128), ConfigError, "sliding_window"),
        (lambda d: d["model"].update(weight_tying=None), ConfigError, "lacks 'weight_tying'"),
        (lambda d: d["model"].update(use_scaled_rope=False), ConfigError, "'rope_scale_factor' is 32"),
        (lambda d: d["model"].update(remove_vision_class_token=False), ConfigError, "remove_vision_class_token"),
        (lambda d: d["model"].update(pooling_ratio=3), ConfigError, "does not pool by 3"),
        (lambda d: d["model"].update(vocab_size=200), ConfigError, "no room for 256"),
        (lambda d: d["model"]["vision_model"].update(patch_size=0), ConfigError, "patch_size"),
        (lambda d: d["model"]["vision_model"].update(pool_type="attn"), ConfigError, "pool_type"),
        (lambda d: d["model"]["vision_model"].update(output_dim=12), ConfigError, "output_dim"),
        (lambda d: d["model"]["vision_model"].update(use_abs_posemb=False), ConfigError, "use_abs_posemb"),
        (lambda d: d["data"].update(image_res=33), ConfigError, "patches of 4"),
        (lambda d: d.update(data=[1]), ConfigError, "expected a table"),
        (lambda d: d["model"].update(dim=96), CheckpointError, "other shapes"),
        (lambda d: d["model"].update(n_layers=3), CheckpointError, "missing 9 parameters"),
        (lambda d: d["model"].update(n_layers=1), CheckpointError, r"not known 9 keys"),
        (lambda d: d["model"].update(weight_tying=False), CheckpointError, r"missing 1 parameter \(decoder\.head"),
    ],
)
def test_wrong_params_are_refused(copy: Callable[..., Path], change: Callable, error: type, match: str) -> None:
    folder = copy("A")
    edit(folder / "params.json", change)
    with pytest.raises(error, match=match):
        load(folder)


def test_f25_a_hostile_config_is_refused_before_anything_is_allocated(copy: Callable[..., Path]) -> None:
    for layout, name, change in (
        ("original", "params.json", lambda d: d["model"].update(dim=60_000, n_layers=500, vocab_size=3_000_000)),
        ("hf", "config.json", lambda d: d["text_config"].update(hidden_size=60_000, num_hidden_layers=500)),
    ):
        folder = copy("A", layout)
        edit(folder / name, change)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        with pytest.raises((CheckpointError, ConfigError)):
            load(folder)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
        assert time.perf_counter() - start < 20


# --- Hugging Face's folder in all its spellings ----------------------------------------------------------------------


def test_both_spellings_of_the_config_are_read(golden: Path) -> None:
    """Version 4: rope_theta, rope_scaling, torch_dtype; version 5: rope_parameters, dtype. `type` is older still."""
    data = json.loads((golden / "plm" / "A" / "hf" / "config.json").read_text())
    config = foreign.read_hugging_face(data)
    text = data["text_config"]
    scaling, theta = text.pop("rope_scaling"), text.pop("rope_theta")
    text["rope_parameters"] = {**scaling, "rope_theta": theta}
    data["dtype"] = data.pop("torch_dtype")
    assert foreign.read_hugging_face(data) == config
    text["rope_parameters"]["type"] = text["rope_parameters"].pop("rope_type")
    assert foreign.read_hugging_face(data) == config
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 10_000.0}
    assert foreign.read_hugging_face(data).decoder == replace(config.decoder, rope_theta=10_000.0, rope_scaling=None)
    del text["rope_parameters"]
    assert foreign.read_hugging_face(data).decoder.rope_scaling is None


def test_the_tiles_come_from_either_processor_config(copy: Callable[..., Path]) -> None:
    folder = copy("A", "hf")
    settings = {"tile_size": 32, "max_num_tiles": 9, "vision_input_type": "vanilla"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    assert open_folder(folder).config.media == MediaConfig(tile=32, max_tiles=9, tiling="vanilla", context=1024)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": {**settings, "max_num_tiles": 5}}))
    assert open_folder(folder).config.media.max_tiles == 5


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda d: d.update(model_type="llava"), ConfigError, "model_type 'llava'"),
        (lambda d: d.pop("vision_config"), ConfigError, "lacks 'vision_config'"),
        (lambda d: d.update(text_config="llama"), ConfigError, "expected a table"),
        (lambda d: d["text_config"].update(model_type="qwen2"), ConfigError, "only a 'llama'"),
        (lambda d: d["text_config"].update(attention_bias=True), ConfigError, "attention_bias"),
        (lambda d: d["text_config"].update(mlp_bias=True), ConfigError, "mlp_bias"),
        (lambda d: d["text_config"].update(hidden_act="gelu"), ConfigError, "hidden_act"),
        (lambda d: d["text_config"]["rope_scaling"].update(rope_type="yarn"), ConfigError, "'yarn'"),
        (lambda d: d["text_config"]["rope_scaling"].pop("factor"), ConfigError, "lacks 'factor'"),
        (lambda d: d["text_config"].update(quantization_config={}), ConfigError, "quantised"),
        (lambda d: d["text_config"].update(hidden_size="48"), ConfigError, "expected a whole number"),
        (lambda d: d["text_config"].update(num_hidden_layers=10**9), ConfigError, "expected 0 to"),
        (lambda d: d["vision_config"].update(model_type="siglip"), ConfigError, "timm_wrapper"),
        (lambda d: d["vision_config"].update(architecture="vit_base_patch16_224"), ConfigError, "no tower"),
        (lambda d: d.update(vision_use_cls_token=False), ConfigError, "has a class token"),
        (lambda d: d.update(image_token_id=689), ConfigError, "outside the vocabulary"),
        (lambda d: d.update(image_token_id="x"), ConfigError, "image_token_id"),
        (lambda d: d.update(tie_word_embeddings=False), CheckpointError, "decoder.head.weight"),
        (
            lambda d: d["vision_config"]["model_args"].update(embed_dim=64),
            CheckpointError,
            "other shapes|cannot become",
        ),
    ],
)
def test_wrong_hugging_face_configs_are_refused(
    copy: Callable[..., Path], change: Callable, error: type, match: str
) -> None:
    folder = copy("A", "hf")
    edit(folder / "config.json", change)
    with pytest.raises(error, match=match):
        load(folder)


def test_shards_are_written_and_read(tmp_path: Path, tokenizer: LlamaTokenizer) -> None:
    config = tiny_config(tied=False)
    model = tiny_model(config)
    out = tmp_path / "hf"
    export(model, out, "hf", media=config.media, tokenizer=tokenizer, shard=100_000)
    shards = sorted(path.name for path in out.glob("model-*.safetensors"))
    assert len(shards) > 3
    assert not (out / "model.safetensors").exists()
    assert all((out / name).stat().st_size < 130_000 for name in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in model.state_dict().values())
    assert equal(load(out), model)
    # Another export over it leaves nothing of the first that would be read in its place, and the other way round.
    export(model, out, "hf", media=config.media, tokenizer=tokenizer)
    assert sorted(path.name for path in out.glob("model*")) == ["model.safetensors"]
    assert equal(load(out), model)
    export(model, out, "hf", media=config.media, tokenizer=tokenizer, shard=100_000)
    assert equal(load(out), model)


@pytest.mark.parametrize("name", ["../../x.safetensors", "/etc/x.safetensors", "gone.safetensors", "x.pt"])
def test_f22_f23_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, name: str, tokenizer: LlamaTokenizer) -> None:
    config = tiny_config(tied=False)
    export(tiny_model(config), tmp_path / "hf", "hf", media=config.media, shard=100_000)
    index = tmp_path / "hf" / "model.safetensors.index.json"
    edit(index, lambda d: d["weight_map"].update({"lm_head.weight": name}))
    with pytest.raises(CheckpointError, match=r"plain file name|missing|shards are"):
        load(tmp_path / "hf")


def test_f24_links_that_leave_the_folder_are_refused(copy: Callable[..., Path], tmp_path: Path) -> None:
    for layout, name in (("original", "params.json"), ("original", "tokenizer.model"), ("hf", "config.json")):
        folder = copy("A", layout)
        (folder / name).rename(tmp_path / "elsewhere")
        (folder / name).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match="leaves its folder"):
            load(folder)
        shutil.rmtree(folder)


# --- Weights that are wrong ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), LAYOUTS)
def test_strict_on_both_sides(copy: Callable[..., Path], name: str, layout: str) -> None:
    """F-19: one key fewer, one more, or one of another shape is an error that names it."""
    folder = copy(name, layout)
    key = {"original": "layers.1.attention.wq.weight", "hf": "model.language_model.layers.1.self_attn.q_proj.weight"}
    state: dict = {}

    def keep(s: dict) -> dict:
        state.update(s)
        return s

    _rewrite(folder, keep)
    _rewrite(folder, lambda s: {k: v for k, v in s.items() if k != key[layout]})
    with pytest.raises(CheckpointError, match=r"missing 1 parameter \(decoder\.blocks\.1\.attn\.q\.weight\)"):
        load(folder)
    _rewrite(folder, lambda s: {**state, "layers.0.attention.wq.bias": torch.ones(3)})
    with pytest.raises(CheckpointError, match=r"not known 1 key \(layers\.0\.attention\.wq\.bias\)"):
        load(folder)
    _rewrite(folder, lambda s: {**state, key[layout]: torch.ones(8, 8)})
    with pytest.raises(CheckpointError, match=r"attn\.q\.weight"):
        load(folder)
    _rewrite(folder, lambda s: state)
    load(folder)


class Marks:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_f10_to_f18_files_that_are_no_weights(copy: Callable[..., Path], tmp_path: Path) -> None:
    """What the reader of weights refuses stays refused behind a model's folder; nothing is run."""
    folder = copy("A")
    target = folder / "consolidated.pth"
    bad = {
        "pickle": pickle.dumps(Marks(tmp_path / "ran")),
        "empty": b"",
        "half": target.read_bytes()[:4000],
        "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "page": b"<!DOCTYPE html><html></html>",
    }
    for content in bad.values():
        target.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"consolidated\.pth"):
            load(folder)
    assert not (tmp_path / "ran").exists()
    folder = copy("B", "hf")
    target = folder / "model.safetensors"
    good = target.read_bytes()
    for content in (b"", good[:-9], good + b"x", struct.pack("<Q", 2**60) + good[8:], pickle.dumps({"a": 1})):
        target.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            load(folder)


def test_f17_nan_is_a_warning_or_an_error(copy: Callable[..., Path]) -> None:
    folder = copy("A")

    def spoil(state: dict) -> dict:
        state["norm.weight"] = state["norm.weight"].clone()
        state["norm.weight"][2] = float("nan")
        return state

    _rewrite(folder, spoil)
    with pytest.warns(checkpoints_warning(), match=r"NaN or infinity in 1 tensor \(decoder\.norm\.weight\)"):
        load(folder)
    with pytest.raises(CheckpointError, match=r"decoder\.norm\.weight"):
        load(folder, check_finite=True)


def checkpoints_warning() -> type[Warning]:
    from perception.checkpoint import CheckpointWarning

    return CheckpointWarning


def test_folders_that_are_no_model_say_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        open_folder(tmp_path / "gone")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"neither config\.json nor params\.json: it holds notes\.txt"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ConfigError, match="model_type 'bert'"):
        open_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "perception", "version": 1}')
    with pytest.raises(ConfigError, match="holds a 'perception' model; expected 'perception-lm'"):
        open_folder(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(ConfigError, match="not sound JSON"):
        open_folder(tmp_path)
    (tmp_path / "params.json").write_text('{"model": {}, "model": {}}')
    with pytest.raises(ConfigError, match="twice"):
        open_folder(tmp_path)
    (tmp_path / "params.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no consolidated\.pth"):
        open_folder(tmp_path)


# --- Our own folder --------------------------------------------------------------------------------------------------


@pytest.fixture
def native(tmp_path: Path, tokenizer: LlamaTokenizer) -> Path:
    config = tiny_config()
    save(tiny_model(config), tmp_path / "native", media=config.media, tokenizer=tokenizer)
    return tmp_path / "native"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=2), "version 2; this release reads 1"),
        (lambda d: d.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda d: d.pop("pixels"), r"missing keys \['pixels'\]"),
        (lambda d: d["pixels"].update(version=9), "version"),
        (lambda d: d.update(media_token=689), "expected an id below 689"),
        (lambda d: d.update(media_token="x"), "media_token is 'x'"),
        (lambda d: d.update(tokenizer="tokenizer.model"), "expected its 'file' and 'sha256'"),
        (lambda d: d["model"].update(depth=3), "unknown keys"),
        (lambda d: d["model"]["decoder"].update(depth=10**9), "expected 1 to 512"),
        (lambda d: d["model"]["vision"].update(patch_size=0), "patch_size"),
        (lambda d: d["model"]["projector"].update(width=41), "the decoder takes 40"),
        (lambda d: d["tokenizer"].update(file="../tokenizer.model"), "plain file name"),
        (lambda d: d["tokenizer"].update(file="gone.model"), "lost its tokenizer"),
        (lambda d: d["tokenizer"].update(sha256="0" * 64), "not the tokenizer this model was saved with"),
        (lambda d: d["weights"].update(fingerprint="0" * 64), "not the file config.json was saved with"),
    ],
)
def test_wrong_native_configs_are_refused(native: Path, change: Callable, match: str) -> None:
    load(native)
    edit(native / "config.json", change)
    with pytest.raises((ConfigError, CheckpointError), match=match):
        load(native)


def test_a_changed_tokenizer_is_refused(native: Path) -> None:
    (native / "tokenizer.model").write_bytes((native / "tokenizer.model").read_bytes() + b"\n")
    with pytest.raises(CheckpointError, match="sha256 differs"):
        load(native)


def test_saving_over_another_model_keeps_its_tokenizer_beside(native: Path, tokenizer: LlamaTokenizer) -> None:
    """The old model stays whole until the config says the new one, so the new tokenizer has a name of its own."""
    other = LlamaTokenizer.from_bytes(tokenizer.source.rstrip(b"\n") + b"\n\n")
    config = tiny_config()
    model = tiny_model(config, seed=1)
    save(model, native, media=config.media, tokenizer=other)
    _, _, path = load_model(native, device="cpu")
    assert path is not None
    assert path.read_bytes() == other.source
    assert (native / "tokenizer.model").read_bytes() == tokenizer.source
    save(model, native, media=config.media, tokenizer=tokenizer)
    assert load_model(native, device="cpu")[2] == native / "tokenizer.model"
    assert equal(load(native), model)
    save(model, native, media=config.media)
    assert load_model(native, device="cpu")[2] is None


def test_f29_a_killed_save_leaves_the_old_or_the_new_model(native: Path, golden: Path, tmp_path: Path) -> None:
    """Killed at 3 moments: every time the folder loads, as the one or the other, tokenizer and all."""
    code = """
        import sys
        sys.path.insert(0, "tests")
        from pathlib import Path
        from plm_tiny import tiny_config, tiny_model
        from perception_lm.checkpoints import save
        from perception_lm.tokenizer import LlamaTokenizer
        source = Path(sys.argv[2]).read_bytes()
        words = [LlamaTokenizer.from_bytes(source + b"\\n" * n) for n in range(2)]
        models = [tiny_model(tiny_config(), seed=n) for n in range(2)]
        print("ready", flush=True)
        for n in range(10**6):
            save(models[n % 2], sys.argv[1], media=tiny_config().media, tokenizer=words[n % 2])
    """
    config = tiny_config()
    both = [tiny_model(config, seed=n) for n in range(2)]
    arguments = [sys.executable, "-c", textwrap.dedent(code), str(native), str(golden / "plm" / "tokenizer.model")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    for wait in (0.01, 0.04, 0.09):
        child = subprocess.Popen(arguments, cwd=root, stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        model, _, path = load_model(native, device="cpu")
        n = next(n for n in range(2) if equal(model, both[n]))
        assert path is not None
        LlamaTokenizer.from_file(path)
    save(both[n], native, media=config.media)
    assert not [
        p.name for p in native.iterdir() if not re.match(r"(config.json|model.safetensors|tokenizer.*)$", p.name)
    ]


def test_only_models_of_our_parts_are_written(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(ConfigError, match="no format 'gguf'"):
        export(model, tmp_path / "x", "gguf")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="given Linear"):
        config_of(nn.Linear(2, 2))
    foreign_part = tiny_model()
    foreign_part.decoder = nn.Linear(2, 2)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="its decoder is a Linear"):
        export(foreign_part, tmp_path / "x", "hf")
    with pytest.raises(ConfigError, match="one way to make pixels"):
        export(model, tmp_path / "x", "hf", pixels=PixelSpec(size=24))
    shuffle = replace(tiny_config(), projector=ProjectorConfig(kind="pixel_shuffle", in_width=24, width=40))
    for layout in ("original", "hf"):
        with pytest.raises(ConfigError, match="pixel_shuffle"):
            export(tiny_model(shuffle), tmp_path / "x", layout)
    assert not (tmp_path / "x").exists()
    export(tiny_model(shuffle), tmp_path / "x", "native", pixels=PixelSpec(size=24))
    assert equal(load(tmp_path / "x"), tiny_model(shuffle))
    assert load(tmp_path / "x").encoder.preprocess == PixelSpec(size=24)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot"):
        export(model, tmp_path / "file" / "x", "hf")


# --- Llamas alone ----------------------------------------------------------------------------------------------------


def llama(tied: bool, **changes: object) -> tuple[DecoderConfig, Decoder]:
    config = tiny_config(tied=tied).decoder
    config = replace(config, head_dim=config.width // 5, heads=5, kv_heads=1, context=131_072, **changes)
    torch.manual_seed(0)
    return config, Decoder(config)


def fill(found: Found) -> Decoder:
    assert isinstance(found.config, DecoderConfig)
    return load_into(lambda: Decoder(found.config), lambda names: found.state())[0]  # type: ignore[return-value,arg-type]


def meta_params(config: DecoderConfig, **more: object) -> dict:
    return {
        "dim": config.width,
        "n_layers": config.depth,
        "n_heads": config.heads,
        "n_kv_heads": config.kv_heads,
        "vocab_size": config.vocab,
        "ffn_dim_multiplier": 0.67,
        "multiple_of": 8,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        **more,
    }


@pytest.mark.parametrize("tied", [True, False])
def test_metas_llama_folder_loads(tmp_path: Path, golden: Path, tied: bool) -> None:
    """Meta's file always holds the output matrix; equal to the embedding it is a tied model."""
    config, decoder = llama(tied)
    state = dict(checkpoints.convert(decoder.state_dict(), checkpoints.meta_llama(config), back=True))
    state |= {"output.weight": state.get("output.weight", state["tok_embeddings.weight"]), "rope.freqs": torch.ones(4)}
    torch.save(state, tmp_path / "consolidated.00.pth")
    shutil.copy(golden / "plm" / "tokenizer.model", tmp_path)
    params = meta_params(config, use_scaled_rope=True, rope_scale_factor=32, high_freq_factor=4)
    (tmp_path / "params.json").write_text(json.dumps(params))
    found = open_folder(tmp_path)
    assert found.config == config
    assert (found.layout, found.tokenizer) == ("meta llama", tmp_path / "tokenizer.model")
    assert equal(fill(found), decoder)


@pytest.mark.parametrize(
    ("size", "factor"), [((2048, 16), 32.0), ((3072, 28), 32.0), ((4096, 32), 8.0), ((8192, 80), 8.0)]
)
def test_metas_params_do_not_say_how_the_rope_is_scaled(size: tuple[int, int], factor: float) -> None:
    params = {"dim": size[0], "n_layers": size[1], "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256}
    params |= {"multiple_of": 256, "use_scaled_rope": True, "rope_theta": 500000.0}
    assert foreign.read_meta_llama(params, True).rope_scaling == replace(SCALING, factor=factor)
    assert foreign.read_meta_llama({**params, "rope_scaling_factor": 16}, True).rope_scaling == replace(
        SCALING, factor=16.0
    )
    assert foreign.read_meta_llama({**params, "use_scaled_rope": False}, True).rope_scaling is None
    with pytest.raises(ConfigError, match="no published Llama; add 'rope_scale_factor'"):
        foreign.read_meta_llama({**params, "n_layers": 5}, True)
    with pytest.raises(ConfigError, match="before 3"):
        foreign.read_meta_llama({**params, "vocab_size": -1}, True) if size[0] < 0 else foreign.read_meta_llama(
            {key: value for key, value in params.items() if key != "vocab_size"}, True
        )


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_faces_llama_folder_loads(tmp_path: Path, tied: bool) -> None:
    config, decoder = llama(tied)
    state = checkpoints.convert(decoder.state_dict(), checkpoints.hugging_face_llama(config), back=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    described = foreign.write_hugging_face_llama(config, dtype="float32")
    (tmp_path / "config.json").write_text(json.dumps(described))
    found = open_folder(tmp_path)
    assert found.config == config
    assert equal(fill(found), decoder)


def test_a_llama_alone_is_no_vision_language_model(tmp_path: Path) -> None:
    config, decoder = llama(False)
    state = checkpoints.convert(decoder.state_dict(), checkpoints.hugging_face_llama(config), back=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(foreign.write_hugging_face_llama(config, dtype="float32")))
    with pytest.raises(ConfigError, match=r"a Llama alone, which cannot see.*compose"):
        load_model(tmp_path)


# --- Memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["original", "hf"])
def test_a_load_takes_the_weights_once(tmp_path: Path, layout: str) -> None:
    """A model of 200 MB in bfloat16, loaded as such: at most 1.15 times that, and not the 2 of a state dict beside."""
    config = tiny_config(tied=False, width=1024, heads=8, kv_heads=8, head_dim=128, mlp_width=4096, depth=6)
    with torch.device("meta"):  # initial values would take longer than all the rest
        model = checkpoints.builder(config, 435).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    size = sum(p.nbytes for p in model.parameters())
    assert size > 180e6
    export(model, tmp_path / "m", layout, media=config.media)
    code = f"""
        import os
        from perception_lm.zoo import load_model
        def memory(kind):
            return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(kind))
        load_model("tests/golden/plm/A/{"hf" if layout == "hf" else "original"}", device="cpu")  # what comes with it
        before = memory("VmRSS")
        model, _, _ = load_model({str(tmp_path / "m")!r}, device="cpu", dtype="stored")
        print(memory("VmHWM") - before)
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    assert int(done.stdout) < 1.15 * size
