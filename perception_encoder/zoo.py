"""Every named model as data, and the two functions that load one.

A name binds what must travel together: the config, the weights in every layout they are published in, the pixels and
the tokens they expect.
"""

import glob
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from perception.checkpoint import CONFIG, Checkpoint, load_into, open_checkpoint, read_config, read_folder
from perception.device import pick_device, pick_dtype, shapes_only
from perception.errors import ConfigError, UnknownName
from perception.hub import locate
from perception.pixels import PixelSpec
from perception.registry import Registry, unknown
from perception_encoder.checkpoints import FolderConfig, Kind, export, infer_config, recognize, save
from perception_encoder.clip import CLIP
from perception_encoder.config import ClipConfig, TextConfig, VisionConfig
from perception_encoder.protocol import VisionEncoder
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer

__all__ = [
    "MODELS",
    "Entry",
    "Weights",
    "describe",
    "download",
    "export",
    "list_models",
    "load_clip",
    "load_encoder",
    "save",
]

PACKAGE = "package://"  # a folder inside the package whose catalogue says so
ENTRY_POINTS = "perception.encoders"
CATALOGUES = "perception.models"  # functions from a wildcard to descriptions as `describe` gives


@dataclass(frozen=True)
class Weights:
    """One place a model is published: `hf://owner/name`, the files it may be in, and which towers they hold."""

    layout: str
    where: str
    files: tuple[str, ...]
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What travels together under one name.

    weights     where they are published; the first is the one a name loads
    parameters  of the whole model
    """

    config: VisionConfig | ClipConfig
    pixels: PixelSpec
    weights: tuple[Weights, ...]
    parameters: int
    licence: str = "Apache-2.0"

    @property
    def vision(self) -> VisionConfig:
        return self.config.vision if isinstance(self.config, ClipConfig) else self.config

    @property
    def text(self) -> TextConfig | None:
        return self.config.text if isinstance(self.config, ClipConfig) else None


MODELS: Registry[Entry] = Registry("model")

# --- The published models: Bolya et al. 2025 (arXiv:2504.13181), and https://github.com/facebookresearch/perception_models

_T = VisionConfig(image_size=384, patch_size=16, width=192, depth=12, heads=3, mlp_width=768, output_width=512)
_S = replace(_T, width=384, heads=6, mlp_width=1536)
_B = replace(_T, image_size=224, width=768, heads=12, mlp_width=3072, output_width=1024)
_L = VisionConfig(image_size=336, patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096, output_width=1024)
_G = VisionConfig(
    image_size=448, patch_size=14, width=1536, depth=50, heads=16, mlp_width=8960, class_token=False, output_width=1280
)
_SMALL_TEXT = TextConfig(context=32, width=512, depth=12, heads=8, output_width=512)
_TEXT = TextConfig(context=32, width=1024, depth=24, heads=16, output_width=1024)
_LARGE_TEXT = TextConfig(context=72, width=1280, depth=24, heads=20, output_width=1280)


def _dense(core: VisionConfig, image_size: int, **changes: Any) -> VisionConfig:
    """A tower aligned to language or to space: PE-Core's without its last norm, its pool and its projection."""
    return replace(core, image_size=image_size, norm_post=False, pool=None, output_width=None, **changes)


_LANG_L = _dense(_L, 448, depth=23, layer_scale=0.1)
_LANG_G = _dense(_G, 448, depth=47, layer_scale=0.1)

# name, config, parameters, timm's name with its tag, open_clip's name
_PUBLISHED: tuple[tuple[str, VisionConfig | ClipConfig, int, str, str | None], ...] = (
    ("PE-Core-T16-384", ClipConfig(vision=_T, text=_SMALL_TEXT), 69_545_601, "core_tiny_patch16_384.fb", "T-16-384"),
    ("PE-Core-S16-384", ClipConfig(vision=_S, text=_SMALL_TEXT), 87_187_713, "core_small_patch16_384.fb", "S-16-384"),
    ("PE-Core-B16-224", ClipConfig(vision=_B, text=_TEXT), 447_659_521, "core_base_patch16_224.fb", "B-16"),
    ("PE-Core-L14-336", ClipConfig(vision=_L, text=_TEXT), 671_137_793, "core_large_patch14_336.fb", "L-14-336"),
    (
        "PE-Core-G14-448",
        ClipConfig(vision=_G, text=_LARGE_TEXT),
        2_419_266_561,
        "core_gigantic_patch14_448.fb",
        "bigG-14-448",
    ),
    ("PE-Lang-L14-448", _LANG_L, 291_415_040, "lang_large_patch14_448.fb", None),
    ("PE-Lang-L14-448-Tiling", _LANG_L, 291_415_040, "lang_large_patch14_448.fb_tiling", None),
    ("PE-Lang-G14-448", _LANG_G, 1_740_922_624, "lang_gigantic_patch14_448.fb", None),
    ("PE-Lang-G14-448-Tiling", _LANG_G, 1_740_922_624, "lang_gigantic_patch14_448.fb_tiling", None),
    ("PE-Spatial-T16-512", _dense(_T, 512), 5_683_200, "spatial_tiny_patch16_512.fb", None),
    ("PE-Spatial-S16-512", _dense(_S, 512), 21_983_232, "spatial_small_patch16_512.fb", None),
    ("PE-Spatial-B16-512", _dense(_B, 512), 86_433_792, "spatial_base_patch16_512.fb", None),
    ("PE-Spatial-L14-448", _dense(_L, 448), 303_964_160, "spatial_large_patch14_448.fb", None),
    ("PE-Spatial-G14-448", _dense(_G, 448, layer_scale=0.1), 1_851_887_104, "spatial_gigantic_patch14_448.fb", None),
)

for _name, _config, _parameters, _timm, _open_clip in _PUBLISHED:
    _kind: Kind = "clip" if isinstance(_config, ClipConfig) else "tower"
    _weights = [
        Weights("reference", f"hf://facebook/{_name}", (f"{_name}.pt",), _kind),
        Weights("timm", f"hf://timm/vit_pe_{_timm}", ("model.safetensors", "pytorch_model.bin"), "tower"),
    ]
    if _open_clip:
        _files = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        _weights.append(Weights("open_clip", f"hf://timm/PE-Core-{_open_clip}", _files, "clip"))
    _size = (_config.vision if isinstance(_config, ClipConfig) else _config).image_size
    MODELS.add(
        _name,
        Entry(config=_config, pixels=PixelSpec(size=_size), weights=tuple(_weights), parameters=_parameters),
    )

# The small model that comes with the package; its folder says what it is.
PACKAGED = ("PE-Core-nano",)
_WEIGHTS_FOLDER = Path(__file__).parent / "weights"


# --- Looking up ------------------------------------------------------------------------------------------------------


def list_models(pattern: str = "*") -> list[str]:
    """The names `load_clip` and `load_encoder` know that match a pattern: `list_models("*core*")`. Case is ignored.

    Published models, those that come with the package, and those that other distributions registered under the entry
    point group `perception.encoders`.
    """
    names = {*MODELS.names(), *_packaged(), *_registered()}
    return sorted(name for name in names if fnmatchcase(name.casefold(), pattern.casefold()))


def catalogue(pattern: str = "*") -> list[dict[str, Any]]:
    """`describe` of every name that matches."""
    return [describe(name) for name in list_models(pattern)]


def everything(pattern: str = "*") -> list[dict[str, Any]]:
    """`catalogue`, and what other packages add to it: the language models among them."""
    return [*catalogue(pattern), *(model for _, model in _added(pattern))]


def describe(name: str) -> dict[str, Any]:
    """What the zoo knows about a name or a published hub id, as plain values. Nothing is downloaded.

    Raises LookupError for names it does not know.
    """
    if name in _registered():
        return {"name": name, "kind": "tower", "provider": _registered()[name]}
    name, entry, weights = _find(name)
    return {
        "name": name,
        "kind": weights.kind,  # not the entry's: timm's ids of PE-Core hold the tower alone
        "parameters": entry.parameters,
        "vision": entry.vision.to_dict(),
        "text": entry.text.to_dict() if entry.text else None,
        "pixels": entry.pixels.to_dict(),
        "context": entry.text.context if entry.text else None,
        "licence": entry.licence,
        "weights": {w.layout: w.where.removeprefix("hf://") for w in entry.weights},
    }


def download(name: str, *, revision: str | None = None, offline: bool | None = None) -> Path:
    """Fetch the weights of a name or a hub id into the hub's cache, and say where they are. Errors as `load_clip`'s.

    The names are those of `everything`: a language model is fetched too.
    """
    if _is_published(name):
        return _locate_weights(_find(name)[2], revision, offline)
    try:
        return locate(name, revision=revision, offline=offline)
    except ConfigError:
        if not _is_word(name):
            raise
        if (found := _elsewhere(name)) is None:
            others = [model["name"] for model in everything()]
            raise (_unknown(name) if name in _registered() else unknown("model", name, others)) from None
        package, model = found
        where = next(iter(model["weights"].values()))
        if where.startswith(PACKAGE):
            return Path(str(files(package))) / where.removeprefix(PACKAGE)
        return locate(f"hf://{where}", revision=revision, offline=offline)


def timm_name(config: VisionConfig) -> str | None:
    """What timm calls the tower of a published PE-Core size, without its tag."""
    for name, known, _, timm, _ in _PUBLISHED:
        if isinstance(known, ClipConfig) and known.vision == config:
            assert name in MODELS
            return f"vit_pe_{timm.partition('.')[0]}"
    return None


def _packaged() -> dict[str, Path]:
    folders = {name: _WEIGHTS_FOLDER / name for name in PACKAGED}
    return {name: folder for name, folder in folders.items() if (folder / CONFIG).is_file()}


def _registered() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def is_known(name: str) -> bool:
    """Whether `describe` knows it."""
    return name in _registered() or _is_published(name)


def _is_word(name: object) -> bool:
    """Whether it is more likely meant as a name than as a path."""
    return re.fullmatch(r"[\w.-]{1,96}", str(name)) is not None


def _added(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """What other packages have that matches, each with the package."""
    for point in entry_points(group=CATALOGUES):
        for model in point.load()(pattern):
            yield point.module.partition(".")[0], model


def _elsewhere(name: str) -> tuple[str, dict[str, Any]] | None:
    """The model of another package by this name, with the package."""
    return next((found for found in _added(glob.escape(name)) if found[1]["name"] == name), None)


def other_kind(name: str) -> UnknownName | None:
    """The error for a name that another package has: what it holds is no encoder."""
    if not _is_word(name) or _elsewhere(name) is None:
        return None
    return UnknownName(
        f"{name!r} is a language model; perception_lm.load takes it, and `perception generate`, `chat` and `export`"
    )


def _unknown(name: str) -> UnknownName:
    if name in _registered():
        return UnknownName(
            f"{name!r} comes from {_registered()[name]!r}, another package: load_encoder takes it, but it is no CLIP "
            "model, and there are no weights to fetch"
        )
    return other_kind(name) or unknown("model", name, list_models())


def _find(name: str) -> tuple[str, Entry, Weights]:
    """The entry of a name or of a published hub id, and the weights it stands for."""
    if name in _packaged():
        folder = _packaged()[name]
        saved = FolderConfig.from_dict(read_config(folder), folder / CONFIG)
        parameters = _count(saved)
        weights = Weights("native", f"{PACKAGE}{_WEIGHTS_FOLDER.name}/{name}", (), saved.kind)
        return name, Entry(config=saved.model, pixels=saved.pixels, weights=(weights,), parameters=parameters), weights
    if (hub_id := name.removeprefix("hf://")) in (known := _hub_ids()):
        name, weights = known[hub_id]
        return name, MODELS.get(name), weights
    if name not in MODELS:
        raise _unknown(name)
    entry = MODELS.get(name)
    return name, entry, entry.weights[0]


def _hub_ids() -> dict[str, tuple[str, Weights]]:
    """The published hub ids, exactly as they are written there."""
    pairs = ((name, weights) for name in MODELS.names() for weights in MODELS.get(name).weights)
    return {weights.where.removeprefix("hf://"): (name, weights) for name, weights in pairs}


def _count(saved: FolderConfig) -> int:
    with shapes_only():
        return sum(parameter.numel() for parameter in _builder(saved)().parameters())


# --- Loading ---------------------------------------------------------------------------------------------------------


def load_clip(
    name_or_path: str | Path,
    *,
    config: ClipConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    strict: bool = True,
    check_finite: bool = False,
    offline: bool | None = None,
    pretrained: bool = True,
) -> CLIP:
    """A pretrained pair of towers, in evaluation mode.

    name_or_path  a name of `list_models()`; a published hub id (`facebook/PE-Core-L14-336`, `timm/PE-Core-L-14-336`);
                  a folder or hub id in our own format; a file in any layout; `open_clip/NAME:TAG`
    config        of a bare file. Without one it is read from the tensors' shapes, for published sizes
    device        "auto": the best one here
    dtype         "auto": float32 on a CPU, elsewhere what is stored
    strict        False: parameters a file lacks keep their random start, with a warning that carries the report
    check_finite  refuse NaN and infinity anywhere, instead of warning about those a quick look finds
    offline       True: no network. None: as HF_HUB_OFFLINE says
    pretrained    False: the architecture a name stands for with random weights; nothing is read or downloaded

    Raises LookupError for an unknown name, ConfigError for a config that cannot be, CheckpointError for weights that
    are missing, damaged or another model's.
    """
    if isinstance(name_or_path, str) and name_or_path.startswith("open_clip/"):
        from perception_encoder.interop import load_open_clip_pair

        name = name_or_path.removeprefix("open_clip/")
        return cast(CLIP, load_open_clip_pair(name, pretrained=pretrained, device=device, dtype=dtype))
    if isinstance(name_or_path, str) and name_or_path.startswith("timm/") and not _is_published(name_or_path):
        raise ConfigError(f"{name_or_path}: timm has no text tower; use load_encoder, or ./timm/... for a path")
    if not pretrained:
        return cast(CLIP, _untrained(str(name_or_path), "clip", device, dtype))
    found = _resolve(name_or_path, "clip", config, revision, offline)
    return cast(CLIP, _load(found, name_or_path, device, dtype, strict, check_finite))


def load_encoder(
    name_or_path: str | Path,
    *,
    config: VisionConfig | ClipConfig | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    strict: bool = True,
    check_finite: bool = False,
    offline: bool | None = None,
    pretrained: bool = True,
) -> VisionEncoder:
    """A pretrained vision tower, in evaluation mode. Of a CLIP model: its vision tower, with the pooling head.

    name_or_path  as in `load_clip`, and besides:
                  `timm/vit_pe_core_base_patch16_224.fb`, the exact published id with its tag, is our own tower;
                  every other `timm/NAME` is timm's model behind our protocol, and `open_clip/NAME:TAG` open_clip's
                  (a local folder of such a name is `./timm/NAME`);
                  a name that another distribution registered is called as `entry_point(device=, dtype=)`

    The other arguments and the errors are those of `load_clip`.
    """
    if isinstance(name_or_path, str) and (foreign := _foreign(name_or_path)):
        options = {} if pretrained else {"pretrained": False}
        return foreign(device=device, dtype=dtype, **options)
    if not pretrained:
        return cast(VisionEncoder, _untrained(str(name_or_path), "tower", device, dtype))
    vision = config.vision if isinstance(config, ClipConfig) else config
    found = _resolve(name_or_path, "tower", vision, revision, offline)
    return cast(VisionEncoder, _load(found, name_or_path, device, dtype, strict, check_finite))


@dataclass(frozen=True)
class _Found:
    """What to build, and the weights to fill it with."""

    saved: FolderConfig
    checkpoint: Checkpoint


def _foreign(name: str) -> Callable[..., VisionEncoder] | None:
    """The loader of an encoder that is not ours, when the name says so."""
    if name.startswith("timm/") and not _is_published(name):
        from perception_encoder.interop import load_timm

        return lambda **options: load_timm(name.removeprefix("timm/"), **options)
    if name.startswith("open_clip/"):
        from perception_encoder.interop import load_open_clip

        return lambda **options: load_open_clip(name.removeprefix("open_clip/"), **options)
    if name in _registered() and name not in MODELS:
        (point,) = [point for point in entry_points(group=ENTRY_POINTS) if point.name == name][:1]
        return cast(Callable[..., VisionEncoder], point.load())
    return None


def _is_published(name: str) -> bool:
    return name in MODELS or name in _packaged() or name.removeprefix("hf://") in _hub_ids()


def _resolve(
    name_or_path: str | Path,
    kind: Kind,
    config: VisionConfig | ClipConfig | None,
    revision: str | None,
    offline: bool | None,
) -> _Found:
    """From what the caller wrote to an open file and the model it belongs to."""
    if isinstance(name_or_path, str) and _is_published(name_or_path):
        name, entry, weights = _find(name_or_path)
        if config is not None and config not in (entry.config, entry.vision):
            raise ConfigError(f"{name} has its own config; config= is for a bare file")
        if kind == "clip" and weights.kind == "tower":
            raise ConfigError(f"{name_or_path} holds a vision tower and no text tower; use load_encoder")
        path = _locate_weights(weights, revision, offline)
        if weights.layout == "native":
            return _from_folder(path, kind)
        saved = FolderConfig(vision=entry.vision, text=entry.text if kind == "clip" else None, pixels=entry.pixels)
        return _Found(saved, open_checkpoint(path))
    try:
        path = locate(name_or_path, revision=revision, offline=offline)
    except ConfigError:
        if _is_word(name_or_path):
            raise _unknown(str(name_or_path)) from None
        raise
    if path.is_dir():
        if config is not None:
            raise ConfigError(f"folder {path} has its own {CONFIG}; config= is for a bare file")
        return _from_folder(path, kind)
    checkpoint = open_checkpoint(path)
    config = config or infer_config(checkpoint, kind)
    vision = config.vision if isinstance(config, ClipConfig) else config
    text = config.text if isinstance(config, ClipConfig) else None
    if (kind == "clip") != (text is not None):
        needed = "ClipConfig" if kind == "clip" else "VisionConfig"
        raise ConfigError(f"config= is a {type(config).__name__}; a {needed} is needed")
    return _Found(FolderConfig(vision=vision, text=text, pixels=PixelSpec(size=vision.image_size)), checkpoint)


def _locate_weights(weights: Weights, revision: str | None, offline: bool | None) -> Path:
    if weights.where.startswith(PACKAGE):
        return _WEIGHTS_FOLDER.parent / weights.where.removeprefix(PACKAGE)
    return locate(weights.where, revision=revision, offline=offline, filename=weights.files)


def _from_folder(folder: Path, kind: Kind) -> _Found:
    data = read_config(folder)
    saved = FolderConfig.from_dict(data, folder / CONFIG)  # before the weights are opened
    if kind == "clip" and saved.kind == "tower":
        raise ConfigError(f"{folder} holds a vision tower and no text tower; use load_encoder")
    data, checkpoint = read_folder(folder)
    saved = FolderConfig.from_dict(data, folder / CONFIG)
    return _Found(saved if kind == "clip" else replace(saved, text=None), checkpoint)


def _builder(saved: FolderConfig) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        vision = VisionTransformer(saved.vision, saved.pixels)
        return vision if saved.text is None else CLIP(vision, TextTransformer(saved.text), saved.pixels)

    return build


def _untrained(name: str, kind: Kind, device: str | torch.device, dtype: str | torch.dtype) -> nn.Module:
    _, entry, _ = _find(name)
    if kind == "clip" and entry.text is None:
        raise ConfigError(f"{name} has no text tower; use load_encoder")
    saved = FolderConfig(vision=entry.vision, text=entry.text if kind == "clip" else None, pixels=entry.pixels)
    where = pick_device(device)
    return _builder(saved)().to(where, pick_dtype(dtype, where)).eval()


def _load(
    found: _Found,
    source: str | Path,
    device: str | torch.device,
    dtype: str | torch.dtype,
    strict: bool,
    check_finite: bool,
) -> nn.Module:
    checkpoint, kind, where = found.checkpoint, found.saved.kind, pick_device(device)
    model, _ = load_into(
        _builder(found.saved),
        lambda names: recognize(checkpoint, kind, names, strict=strict),
        dtype=pick_dtype(dtype, where, stored_dtype(checkpoint)),
        device=where,
        strict=strict,
        check_finite=check_finite,
    )
    model.source = str(source)
    return model.eval()


def stored_dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype most of the weights are stored in, by the number of elements."""
    counts: dict[torch.dtype, int] = {}
    for tensor in state.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype], default=torch.float32)
