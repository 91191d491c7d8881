"""Every layout loads to the same tensors, writes back to the same bits, and refuses what is not it."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perception.checkpoint import CheckpointWarning, convert, open_checkpoint
from perception.errors import CheckpointError, ConfigError
from perception_encoder import checkpoints
from perception_encoder.checkpoints import (
    LAYOUTS,
    NATIVE,
    OPEN_CLIP_CLIP,
    REFERENCE_CLIP,
    REFERENCE_TOWER,
    TIMM_TOWER,
    export,
    infer_config,
    recognize,
    save,
)
from perception_encoder.clip import CLIP
from perception_encoder.config import ClipConfig, TextConfig, VisionConfig
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import MODELS, load_clip, load_encoder

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_models import TOWERS, clip_config, tower_config

CLIP_FILES = ["clip.pt", "clip_open_clip.safetensors"]
CPU = {"device": "cpu"}


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def tower_file(golden: Path, name: str) -> Path:
    return golden / "pe" / f"{name}.weights.safetensors"


def tower(golden: Path, name: str) -> VisionTransformer:
    return load_encoder(tower_file(golden, name), config=tower_config(golden, name), **CPU)


@pytest.fixture
def clip(golden: Path) -> CLIP:
    return load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), **CPU)


# --- The same tensors ----------------------------------------------------------------------------------------------


def test_both_clip_layouts_load_to_the_same_model(golden: Path) -> None:
    reference, open_clip = (load_clip(golden / "clip" / name, config=clip_config(golden), **CPU) for name in CLIP_FILES)
    assert same(reference, open_clip)


@pytest.mark.parametrize("name", [*CLIP_FILES, "clip_timm_vision.safetensors"])
def test_a_clip_file_loads_into_its_vision_tower(golden: Path, clip: CLIP, name: str) -> None:
    found = load_encoder(golden / "clip" / name, config=clip_config(golden).vision, **CPU)
    assert same(found, clip.vision)


def test_vision_tensors_come_from_vision_keys(golden: Path, clip: CLIP) -> None:
    """Text and vision share key names and, in L, shapes: what lands where is checked against the file itself."""
    theirs = torch.load(golden / "clip" / "clip.pt", weights_only=True)
    pairs = {
        "vision.pos_embed": "visual.positional_embedding",
        "text.pos_embed": "positional_embedding",
        "vision.blocks.1.attn.qkv.weight": "visual.transformer.resblocks.1.attn.in_proj_weight",
        "text.blocks.1.attn.qkv.weight": "transformer.resblocks.1.attn.in_proj_weight",
        "vision.pool.qkv.bias": "visual.attn_pool.attn.in_proj_bias",
    }
    ours = clip.state_dict()
    for mine, other in pairs.items():
        assert torch.equal(ours[mine], theirs[other].float()), mine
    assert torch.equal(ours["vision.project.weight"], theirs["visual.proj"].float().T)
    assert torch.equal(ours["text.project.weight"], theirs["text_projection"].float().T)


def test_a_wrapped_file_loads_like_the_plain_one(golden: Path) -> None:
    config = tower_config(golden, "spatial_cls_nols")
    wrapped = load_encoder(golden / "pe" / "spatial_cls_nols.wrapped.pt", config=config, **CPU)
    plain = tower(golden, "spatial_cls_nols").bfloat16().float()
    assert same(wrapped, plain)


def test_transformers_prefix(golden: Path, tmp_path: Path, clip: CLIP) -> None:
    theirs = load_file(golden / "clip" / "clip_timm_vision.safetensors")
    save_file({f"timm_model.{key}": tensor for key, tensor in theirs.items()}, tmp_path / "w.safetensors")
    assert same(load_encoder(tmp_path / "w.safetensors", config=clip_config(golden).vision, **CPU), clip.vision)


# --- The same bits back --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("table", [REFERENCE_TOWER, TIMM_TOWER, NATIVE])
def test_towers_round_trip_bit_exact(golden: Path, name: str, table: tuple) -> None:
    ours = dict(convert(open_checkpoint(tower_file(golden, name)), REFERENCE_TOWER))
    theirs = dict(convert(ours, table, back=True))
    again = convert(theirs, table)
    assert set(again) == set(ours)
    assert all(torch.equal(again[key], ours[key]) for key in ours)
    if table is REFERENCE_TOWER:
        file = load_file(tower_file(golden, name))
        assert set(theirs) == set(file)
        assert all(torch.equal(theirs[key], file[key]) for key in file)


@pytest.mark.parametrize(("name", "table"), list(zip(CLIP_FILES, [REFERENCE_CLIP, OPEN_CLIP_CLIP], strict=True)))
def test_clip_files_round_trip_bit_exact(golden: Path, name: str, table: tuple) -> None:
    file = dict(open_checkpoint(golden / "clip" / name))
    back = convert(convert(file, table), table, back=True)
    assert set(back) == set(file)
    assert all(torch.equal(back[key], file[key]) for key in file)


def test_the_two_clip_tables_agree(golden: Path) -> None:
    files = [open_checkpoint(golden / "clip" / name) for name in CLIP_FILES]
    ours = [dict(convert(file, table)) for file, table in zip(files, [REFERENCE_CLIP, OPEN_CLIP_CLIP], strict=True)]
    assert ours[0].keys() == ours[1].keys()
    assert all(torch.equal(ours[0][key], ours[1][key]) for key in ours[0])


def test_a_head_bias_that_is_not_zero_is_refused(golden: Path, tmp_path: Path) -> None:
    state = load_file(golden / "clip" / "clip_timm_vision.safetensors")
    assert not state["head.bias"].any()
    state["head.bias"][3] = 1e-3
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"head\.bias is not zero"):
        load_encoder(tmp_path / "w.safetensors", config=clip_config(golden).vision, **CPU)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize(("layout", "file"), [("reference", "w.pt"), ("timm", "w.safetensors"), ("native", "folder")])
def test_exported_towers_load_again(golden: Path, tmp_path: Path, name: str, layout: str, file: str) -> None:
    model = tower(golden, name)
    export(model, tmp_path / file, layout)
    config = None if layout == "native" else model.config
    assert same(load_encoder(tmp_path / file, config=config, **CPU), model)


@pytest.mark.parametrize(("layout", "file"), [("reference", "w.pt"), ("open_clip", "w.safetensors"), ("native", "f")])
def test_exported_clip_models_load_again(golden: Path, tmp_path: Path, clip: CLIP, layout: str, file: str) -> None:
    export(clip, tmp_path / file, layout)
    config = None if layout == "native" else clip.config
    assert same(load_clip(tmp_path / file, config=config, **CPU), clip)
    assert same(load_encoder(tmp_path / file, config=config, **CPU), clip.vision)


def test_an_exported_reference_file_is_the_published_one(golden: Path, tmp_path: Path) -> None:
    model = load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu", dtype="float16")
    export(model, tmp_path / "w.pt", "reference")
    ours = torch.load(tmp_path / "w.pt", weights_only=True)
    theirs = torch.load(golden / "clip" / "clip.pt", weights_only=True)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert all(tensor.is_contiguous() for tensor in ours.values())
    assert (tmp_path / "w.pt").stat().st_size < 1.1 * (golden / "clip" / "clip.pt").stat().st_size


def test_exports_a_model_does_not_have(golden: Path, tmp_path: Path, clip: CLIP) -> None:
    cases: list[tuple[nn.Module, str, str, str]] = [
        (clip, "w.safetensors", "timm", r"clip\.vision"),
        (clip.vision, "w.safetensors", "open_clip", "both towers"),
        (clip, "w.safetensors", "reference", r"\.pt file"),
        (clip, "w.pt", "onnx", "no layout 'onnx'"),
        (clip, "folder", "open_clip", "this size has none"),
        (nn.Linear(2, 2), "w.pt", "reference", "given Linear"),
    ]
    for model, file, layout, words in cases:
        with pytest.raises(ConfigError, match=words):
            export(model, tmp_path / file, layout)
    assert not list(tmp_path.iterdir())


# --- The peers read what we write ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOWERS)
def test_timm_loads_an_exported_folder(golden: Path, tmp_path: Path, name: str) -> None:
    timm = pytest.importorskip("timm")
    ours = tower(golden, name)
    export(ours, tmp_path, "timm")
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    pixels = torch.randn(2, 3, ours.config.image_size, ours.config.image_size)
    with torch.inference_mode():
        tokens = theirs.forward_features(pixels)
        mine = ours.intermediates(pixels, [-1], norm=True)[0].tokens()
        torch.testing.assert_close(tokens, mine, rtol=1e-4, atol=1e-5)
        if ours.config.pool:
            torch.testing.assert_close(theirs(pixels), ours.pooled(pixels), rtol=1e-4, atol=1e-5)
    spec = timm.data.resolve_model_data_config(theirs)
    assert (spec["crop_mode"], spec["interpolation"], spec["crop_pct"]) == ("squash", "bilinear", 1.0)
    assert tuple(spec["mean"]) == tuple(spec["std"]) == (0.5, 0.5, 0.5)


@pytest.mark.slow  # 70 million parameters, the smallest open_clip can build
def test_open_clip_loads_an_exported_folder(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    entry = MODELS.get("PE-Core-T16-384")
    assert entry.text is not None
    ours = CLIP(VisionTransformer(entry.vision), TextTransformer(entry.text)).eval()
    export(ours, tmp_path, "open_clip")
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    theirs.eval()
    pixels, tokens = torch.randn(1, 3, 384, 384), ours.tokenize(["a cat", "two dogs"])
    with torch.inference_mode():
        torch.testing.assert_close(theirs.encode_image(pixels), ours.encode_image(pixels), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs.encode_text(tokens), ours.encode_text(tokens), rtol=1e-4, atol=1e-5)
    assert "size=(384, 384), interpolation=bilinear" in str(preprocess)
    assert "mean=[0.5, 0.5, 0.5]" in str(preprocess)


# --- Refusals ------------------------------------------------------------------------------------------------------


def broken(state: dict[str, Tensor], change: Callable[[dict], object]) -> dict[str, Tensor]:
    state = dict(state)
    change(state)
    return state


def test_f19_a_strange_key_is_named_with_the_nearest_layout(golden: Path, tmp_path: Path) -> None:
    state = load_file(tower_file(golden, "core_cls"))
    state.pop("ln_post.weight")
    state.update({f"other.{i}": torch.zeros(1) for i in range(7)})
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as error:
        load_encoder(tmp_path / "w.safetensors", config=tower_config(golden, "core_cls"), **CPU)
    message = str(error.value)
    assert str(tmp_path / "w.safetensors") in message
    assert "The nearest is 'reference'" in message
    assert "1 parameters are missing (norm_post.weight)" in message
    assert "7 keys are not known (other.0, other.1, other.2, other.3, other.4, ...)" in message


@pytest.mark.parametrize("layout", [layout.name for layout in LAYOUTS["tower"]])
def test_one_missing_or_extra_key_breaks_every_layout(clip: CLIP, layout: str) -> None:
    table = next(entry.table for entry in LAYOUTS["tower"] if entry.name == layout)
    ours = clip.vision.state_dict()
    whole = dict(convert(ours, table, back=True))
    assert set(recognize(whole, "tower", list(ours))) == set(ours)
    some = sorted(whole)[len(whole) // 2]
    for state in ({**whole, "strange": torch.zeros(1)}, {key: t for key, t in whole.items() if key != some}):
        with pytest.raises(CheckpointError, match="matches no layout"):
            recognize(state, "tower", list(ours))


def test_layouts_that_all_match_are_refused(clip: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checkpoints.LAYOUTS, "tower", (*LAYOUTS["tower"], LAYOUTS["tower"][0]))
    state = clip.vision.state_dict()
    with pytest.raises(CheckpointError, match="ambiguous"):
        recognize(state, "tower", list(state))


def test_a_tower_is_no_clip_model(golden: Path) -> None:
    with pytest.raises(CheckpointError, match="matches no layout of a CLIP model"):
        load_clip(golden / "clip" / "clip_timm_vision.safetensors", config=clip_config(golden), **CPU)


@pytest.mark.parametrize("name", ["core_cls", "lang_cls_ls"])
def test_a_tower_of_another_family_is_refused(golden: Path, name: str) -> None:
    """Same width and depth; the reference implementation would load this and leave LayerScale or the pool random."""
    other = {"core_cls": "lang_cls_ls", "lang_cls_ls": "core_cls"}[name]
    with pytest.raises(CheckpointError, match="matches no layout"):
        load_encoder(tower_file(golden, name), config=tower_config(golden, other), **CPU)


def test_f20_right_names_and_wrong_shapes(golden: Path, tmp_path: Path) -> None:
    config = clip_config(golden)
    text = TextConfig(context=32, width=16, depth=2, heads=2, output_width=12)
    with pytest.raises(CheckpointError, match=r"text\.token_embed\.weight is \(49408, 8\), expected \(49408, 16\)"):
        load_clip(golden / "clip" / "clip.pt", config=ClipConfig(vision=config.vision, text=text), **CPU)


def test_f21_a_partial_file(golden: Path, tmp_path: Path) -> None:
    state = load_file(tower_file(golden, "core_cls"))
    del state["ln_post.weight"], state["ln_post.bias"]
    state["other"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.warns(CheckpointWarning, match=r"missing 2 parameters \(norm_post\.weight, norm_post\.b") as caught:
        model = load_encoder(tmp_path / "w.safetensors", config=tower_config(golden, "core_cls"), strict=False, **CPU)
    assert caught[0].message.report.unexpected == ["other"]
    assert torch.equal(model.norm_post.weight, torch.ones(32))
    assert torch.equal(model.pos_embed, state["positional_embedding"])


@pytest.mark.parametrize("shape", [(32,), (1, 32), (2, 1, 32)])
def test_a_tensor_of_another_rank_is_refused(golden: Path, tmp_path: Path, clip: CLIP, shape: tuple) -> None:
    state = load_file(golden / "clip" / "clip_timm_vision.safetensors")
    state["pos_embed"] = torch.zeros(shape)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="pos_embed"):
        load_encoder(tmp_path / "w.safetensors", config=clip_config(golden).vision, **CPU)


# --- Configs from shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS.names())
@pytest.mark.parametrize("layout", range(3))
def test_configs_of_published_models_are_read_from_shapes(name: str, layout: int) -> None:
    entry = MODELS.get(name)
    with torch.device("meta"):
        vision = VisionTransformer(entry.vision)
        model = CLIP(vision, TextTransformer(entry.text)) if entry.text else vision
    kind = "clip" if entry.text else "tower"
    tables = [REFERENCE_CLIP, OPEN_CLIP_CLIP, NATIVE] if entry.text else [REFERENCE_TOWER, TIMM_TOWER, NATIVE]
    theirs = convert(model.state_dict(), tables[layout], back=True)
    assert infer_config(theirs, kind) == entry.config
    assert infer_config(theirs, "tower") == entry.vision


def test_a_width_that_was_never_published_needs_a_config(golden: Path) -> None:
    with pytest.raises(ConfigError, match=r"no published tower is 32 wide.*pass config="):
        load_encoder(tower_file(golden, "core_cls"), **CPU)


def test_a_file_of_no_layout_has_no_config(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="none of the layouts"):
        load_encoder(tmp_path / "w.safetensors", **CPU)
    save_file({"conv1.weight": torch.zeros(1024, 3, 14, 14)}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="no config can be read"):
        load_encoder(tmp_path / "w.safetensors", **CPU)


# --- Our own folder ------------------------------------------------------------------------------------------------


def test_a_saved_model_loads_with_all_that_belongs_to_it(tmp_path: Path, clip: CLIP) -> None:
    save(clip, tmp_path)
    again = load_clip(tmp_path, **CPU)
    assert same(again, clip)
    assert (again.config, again.preprocess) == (clip.config, clip.preprocess)
    assert torch.equal(again.tokenize(["a cat"]), clip.tokenize(["a cat"]))
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())
    data = json.loads((tmp_path / "config.json").read_text())
    assert {key: data[key] for key in ("format", "version", "kind", "tokenizer")} == {
        "format": "perception",
        "version": 1,
        "kind": "clip",
        "tokenizer": {"kind": "clip-bpe", "context": 32},
    }


def _set(path: str, value: object) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        *parents, leaf = path.split(".")
        for parent in parents:
            data = data[parent]
        data[leaf] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("surprise", 1), "unknown keys.*surprise"),
        (_set("vision.surprise", 1), "unknown keys.*surprise"),
        (_set("vision.depth", "two"), "depth"),
        (_set("vision.depth", 10**9), "depth is 1000000000"),
        (_set("text.depth", 10**9), "depth is 1000000000"),
        (_set("vision.patch_size", 0), "patch_size is 0"),
        (_set("vision.heads", 5), "does not divide into 5 heads"),
        (_set("version", 2), "version 2; this release reads 1"),
        (_set("format", "other"), "'format' is 'other'"),
        (_set("kind", "audio"), "'audio'"),
        (_set("pixels.version", 2), "version 2"),
        (_set("pixels.surprise", 1), "surprise"),
        (_set("tokenizer.context", 77), "context"),
        (_set("tokenizer.kind", "bert"), "clip-bpe"),
        (lambda data: data.pop("pixels"), "missing keys.*pixels"),
        (lambda data: data.pop("text"), "missing keys.*text"),
        (_set("text.output_width", 13), "13"),
    ],
)
@pytest.mark.parametrize("load", [load_clip, load_encoder])
def test_f25_f26_a_config_that_cannot_be(
    tmp_path: Path, clip: CLIP, change: Callable, words: str, load: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(clip, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    change(data)
    (tmp_path / "config.json").write_text(json.dumps(data))

    def no_tensor(*_: object, **__: object) -> None:
        raise AssertionError("something was allocated or opened")

    monkeypatch.setattr("perception_encoder.zoo.load_into", no_tensor)
    monkeypatch.setattr("perception_encoder.zoo.read_folder", no_tensor)
    with pytest.raises(ConfigError, match=words):
        load(tmp_path, **CPU)


def test_f25_a_hostile_config_costs_no_time_and_no_memory(tmp_path: Path, clip: CLIP) -> None:
    import time
    import tracemalloc

    save(clip, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["vision"]["depth"] = 10**9
    (tmp_path / "config.json").write_text(json.dumps(data))
    tracemalloc.start()
    began = time.process_time()
    with pytest.raises(ConfigError):
        load_clip(tmp_path, **CPU)
    taken, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert taken < 0.1
    assert peak < 50 * 2**20


def test_folders_and_configs_that_do_not_go_together(golden: Path, tmp_path: Path, clip: CLIP) -> None:
    save(clip.vision, tmp_path)
    with pytest.raises(ConfigError, match="no text tower; use load_encoder"):
        load_clip(tmp_path, **CPU)
    with pytest.raises(ConfigError, match="has its own config"):
        load_encoder(tmp_path, config=clip.vision.config, **CPU)
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        load_encoder(golden / "clip" / "..", **CPU)
    with pytest.raises(ConfigError, match="a ClipConfig is needed"):
        load_clip(golden / "clip" / "clip.pt", config=clip.vision.config, **CPU)
    with pytest.raises(ConfigError, match="given Linear"):
        save(nn.Linear(2, 2), tmp_path)


def test_the_vision_config_of_a_saved_tower(tmp_path: Path) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "width": 8, "depth": 1, "heads": 1, "mlp_width": 12}
    config = VisionConfig(**sizes, layer_scale=0.5, pool=None)
    model = VisionTransformer(config).bfloat16()
    save(model, tmp_path)
    assert load_encoder(tmp_path, **CPU).config == config
    assert load_encoder(tmp_path, device="cpu", dtype="bfloat16").pos_embed.dtype == torch.bfloat16
    assert load_encoder(tmp_path, **CPU).pos_embed.dtype == torch.float32
