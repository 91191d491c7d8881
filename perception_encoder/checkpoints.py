"""Where foreign names meet ours. No model file knows that other names exist.

D width  C output width  N positions
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perception.checkpoint import (
    CONFIG,
    TORCH_SUFFIXES,
    Converted,
    Rule,
    check_folder,
    check_vacant,
    convert,
    prefixed,
    save_folder,
    write_safetensors,
)
from perception.errors import CheckpointError, ConfigError
from perception.files import atomic_write
from perception.pixels import PixelSpec
from perception_encoder.clip import CLIP
from perception_encoder.config import ClipConfig, TextConfig, VisionConfig
from perception_encoder.vision import VisionTransformer

Kind = Literal["tower", "clip"]


def _turn(matrix: Tensor) -> Tensor:
    """The reference multiplies `x @ matrix`; a linear layer keeps the transpose."""
    return matrix.mT


def _drop_zero_bias(weight: Tensor, bias: Tensor) -> Tensor:
    """timm's projection is a linear layer with a bias, which is zero in every converted file; ours has none."""
    if not bias.is_meta and bias.any():
        raise CheckpointError("head.bias is not zero: this is a finetuned classifier, not the published projection")
    return weight


def _add_zero_bias(weight: Tensor) -> tuple[Tensor, Tensor]:
    return weight, weight.new_zeros(len(weight))


def _split_pool(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """3D ... -> D ..., 2D ...: timm keeps the query's part of the pool apart."""
    D = len(qkv) // 3
    return qkv[:D], qkv[D:]


def _join_pool(q: Tensor, kv: Tensor) -> Tensor:
    return torch.cat([q, kv])


# Blocks of the reference implementation, vision and text alike.
REFERENCE_BLOCKS = (
    Rule("transformer.resblocks.*.ln_1.*", "blocks.*.norm1.*"),
    Rule("transformer.resblocks.*.attn.in_proj_weight", "blocks.*.attn.qkv.weight"),
    Rule("transformer.resblocks.*.attn.in_proj_bias", "blocks.*.attn.qkv.bias"),
    Rule("transformer.resblocks.*.attn.out_proj.*", "blocks.*.attn.proj.*"),
    Rule("transformer.resblocks.*.ls_1.gamma", "blocks.*.ls1.gamma"),
    Rule("transformer.resblocks.*.ln_2.*", "blocks.*.norm2.*"),
    Rule("transformer.resblocks.*.mlp.c_fc.*", "blocks.*.mlp.fc1.*"),
    Rule("transformer.resblocks.*.mlp.c_proj.*", "blocks.*.mlp.fc2.*"),
    Rule("transformer.resblocks.*.ls_2.gamma", "blocks.*.ls2.gamma"),
)

# facebook/PE-Lang-*, facebook/PE-Spatial-*: a tower alone. The pool and the projection are PE-Core's.
REFERENCE_TOWER = (
    Rule("conv1.weight", "patch_embed.weight"),
    Rule("class_embedding", "class_token"),
    Rule("positional_embedding", "pos_embed"),
    Rule("ln_pre.*", "norm_pre.*"),
    *REFERENCE_BLOCKS,
    Rule("ln_post.*", "norm_post.*"),
    Rule("attn_pool.probe", "pool.probe"),
    Rule("attn_pool.attn.in_proj_weight", "pool.qkv.weight"),
    Rule("attn_pool.attn.in_proj_bias", "pool.qkv.bias"),
    Rule("attn_pool.attn.out_proj.*", "pool.proj.*"),
    Rule("attn_pool.layernorm.*", "pool.norm.*"),
    Rule("attn_pool.mlp.c_fc.*", "pool.mlp.fc1.*"),
    Rule("attn_pool.mlp.c_proj.*", "pool.mlp.fc2.*"),
    Rule("proj", "project.weight", _turn, _turn),
)

REFERENCE_TEXT = (
    Rule("token_embedding.weight", "token_embed.weight"),
    Rule("positional_embedding", "pos_embed"),
    *REFERENCE_BLOCKS,
    Rule("ln_final.*", "norm.*"),
    Rule("text_projection", "project.weight", _turn, _turn),
)

# facebook/PE-Core-*: the text tower has no prefix there, so `positional_embedding` is the text's.
REFERENCE_CLIP = (
    *prefixed(REFERENCE_TOWER, "visual.", "vision."),
    *prefixed(REFERENCE_TEXT, "", "text."),
    Rule("logit_scale", "logit_scale"),
)

# timm/vit_pe_*
TIMM_TOWER = (
    Rule("patch_embed.proj.weight", "patch_embed.weight"),
    Rule("cls_token", "class_token", lambda t: t[0, 0], lambda t: t[None, None]),  # 1 1 D, D
    Rule("pos_embed", "pos_embed", lambda t: t[0], lambda t: t[None]),  # 1 N D, N D
    Rule("norm_pre.*", "norm_pre.*"),
    Rule("blocks.*.norm1.*", "blocks.*.norm1.*"),
    Rule("blocks.*.attn.qkv.*", "blocks.*.attn.qkv.*"),
    Rule("blocks.*.attn.proj.*", "blocks.*.attn.proj.*"),
    Rule("blocks.*.gamma_1", "blocks.*.ls1.gamma"),
    Rule("blocks.*.norm2.*", "blocks.*.norm2.*"),
    Rule("blocks.*.mlp.fc1.*", "blocks.*.mlp.fc1.*"),
    Rule("blocks.*.mlp.fc2.*", "blocks.*.mlp.fc2.*"),
    Rule("blocks.*.gamma_2", "blocks.*.ls2.gamma"),
    Rule("norm.*", "norm_post.*"),
    Rule("attn_pool.latent", "pool.probe"),
    Rule(("attn_pool.q.*", "attn_pool.kv.*"), "pool.qkv.*", _join_pool, _split_pool),
    Rule("attn_pool.proj.*", "pool.proj.*"),
    Rule("attn_pool.norm.*", "pool.norm.*"),
    Rule("attn_pool.mlp.fc1.*", "pool.mlp.fc1.*"),
    Rule("attn_pool.mlp.fc2.*", "pool.mlp.fc2.*"),
    Rule(("head.weight", "head.bias"), "project.weight", _drop_zero_bias, _add_zero_bias),
)

# timm/PE-Core-*
OPEN_CLIP_CLIP = (
    *prefixed(TIMM_TOWER, "visual.trunk.", "vision."),
    *prefixed(REFERENCE_TEXT, "text.", "text."),
    Rule("logit_scale", "logit_scale"),
)

NATIVE = (Rule("**", "**"),)

# A CLIP file seen as its vision tower: the text half is dropped by the exact names it has there.
REFERENCE_CLIP_VISION = (
    *prefixed(REFERENCE_TOWER, "visual."),
    *(Rule(name, None) for name in ("token_embedding.weight", "positional_embedding", "transformer.resblocks.**")),
    *(Rule(name, None) for name in ("ln_final.*", "text_projection", "logit_scale")),
)
OPEN_CLIP_VISION = (*prefixed(TIMM_TOWER, "visual.trunk."), Rule("text.**", None), Rule("logit_scale", None))
NATIVE_CLIP_VISION = (Rule("vision.**", "**"), Rule("text.**", None), Rule("logit_scale", None))


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of a model.

    sign   a key that only files of this layout have
    """

    name: str
    sign: str
    table: tuple[Rule, ...]


LAYOUTS: dict[Kind, tuple[Layout, ...]] = {
    "tower": (
        Layout("native", "patch_embed.weight", NATIVE),
        Layout("reference", "conv1.weight", REFERENCE_TOWER),
        Layout("timm", "patch_embed.proj.weight", TIMM_TOWER),
        Layout("transformers", "timm_model.patch_embed.proj.weight", prefixed(TIMM_TOWER, "timm_model.")),
        Layout("native clip", "vision.patch_embed.weight", NATIVE_CLIP_VISION),
        Layout("reference clip", "visual.conv1.weight", REFERENCE_CLIP_VISION),
        Layout("open_clip", "visual.trunk.patch_embed.proj.weight", OPEN_CLIP_VISION),
    ),
    "clip": (
        Layout("native", "vision.patch_embed.weight", NATIVE),
        Layout("reference", "visual.conv1.weight", REFERENCE_CLIP),
        Layout("open_clip", "visual.trunk.patch_embed.proj.weight", OPEN_CLIP_CLIP),
    ),
}


def recognize(
    state: Mapping[str, Tensor], kind: Kind, expected: Sequence[str], *, strict: bool = True, origin: object = None
) -> Converted:
    """A state dict in our names, through the one table that matches it whole.

    expected  the names of the model's parameters
    strict    False: the table that leaves least over; what is left over is for `load_into` to report

    Raises CheckpointError when no table matches, with what the nearest one misses and does not know, and when two do.
    """
    names, tries = set(expected), []
    for layout in LAYOUTS[kind]:
        found = convert(state, layout.table, strict=False)
        missing = [name for name in expected if name not in found]
        extra = [*found.unknown, *(name for name in found if name not in names)]
        tries.append((len(missing) + len(extra), layout, found, missing, extra))
    whole = [(layout, found) for wrong, layout, found, _, _ in tries if not wrong]
    if len(whole) == 1:
        return whole[0][1]
    where = origin or getattr(state, "path", None) or "the state dict"
    if whole:
        raise CheckpointError(f"{where} matches the layouts {[layout.name for layout, _ in whole]}: ambiguous, refused")
    _, layout, found, missing, extra = min(tries, key=lambda item: item[0])
    if not strict:
        return found
    raise CheckpointError(
        f"{where} matches no layout of a {'CLIP model' if kind == 'clip' else 'vision tower'} of this config "
        f"(tried {', '.join(layout.name for layout in LAYOUTS[kind])}). The nearest is {layout.name!r}: "
        f"{len(missing)} parameters are missing{_five(missing)}, {len(extra)} keys are not known{_five(extra)}"
    )


def _five(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""


def infer_config(state: Mapping[str, Tensor], kind: Kind) -> VisionConfig | ClipConfig:
    """The config of weights of a published size, from the shapes of their tensors.

    Shapes do not say how many heads there are. Every published tower has heads of 64 channels, except that of width
    1536, which has 16 heads of 96; a width that was never published needs a config. Nor do they say LayerScale's start
    value, which only matters before training and is 0.1 in every published model.

    Raises CheckpointError for a file of no known layout, ConfigError where the rule above does not reach.
    """
    for layout in LAYOUTS[kind]:
        if layout.sign in state:
            shapes = {name: tuple(tensor.shape) for name, tensor in convert(state, layout.table, strict=False).items()}
            break
    else:
        where = getattr(state, "path", None) or "the state dict"
        raise CheckpointError(f"{where} has none of the layouts {', '.join(layout.name for layout in LAYOUTS[kind])}")
    try:
        if kind == "tower":
            return _infer_vision(shapes)
        vision = _infer_vision({k.removeprefix("vision."): v for k, v in shapes.items() if k.startswith("vision.")})
        text = _infer_text({k.removeprefix("text."): v for k, v in shapes.items() if k.startswith("text.")})
        return ClipConfig(vision=vision, text=text)
    except (KeyError, ValueError, IndexError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"no config can be read from these shapes ({error!r}); pass config=") from error


def _infer_vision(shapes: Mapping[str, tuple[int, ...]]) -> VisionConfig:
    width, _, patch_size, _ = shapes["patch_embed.weight"]
    class_token = "class_token" in shapes
    grid = math.isqrt(shapes["pos_embed"][0] - class_token)
    if grid**2 != shapes["pos_embed"][0] - class_token:
        raise ConfigError(f"{shapes['pos_embed'][0]} positions do not make a square grid; pass config=")
    return VisionConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        width=width,
        depth=_depth(shapes),
        heads=_heads(width, {192, 384, 768, 1024, 1536}),
        mlp_width=shapes["blocks.0.mlp.fc1.weight"][0],
        class_token=class_token,
        layer_scale=0.1 if "blocks.0.ls1.gamma" in shapes else None,
        norm_post="norm_post.weight" in shapes,
        pool="attention" if "pool.probe" in shapes else None,
        output_width=shapes["project.weight"][0] if "project.weight" in shapes else None,
    )


def _infer_text(shapes: Mapping[str, tuple[int, ...]]) -> TextConfig:
    (vocab, width), (context, _) = shapes["token_embed.weight"], shapes["pos_embed"]
    heads = _heads(width, {512, 1024, 1280})
    output_width = shapes["project.weight"][0]
    return TextConfig(
        context=context, width=width, depth=_depth(shapes), heads=heads, output_width=output_width, vocab=vocab
    )


def _depth(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return 1 + max(int(found[1]) for name in shapes if (found := re.match(r"blocks\.(\d+)\.", name)))


def _heads(width: int, published: set[int]) -> int:
    if width not in published:
        raise ConfigError(f"no published tower is {width} wide; shapes do not say how many heads it has; pass config=")
    return 16 if width == 1536 else width // 64


# --- Our own folder --------------------------------------------------------------------------------------------------

FORMAT, VERSION = "perception", 1


@dataclass(frozen=True, kw_only=True)
class FolderConfig:
    """What `config.json` of a saved model says: the model, and the pixels and tokens it expects."""

    vision: VisionConfig
    text: TextConfig | None
    pixels: PixelSpec

    @property
    def kind(self) -> Kind:
        return "tower" if self.text is None else "clip"

    @property
    def model(self) -> VisionConfig | ClipConfig:
        return self.vision if self.text is None else ClipConfig(vision=self.vision, text=self.text)

    def to_dict(self) -> dict[str, Any]:
        data = {"format": FORMAT, "version": VERSION, "kind": self.kind, "vision": self.vision.to_dict()}
        if self.text is not None:
            data["text"] = self.text.to_dict()
            data["tokenizer"] = {"kind": "clip-bpe", "context": self.text.context}
        return {**data, "pixels": self.pixels.to_dict()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: object = "config.json") -> "FolderConfig":
        """Raises ConfigError for another format or version, unknown and missing keys, and impossible sizes."""
        if data.get("format") != FORMAT:
            raise ConfigError(f"{where} is no config of ours: 'format' is {data.get('format')!r}, expected {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ConfigError(f"{where} has version {data.get('version')!r}; this release reads {VERSION}")
        kind = data.get("kind")
        if kind not in ("tower", "clip"):
            raise ConfigError(f"{where} holds a {kind!r}; expected 'tower' or 'clip'")
        wanted = {"format", "version", "kind", "vision", "pixels", *(("text", "tokenizer") if kind == "clip" else ())}
        strange, missing = set(data) - wanted - {"weights"}, wanted - set(data)
        if strange or missing:
            raise ConfigError(f"{where}: unknown keys {sorted(strange)}, missing keys {sorted(missing)}")
        text = TextConfig.from_dict(data["text"]) if kind == "clip" else None
        if text and data["tokenizer"] != {"kind": "clip-bpe", "context": text.context}:
            raise ConfigError(
                f"{where}: tokenizer is {data['tokenizer']!r}; expected kind 'clip-bpe' and context {text.context}"
            )
        vision, pixels = VisionConfig.from_dict(data["vision"]), PixelSpec.from_dict(data["pixels"])
        config = cls(vision=vision, text=text, pixels=pixels)
        _ = config.model  # the two towers must fit each other
        return config


def save(model: nn.Module, folder: str | Path, *, replace: bool = True) -> None:
    """Write a CLIP model or a vision tower as a folder that `load_clip` and `load_encoder` read.

    replace  False: a folder that holds another model is refused

    The folder holds `config.json` and `model.safetensors`, and holds one whole model at every instant, old or new.
    Raises ConfigError for other models, CheckpointError when the disk refuses.
    """
    save_folder(folder, model.state_dict(), _folder_config(model).to_dict(), replace=replace)


def _folder_config(model: nn.Module) -> FolderConfig:
    if not isinstance(model, CLIP | VisionTransformer):
        raise ConfigError(f"only CLIP and VisionTransformer are saved in this format; given {type(model).__name__}")
    vision = model.vision.config if isinstance(model, CLIP) else model.config
    text = model.text.config if isinstance(model, CLIP) else None
    if not isinstance(model.preprocess, PixelSpec):
        raise ConfigError("the model's `preprocess` is no PixelSpec, so it cannot be written down")
    return FolderConfig(vision=vision, text=text, pixels=model.preprocess)


# --- Other people's formats ------------------------------------------------------------------------------------------


WRITTEN = ("reference", "timm", "open_clip", "native")


def export(model: nn.Module, path: str | Path, layout: str = "reference", *, replace: bool = True) -> None:
    """Write a CLIP model or a vision tower in another library's names.

    "reference"  a `.pt` file: one flat dictionary, as published
    "timm"       towers. A `.safetensors` file, or a folder for `timm.create_model("local-dir:FOLDER")`
    "open_clip"  CLIP models. The same, for `open_clip.create_model("local-dir:FOLDER")`
    "native"     a folder; see `save`

    replace  False: a folder that holds another model is refused

    Written whole or not at all. Raises ConfigError for a layout the model does not have, and for a path that the layout
    does not have.
    """
    path = Path(path)
    check_path(path, layout)
    _folder_config(model)  # refuses what is not ours
    if layout == "reference":
        _export_reference(model, path)
    elif layout == "timm":
        _export_timm(model, path, replace)
    elif layout == "open_clip":
        _export_open_clip(model, path, replace)
    else:
        save(model, path, replace=replace)


def check_path(path: Path, layout: str) -> None:
    """ConfigError for a layout that is not written here, and for a path that it does not have."""
    if layout not in WRITTEN:
        raise ConfigError(f"no layout {layout!r} to write; there are: {', '.join(WRITTEN)}")
    if layout == "reference":
        if path.suffix not in (".pt", ".pth"):
            raise ConfigError(f"{path}: the reference layout is a .pt file")
    elif layout == "native":
        check_folder(path, "the native layout")
    elif path.suffix in TORCH_SUFFIXES or (path.suffix != ".safetensors" and path.is_file()):
        raise ConfigError(f"{path}: the {layout} layout is a folder or a .safetensors file")


def _export_reference(model: nn.Module, path: Path) -> None:
    table = REFERENCE_CLIP if isinstance(model, CLIP) else REFERENCE_TOWER
    # Own storage for each: torch.save writes whole storages, and a view may be part of a mapped file.
    theirs = convert(model.state_dict(), table, back=True)
    state = {name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in theirs.items()}
    with atomic_write(path) as temporary:
        torch.save(state, temporary)


def _export_timm(model: nn.Module, path: Path, replace: bool) -> None:
    if isinstance(model, CLIP):
        raise ConfigError("a timm file holds one tower; export clip.vision, or the whole model as 'open_clip'")
    assert isinstance(model, VisionTransformer)
    state = convert(model.state_dict(), TIMM_TOWER, back=True)
    _write_foreign(path, state, "model.safetensors", CONFIG, lambda: _timm_config(model), replace)


def _export_open_clip(model: nn.Module, path: Path, replace: bool) -> None:
    if not isinstance(model, CLIP):
        raise ConfigError("an open_clip file holds both towers; export a tower as 'timm'")
    state = convert(model.state_dict(), OPEN_CLIP_CLIP, back=True)
    config = "open_clip_config.json"
    _write_foreign(path, state, "open_clip_model.safetensors", config, lambda: _open_clip_config(model), replace)


def _write_foreign(
    path: Path,
    state: Mapping[str, Tensor],
    weights: str,
    config: str,
    describe: Callable[[], dict[str, Any]],
    replace: bool,
) -> None:
    if path.suffix == ".safetensors":
        with atomic_write(path) as temporary:
            write_safetensors(temporary, state)
        return
    described = describe()
    if not replace:
        check_vacant(path)
    text = json.dumps(described, indent=2)
    with atomic_write(path / weights) as temporary:
        write_safetensors(temporary, state)
    with atomic_write(path / config) as temporary:
        temporary.write_text(text + "\n", "utf-8")


def _timm_config(model: VisionTransformer) -> dict[str, Any]:
    """timm's `config.json`: one of its PE architectures, with every size said again."""
    config, pixels = model.config, model.preprocess
    ratio = config.mlp_width / config.width
    if int(config.width * ratio) != config.mlp_width:  # timm truncates the product
        ratio = math.nextafter(ratio, math.inf)
    arguments = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.width,
        "depth": config.depth,
        "num_heads": config.heads,
        "mlp_ratio": ratio,
        "class_token": config.class_token,
        "init_values": config.layer_scale,
        "ref_feat_shape": [config.grid, config.grid],
        "rope_grid_offset": float(config.class_token),  # the class token has position 0
        "use_post_transformer_norm": config.norm_post,
        "use_fc_norm": False,
        "global_pool": "map" if config.pool else "avg",
        "attn_pool_num_heads": config.pool_heads,
        "attn_pool_mlp_ratio": 4.0,
    }
    return {
        "architecture": "vit_pe_core_large_patch14_336",
        "num_classes": config.output_width or 0,
        "num_features": config.width,
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [3, config.image_size, config.image_size],
            "fixed_input_size": True,
            "interpolation": pixels.interpolation,
            "crop_pct": 1.0,
            "crop_mode": "squash" if pixels.resize == "squash" else "center",
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "num_classes": config.output_width or 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _open_clip_config(model: CLIP) -> dict[str, Any]:
    """open_clip's `open_clip_config.json`. It builds a tower by its timm name, so only published sizes have one."""
    from perception_encoder.zoo import timm_name  # the zoo is above this file

    vision, text, pixels = model.config.vision, model.config.text, model.preprocess
    name = timm_name(vision)
    if name is None:
        raise ConfigError(
            "open_clip knows vision towers by timm's names, and this size has none; "
            "give a path that ends in .safetensors to write the weights alone"
        )
    return {
        "model_cfg": {
            "embed_dim": text.output_width,
            "vision_cfg": {
                "image_size": vision.image_size,
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": None,
            },
            "text_cfg": {
                "context_length": text.context,
                "vocab_size": text.vocab,
                "width": text.width,
                "heads": text.heads,
                "layers": text.depth,
            },
            "custom_text": True,
        },
        "preprocess_cfg": {
            "mean": list(pixels.mean),
            "std": list(pixels.std),
            "interpolation": pixels.interpolation,
            "resize_mode": "squash" if pixels.resize == "squash" else "shortest",
        },
    }
