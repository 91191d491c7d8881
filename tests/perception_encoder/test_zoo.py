"""Names, what they bind, and where each of them leads."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from perception.errors import CheckpointError, ConfigError, UnknownName
from perception_encoder import interop, zoo
from perception_encoder.checkpoints import FolderConfig, export, save
from perception_encoder.clip import CLIP
from perception_encoder.config import ClipConfig, TextConfig, VisionConfig
from perception_encoder.inspection import kind_of
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import MODELS, describe, list_models, load_clip, load_encoder, timm_name

# Exact counts and numbers of tensors of the published models: vision, all, tensors of the vision tower, of all.
COUNTS = {
    "PE-Core-T16-384": (6_140_544, 69_545_601, 163, 313),
    "PE-Core-S16-384": (23_782_656, 87_187_713, 163, 313),
    "PE-Core-B16-224": (93_672_960, 447_659_521, 163, 457),
    "PE-Core-L14-336": (317_151_232, 671_137_793, 307, 601),
    "PE-Core-G14-448": (1_882_032_640, 2_419_266_561, 618, 912),
    "PE-Lang-L14-448": (291_415_040, 291_415_040, 327, 327),
    "PE-Lang-L14-448-Tiling": (291_415_040, 291_415_040, 327, 327),
    "PE-Lang-G14-448": (1_740_922_624, 1_740_922_624, 662, 662),
    "PE-Lang-G14-448-Tiling": (1_740_922_624, 1_740_922_624, 662, 662),
    "PE-Spatial-T16-512": (5_683_200, 5_683_200, 149, 149),
    "PE-Spatial-S16-512": (21_983_232, 21_983_232, 149, 149),
    "PE-Spatial-B16-512": (86_433_792, 86_433_792, 149, 149),
    "PE-Spatial-L14-448": (303_964_160, 303_964_160, 293, 293),
    "PE-Spatial-G14-448": (1_851_887_104, 1_851_887_104, 704, 704),
}


def on_meta(name: str) -> tuple[VisionTransformer, torch.nn.Module]:
    entry = MODELS.get(name)
    with torch.device("meta"):
        vision = VisionTransformer(entry.vision)
        return vision, CLIP(vision, TextTransformer(entry.text)) if entry.text else vision


@pytest.mark.parametrize("name", COUNTS)
def test_sizes_are_the_published_ones(name: str) -> None:
    vision, model = on_meta(name)
    counted = [sum(p.numel() for p in module.parameters()) for module in (vision, model)]
    counted += [len(module.state_dict()) for module in (vision, model)]
    assert tuple(counted) == COUNTS[name]
    assert MODELS.get(name).parameters == counted[1]


def test_every_published_model_is_named() -> None:
    assert set(MODELS.names()) == set(COUNTS)
    assert list_models("PE-*-?1[46]-[0-9][0-9][0-9]*") == sorted(COUNTS)


@pytest.mark.parametrize(
    ("name", "context", "text_width", "image_size", "patch"),
    [
        ("PE-Core-T16-384", 32, 512, 384, 16),
        ("PE-Core-S16-384", 32, 512, 384, 16),
        ("PE-Core-B16-224", 32, 1024, 224, 16),
        ("PE-Core-L14-336", 32, 1024, 336, 14),
        ("PE-Core-G14-448", 72, 1280, 448, 14),
    ],
)
def test_what_travels_with_a_clip_model(name: str, context: int, text_width: int, image_size: int, patch: int) -> None:
    found = describe(name)
    assert (found["context"], found["text"]["width"], found["pixels"]["size"]) == (context, text_width, image_size)
    assert found["pixels"]["resize"] == "squash"
    assert found["pixels"]["interpolation"] == "bilinear"
    assert found["vision"]["patch_size"] == patch
    assert found["licence"] == "Apache-2.0"
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*spatial-?16*", ["PE-Spatial-B16-512", "PE-Spatial-S16-512", "PE-Spatial-T16-512"]),
        ("PE-LANG-l*", ["PE-Lang-L14-448", "PE-Lang-L14-448-Tiling"]),
        ("pe-core-b16-224", ["PE-Core-B16-224"]),
        ("none", []),
    ],
)
def test_patterns(pattern: str, expected: list[str]) -> None:
    assert list_models(pattern) == expected


IDS = {
    "facebook/PE-Core-L14-336": ("PE-Core-L14-336", "reference", "clip"),
    "hf://facebook/PE-Lang-G14-448-Tiling": ("PE-Lang-G14-448-Tiling", "reference", "tower"),
    "timm/vit_pe_core_base_patch16_224.fb": ("PE-Core-B16-224", "timm", "tower"),
    "timm/vit_pe_lang_large_patch14_448.fb_tiling": ("PE-Lang-L14-448-Tiling", "timm", "tower"),
    "timm/vit_pe_spatial_tiny_patch16_512.fb": ("PE-Spatial-T16-512", "timm", "tower"),
    "timm/PE-Core-bigG-14-448": ("PE-Core-G14-448", "open_clip", "clip"),
    "timm/PE-Core-B-16": ("PE-Core-B16-224", "open_clip", "clip"),
}


@pytest.mark.parametrize("hub_id", IDS)
def test_published_ids_are_names(hub_id: str) -> None:
    name, _, weights = zoo._find(hub_id)
    assert (name, weights.layout, weights.kind) == IDS[hub_id]
    assert describe(hub_id)["name"] == name
    assert kind_of(hub_id) == IDS[hub_id][2]


def test_timm_has_every_architecture() -> None:
    timm = pytest.importorskip("timm")
    known = set(timm.list_models("vit_pe_*", pretrained=True))
    published = {weights.where for name in MODELS.names() for weights in MODELS.get(name).weights}
    assert {f"hf://timm/{name}" for name in known} == {where for where in published if "vit_pe_" in where}
    assert timm_name(MODELS.get("PE-Core-G14-448").vision) == "vit_pe_core_gigantic_patch14_448"
    assert timm_name(MODELS.get("PE-Lang-G14-448").vision) is None


def test_a_name_that_is_not_there() -> None:
    for call in (load_clip, load_encoder, describe):
        with pytest.raises(LookupError, match="did you mean 'PE-Core-L14-336'"):
            call("PE-Core-L16-336")
    with pytest.raises(LookupError):
        load_encoder("pe-core-l14-336-typo")
    for call in (load_clip, load_encoder, describe, zoo.download):
        with pytest.raises(UnknownName, match="did you mean 'PE-Core-nano'"):
            call("PE-Core-nan")


def test_a_name_of_the_other_package() -> None:
    for call in (load_clip, load_encoder):
        for name in ("PLM-nano", "Perception-LM-1B"):
            with pytest.raises(UnknownName, match=f"'{name}' is a language model; perception_lm"):
                call(name)
    assert zoo.download("PLM-nano").name == "PLM-nano"


# --- From a name to a model, without a network ---------------------------------------------------------------------

SIZES = {"image_size": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "mlp_width": 32}
TINY = ClipConfig(
    vision=VisionConfig(**SIZES, pool_heads=2, output_width=8),
    text=TextConfig(context=8, width=16, depth=1, heads=2, output_width=8),
)


@pytest.fixture
def tiny() -> CLIP:
    torch.manual_seed(0)
    return CLIP(VisionTransformer(TINY.vision), TextTransformer(TINY.text))


@pytest.fixture
def fake_hub(tmp_path: Path, tiny: CLIP, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """An entry of a tiny model, published in three layouts, in place of PE-Core-B16-224; returns what was asked for."""
    entry = MODELS.get("PE-Core-B16-224")
    monkeypatch.setitem(
        MODELS._things,
        "PE-Core-B16-224",
        zoo.Entry(config=TINY, pixels=tiny.preprocess, weights=entry.weights, parameters=1),
    )
    export(tiny, tmp_path / "PE-Core-B16-224.pt", "reference")
    export(tiny.vision, tmp_path / "model.safetensors", "timm")
    export(tiny, tmp_path / "open_clip_model.safetensors", "open_clip")
    asked = []

    def locate(where: object, *, filename: tuple[str, ...] = (), **options: object) -> Path:
        asked.append((where, filename, options))
        return tmp_path / filename[0]

    monkeypatch.setattr(zoo, "locate", locate)
    return asked


@pytest.mark.parametrize(
    ("name", "where", "files"),
    [
        ("PE-Core-B16-224", "hf://facebook/PE-Core-B16-224", ("PE-Core-B16-224.pt",)),
        ("facebook/PE-Core-B16-224", "hf://facebook/PE-Core-B16-224", ("PE-Core-B16-224.pt",)),
        (
            "timm/PE-Core-B-16",
            "hf://timm/PE-Core-B-16",
            ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
        ),
        (
            "timm/vit_pe_core_base_patch16_224.fb",
            "hf://timm/vit_pe_core_base_patch16_224.fb",
            ("model.safetensors", "pytorch_model.bin"),
        ),
    ],
)
def test_a_name_loads_its_weights(fake_hub: list, tiny: CLIP, name: str, where: str, files: tuple) -> None:
    tower = load_encoder(name, device="cpu", revision="v1", offline=True)
    assert fake_hub == [(where, files, {"revision": "v1", "offline": True})]
    assert not tower.training
    wanted = tiny.vision.state_dict()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in tower.state_dict().items())
    if "vit_pe" in name:
        with pytest.raises(ConfigError, match="no text tower; use load_encoder"):
            load_clip(name, device="cpu")
    else:
        clip = load_clip(name, device="cpu", dtype="bfloat16")
        assert clip.text.pos_embed.dtype == torch.bfloat16
        assert clip.preprocess == tiny.preprocess


def test_a_name_keeps_its_own_config(fake_hub: list) -> None:
    other = ClipConfig(vision=TINY.vision, text=replace(TINY.text, heads=4))
    with pytest.raises(ConfigError, match="has its own config"):
        load_clip("PE-Core-B16-224", config=other)
    assert load_clip("PE-Core-B16-224", config=TINY, device="cpu").config == TINY
    assert not fake_hub[1:]


def test_f05_offline_and_not_cached(tmp_path: Path) -> None:
    code = """
import socket, sys
def refuse(*a, **k):
    print("NETWORK"); sys.exit()
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import perception_encoder.zoo as zoo
encoder, clip = zoo.load_encoder, zoo.load_clip
for load, name in ((clip, "PE-Core-T16-384"), (encoder, "PE-Spatial-T16-512"), (encoder, "o/n")):
    try:
        load(name, device="cpu")
    except Exception as error:
        print(type(error).__name__, error)
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    lines = out.splitlines()
    assert len(lines) == 3
    for line, name in zip(lines, ("facebook/PE-Core-T16-384", "facebook/PE-Spatial-T16-512", "o/n"), strict=True):
        assert line.startswith(f"CheckpointError {name}")
        assert str(tmp_path / "hub") in line
        assert f"perception download {name}" in line


@pytest.mark.parametrize("load", [load_clip, load_encoder])
@pytest.mark.parametrize("name", ["../../etc", "a/b/c", "a\0b", "x" * 300, "o/" + "n" * 300])
def test_f27_bad_references(load: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(ConfigError):
        load(name)


def test_f07_a_device_that_is_not_here(tiny: CLIP, tmp_path: Path) -> None:
    save(tiny, tmp_path)
    with pytest.raises(ConfigError, match="devices here"):
        load_clip(tmp_path, device="cuda:77")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_loads_to_a_gpu_in_the_stored_dtype(tiny: CLIP, tmp_path: Path) -> None:
    save(tiny.bfloat16(), tmp_path)
    clip = load_clip(tmp_path)
    assert clip.device.type == "cuda"
    assert {p.dtype for p in clip.parameters()} == {torch.bfloat16}
    assert load_clip(tmp_path, dtype="float16").dtype == torch.float16


# --- Encoders that are not ours ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm/vit_pe_core_base_patch16_224", ("load_timm", ("vit_pe_core_base_patch16_224",))),
        ("timm/vit_tiny_patch16_224.augreg_in21k", ("load_timm", ("vit_tiny_patch16_224.augreg_in21k",))),
        ("open_clip/ViT-B-32:openai", ("load_open_clip", ("ViT-B-32:openai",))),
        ("open_clip/local-dir:folder", ("load_open_clip", ("local-dir:folder",))),
    ],
)
def test_foreign_names_go_to_their_library(name: str, expected: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    for function in ("load_timm", "load_open_clip"):
        monkeypatch.setattr(interop, function, lambda *args, _f=function, **options: (_f, args, options))
    called, args, options = load_encoder(name, device="cpu", dtype="float32")
    assert (called, args) == expected
    assert options == {"device": "cpu", "dtype": "float32"}


def test_foreign_clip_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interop, "load_open_clip_pair", lambda *args, **options: args)
    assert load_clip("open_clip/ViT-B-32:openai") == ("ViT-B-32:openai",)
    with pytest.raises(ConfigError, match="no text tower"):
        load_clip("timm/vit_tiny_patch16_224")


def test_encoders_of_other_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("acme/small", "test_zoo_plugin:load", "perception.encoders")
    calls = []
    monkeypatch.setitem(sys.modules, "test_zoo_plugin", type(sys)("test_zoo_plugin"))
    sys.modules["test_zoo_plugin"].load = lambda **options: calls.append(options) or "an encoder"
    monkeypatch.setattr(zoo, "entry_points", lambda group: [point] if group == "perception.encoders" else [])
    assert load_encoder("acme/small", device="cpu") == "an encoder"
    assert calls == [{"device": "cpu", "dtype": "auto"}]
    assert list_models("acme*") == ["acme/small"]
    assert describe("acme/small")["provider"] == "test_zoo_plugin:load"


# --- The model in the package --------------------------------------------------------------------------------------


def test_a_packaged_model_is_a_name_when_its_folder_is_there(
    tmp_path: Path, tiny: CLIP, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zoo, "_WEIGHTS_FOLDER", tmp_path)
    assert list_models("*nano") == []
    with pytest.raises(LookupError):
        describe("PE-Core-nano")
    save(tiny, tmp_path / "PE-Core-nano")
    assert list_models("*nano") == ["PE-Core-nano"]
    assert describe("PE-Core-nano")["parameters"] == sum(p.numel() for p in tiny.parameters())
    assert FolderConfig.from_dict(json.loads((tmp_path / "PE-Core-nano" / "config.json").read_text())).model == TINY
    clip = load_clip("PE-Core-nano", device="cpu")
    assert torch.equal(clip.text.project.weight, tiny.text.project.weight)
    assert torch.equal(load_encoder("PE-Core-nano", device="cpu").pos_embed, tiny.vision.pos_embed)


def test_folders_in_the_working_folder(tmp_path: Path, tiny: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tiny, tmp_path / "mine")
    save(tiny, tmp_path / "owner" / "mine")
    assert load_clip("mine", device="cpu").config == TINY
    assert load_clip("owner/mine", device="cpu").config == TINY
    with pytest.raises(CheckpointError, match="no file or folder at other"):
        load_clip("./other")
