"""Other people's configs, read and written: the reference's `params.json`, Meta's, and Hugging Face's `config.json`.

A training run dumps hundreds of settings into `params.json`, so keys that do not say what the model is are left alone;
those that do are read with their types, and a value this library has no model for is an error.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from perception.errors import ConfigError
from perception.rope import RopeScaling
from perception.settings import check_range
from perception_encoder.config import VisionConfig
from perception_encoder.zoo import MODELS
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig

# Meta's own files only say that the rope is scaled; by how much was in their code, one factor a release.
META_SCALING = {(2048, 16): 32.0, (3072, 28): 32.0, (4096, 32): 8.0, (8192, 80): 8.0, (16384, 126): 8.0}
META_CONTEXT = 131_072
HEAVIEST = 10_000_000  # no width, count or context is above it; keeps the arithmetic below in range


class _Fields:
    """One table of a foreign JSON file: values come out with their types checked, and errors name the key."""

    def __init__(self, data: object, where: str):
        if not isinstance(data, Mapping):
            raise ConfigError(f"{where} is {_show(data)}; expected a table")
        self.data, self.where = data, where

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None  # null is how these files say "not set"

    def table(self, key: str) -> "_Fields":
        return _Fields(self._needed(key), f"{self.where}: {key!r}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._needed(key, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key!r} is {_show(value)}; expected a whole number")
        check_range(f"{self.where}: {key!r}", value, 0, HEAVIEST)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self._needed(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e12:  # also NaN
            raise ConfigError(f"{self.where}: {key!r} is {_show(value)}; expected a number")
        return float(value)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value = self._needed(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key!r} is {_show(value)}; expected true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._needed(key, default)
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: {key!r} is {_show(value)}; expected a text")
        return value

    def must(self, key: str, allowed: object, why: str) -> None:
        """The key is absent, null, or what is allowed."""
        if key in self and (self.data[key] != allowed or isinstance(self.data[key], bool) != isinstance(allowed, bool)):
            raise ConfigError(f"{self.where}: {key!r} is {_show(self.data[key])}, and {why}")

    def must_not(self, key: str, why: str) -> None:
        if key in self:
            raise ConfigError(f"{self.where}: {key!r} is {_show(self.data[key])}, and {why}")

    def pair(self, key: str) -> tuple[int, int]:
        """`[h, w]`, or one number for both."""
        value = self._needed(key)
        values = value if isinstance(value, list) else [value, value]
        if len(values) != 2 or any(not isinstance(v, int) or isinstance(v, bool) for v in values):
            raise ConfigError(f"{self.where}: {key!r} is {_show(value)}; expected one or two whole numbers")
        return values[0], values[1]

    def _needed(self, key: str, default: object = None) -> Any:
        value = self.data.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(f"{self.where} lacks {key!r}")
        return value


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- params.json of the reference ------------------------------------------------------------------------------------


def read_params(data: Mapping[str, Any], where: object = "params.json") -> PlmConfig:
    """The reference's training settings as a config: the short form and the full dump.

    Raises ConfigError for what is missing, of the wrong type, or another model. Two defaults are the reference's own
    and easily taken for others: `high_freq_factor` is 32, and `pooling_ratio` is 1.
    """
    top = _Fields(data, str(where))
    if "model" not in top or "vision_model" not in top.table("model"):
        raise ConfigError(f"{where} has no 'model' with a 'vision_model': it is no Perception Language Model")
    model, settings = top.table("model"), _Fields(data.get("data") or {}, f"{where}: 'data'")
    model.must("remove_vision_class_token", True, "the class token never reaches the decoder here")
    vision = _read_reference_vision(model.table("vision_model"))
    decoder = _read_meta_decoder(model, context=model.integer("max_seqlen", 11_520), tied=model.flag("weight_tying"))
    return PlmConfig(
        vision=vision,
        projector=ProjectorConfig(
            kind="pooling", in_width=vision.width, width=decoder.width, pool=model.integer("pooling_ratio", 1)
        ),
        decoder=decoder,
        media=_media(
            tile=settings.integer("image_res", vision.image_size),
            max_tiles=settings.integer("max_num_tiles", 36),
            frames=settings.integer("max_video_frames", 32),
            tiling=settings.text("vision_input_type", "thumb+tile"),
            context=decoder.context,
        ),
    )


def _read_reference_vision(vision: _Fields) -> VisionConfig:
    vision.must("use_abs_posemb", True, "a tower without learned positions is not known")
    vision.must("use_rope2d", True, "a tower without rotary positions is not known")
    vision.must("use_ln_post", False, "the decoder reads the last block without a norm after it")
    vision.must("pool_type", "none", "the decoder reads patches, not a pooled vector")
    vision.must_not("output_dim", "the decoder reads patches, not a projection")
    width = vision.integer("width")
    return VisionConfig(
        image_size=vision.integer("image_size"),
        patch_size=vision.integer("patch_size"),
        width=width,
        depth=vision.integer("layers"),
        heads=vision.integer("heads"),
        mlp_width=int(width * vision.number("mlp_ratio", 4.0)),
        class_token=vision.flag("use_cls_token", False),
        layer_scale=vision.number("ls_init_value") if "ls_init_value" in vision else None,
        norm_post=False,
        pool=None,
    )


def _media(*, tile: int, max_tiles: int, frames: int, tiling: str, context: int) -> MediaConfig:
    # The reference and Hugging Face tile for exactly one name, and squash for every other.
    kind = "thumb+tile" if tiling == "thumb+tile" else "vanilla"
    return MediaConfig(tile=tile, max_tiles=max_tiles, frames=frames, tiling=kind, context=context)  # type: ignore[arg-type]


def _read_meta_decoder(model: _Fields, *, context: int, tied: bool) -> DecoderConfig:
    model.must_not("sliding_window", "this decoder looks at everything before")
    width, heads = model.integer("dim"), model.integer("n_heads")
    check_range(f"{model.where}: 'n_heads'", heads, 1, HEAVIEST)
    multiplier = model.number("ffn_dim_multiplier") if "ffn_dim_multiplier" in model else None
    return DecoderConfig(
        width=width,
        depth=model.integer("n_layers"),
        heads=heads,
        kv_heads=model.integer("n_kv_heads", heads),
        mlp_width=mlp_width(width, multiplier, model.integer("multiple_of", 256)),
        vocab=model.integer("vocab_size"),
        head_dim=model.integer("head_dim", width // heads),
        norm_eps=model.number("norm_eps", 1e-5),
        rope_theta=model.number("rope_theta", 10_000.0),
        rope_scaling=_read_meta_scaling(model),
        tied=tied,
        context=context,
    )


def mlp_width(width: int, multiplier: float | None, multiple_of: int) -> int:
    """Meta's rule for the hidden width: two thirds of four widths, scaled, rounded up to a multiple."""
    hidden = int(2 * (4 * width) / 3)
    hidden = hidden if multiplier is None else int(multiplier * hidden)
    return max(multiple_of, 1) * math.ceil(hidden / max(multiple_of, 1))


def _read_meta_scaling(model: _Fields) -> RopeScaling | None:
    """A factor of 1 means off. The reference obeys the factor, its converter the flag: they must not contradict."""
    factor = model.number("rope_scale_factor", 1.0)
    if factor == 1:
        return None
    if not model.flag("use_scaled_rope", True):
        raise ConfigError(f"{model.where}: 'use_scaled_rope' is false, but 'rope_scale_factor' is {factor}")
    return RopeScaling(
        factor=factor,
        low_freq_factor=model.number("low_freq_factor", 1.0),
        high_freq_factor=model.number("high_freq_factor", 32.0),
        original_context=model.integer("old_context_len", 8192),
    )


def read_meta_llama(data: Mapping[str, Any], tied: bool, where: object = "params.json") -> DecoderConfig:
    """Meta's own `params.json` of a Llama 3.

    tied  whether the file of weights repeats the embedding as its output, which the settings do not say

    Raises ConfigError for a scaled rope whose factor neither the file nor a published size gives.
    """
    model = _Fields(data, str(where))
    if "dim" not in model and "model" in model:
        raise ConfigError(f"{where} is a whole model's; a Llama alone has 'dim' at the top")
    if model.integer("vocab_size", 0) < 1:
        raise ConfigError(f"{where} has no 'vocab_size': this is a Llama before 3, which is not read")
    plain = dict(data)
    if model.flag("use_scaled_rope", False) and "rope_scale_factor" not in model:
        size = (model.integer("dim"), model.integer("n_layers"))
        factor = plain.get("rope_scaling_factor") or META_SCALING.get(size)
        if factor is None:
            raise ConfigError(
                f"{where} scales its rope and does not say by how much, and {size[1]} layers of width {size[0]} are no "
                "published Llama; add 'rope_scale_factor' (8 for Llama 3.1, 32 for 3.2)"
            )
        plain["rope_scale_factor"] = factor
        plain["high_freq_factor"] = plain.get("rope_high_freq_factor") or 4.0
    context = META_CONTEXT if "rope_scale_factor" in plain else 8192
    return _read_meta_decoder(_Fields(plain, str(where)), context=context, tied=tied)


def write_params(config: PlmConfig, *, name: str = "plm", dtype: str = "bf16") -> dict[str, Any]:
    """`params.json` as the reference reads it. Raises ConfigError for a model the reference does not have."""
    decoder, media = config.decoder, config.media
    check_plain_plm(config, "the original layout")
    return {
        "name": name,
        "distributed": {"model_dtype": dtype},
        "model": {
            **_write_meta_decoder(decoder),
            "weight_tying": decoder.tied,
            "max_seqlen": media.context,
            "pooling_ratio": config.projector.pool,
            "remove_vision_class_token": True,
            "vision_model": {
                "image_size": config.vision.image_size,
                "patch_size": config.vision.patch_size,
                "width": config.vision.width,
                "layers": config.vision.depth,
                "heads": config.vision.heads,
                "use_cls_token": config.vision.class_token,
                "use_abs_posemb": True,
                "mlp_ratio": mlp_ratio(config.vision),
                "ls_init_value": config.vision.layer_scale,
                "drop_path": 0.1,
                "use_ln_post": False,
                "pool_type": "none",
            },
            "mlp_init": {"use_gaussian": True},
        },
        "data": {
            "image_res": media.tile,
            "max_num_tiles": media.max_tiles,
            "max_video_frames": media.frames,
            "vision_input_type": media.tiling,
            "tokenizer_path": "tokenizer.model",
            "tokenizer_name": "plmchat",
            "conversation_format": "plm_sft",
        },
    }


def _write_meta_decoder(decoder: DecoderConfig) -> dict[str, Any]:
    multiplier, multiple_of = _undo_mlp_width(decoder.width, decoder.mlp_width)
    scaling = decoder.rope_scaling
    data: dict[str, Any] = {
        "dim": decoder.width,
        "n_layers": decoder.depth,
        "n_heads": decoder.heads,
        "n_kv_heads": decoder.kv_heads,
        "vocab_size": decoder.vocab,
        "ffn_dim_multiplier": multiplier,
        "multiple_of": multiple_of,
        "norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "use_scaled_rope": scaling is not None,
        "rope_scale_factor": scaling.factor if scaling else 1,
    }
    if scaling:
        data["low_freq_factor"] = scaling.low_freq_factor
        data["high_freq_factor"] = scaling.high_freq_factor
        data["old_context_len"] = scaling.original_context
    if decoder.head_dim != decoder.width // decoder.heads:
        data["head_dim"] = decoder.head_dim
    return data


def _undo_mlp_width(width: int, hidden: int) -> tuple[float, int]:
    """A multiplier and a multiple that give `hidden`, as round as they can be."""
    for multiple_of in (256, 1024, 128, 64, 32, 16, 8, 4, 2, 1):
        if hidden % multiple_of:
            continue
        for digits in (1, 2, 3, 4, 6):
            exact = hidden / int(2 * (4 * width) / 3)
            step = 10.0**-digits
            for multiplier in (round(exact, digits), round(math.floor(exact / step) * step, digits)):
                if multiplier > 0 and mlp_width(width, multiplier, multiple_of) == hidden:
                    return multiplier, multiple_of
    return math.nextafter(hidden / int(2 * (4 * width) / 3), math.inf), 1


def mlp_ratio(vision: VisionConfig) -> float:
    """The ratio whose product with the width, cut to an integer, is the MLP's width."""
    ratio = vision.mlp_width / vision.width
    return ratio if int(vision.width * ratio) == vision.mlp_width else math.nextafter(ratio, math.inf)


def check_plain_plm(config: PlmConfig, layout: str) -> None:
    """ConfigError unless the model is one that `layout` can hold: a dense tower, the pooling projector, a Llama."""
    vision = config.vision
    if config.projector.kind != "pooling":
        raise ConfigError(f"{layout} has the pooling projector and no {config.projector.kind!r}; save it as 'native'")
    if vision.pool is not None or vision.norm_post or vision.output_width is not None:
        raise ConfigError(
            f"{layout} holds a tower that ends with its last block; this one has a norm, a pool or a projection "
            "after it; save it as 'native'"
        )


# --- config.json of Hugging Face -------------------------------------------------------------------------------------


def read_hugging_face(
    data: Mapping[str, Any], processor: Mapping[str, Any] | None = None, where: object = "config.json"
) -> PlmConfig:
    """transformers' `config.json` of a PerceptionLM, in the spelling of version 4 or 5.

    processor  what `processor_config.json` or `preprocessor_config.json` says of tiles, if it is there

    Raises ConfigError for what is missing, of the wrong type, or another model.
    """
    top = _Fields(data, str(where))
    top.must("model_type", "perception_lm", "a 'perception_lm' is expected")
    vision = _read_timm(top.table("vision_config"))
    if top.flag("vision_use_cls_token", True) != vision.class_token:
        raise ConfigError(
            f"{where}: 'vision_use_cls_token' is {top.flag('vision_use_cls_token', True)}, but its tower "
            f"has {'a' if vision.class_token else 'no'} class token"
        )
    text = dict(top.table("text_config").data)
    if "tie_word_embeddings" in top:
        text["tie_word_embeddings"] = top.flag("tie_word_embeddings")
    decoder = read_hugging_face_llama(text, f"{where}: 'text_config'")
    settings = _Fields(processor or {}, "the image processor's config")
    settings = settings.table("image_processor") if "image_processor" in settings else settings
    return PlmConfig(
        vision=vision,
        projector=ProjectorConfig(
            kind="pooling",
            in_width=vision.width,
            width=decoder.width,
            pool=top.integer("projector_pooling_ratio", 1),
        ),
        decoder=decoder,
        media=_media(
            tile=settings.integer("tile_size", vision.image_size),
            max_tiles=settings.integer("max_num_tiles", 36),
            frames=32,
            tiling=settings.text("vision_input_type", "thumb+tile"),
            context=decoder.context,
        ),
    )


def read_media_tokens(data: Mapping[str, Any], where: object = "config.json") -> tuple[int, int]:
    """The ids of the image's and the video's placeholder in transformers' `config.json`."""
    top = _Fields(data, str(where))
    return top.integer("image_token_id", 128_002), top.integer("video_token_id", 128_003)


def read_hugging_face_llama(data: Mapping[str, Any], where: object = "config.json") -> DecoderConfig:
    """transformers' `config.json` of a Llama. Raises ConfigError for another architecture, or what ours has not."""
    text = _Fields(data, str(where))
    text.must("model_type", "llama", "only a 'llama' is read as our decoder")
    text.must("attention_bias", False, "this decoder's attention has no biases")
    text.must("mlp_bias", False, "this decoder's MLP has no biases")
    text.must("hidden_act", "silu", "this decoder's MLP is gated by SiLU")
    text.must_not("quantization_config", "quantised weights are not read; load the full ones")
    width, heads = text.integer("hidden_size"), text.integer("num_attention_heads")
    check_range(f"{where}: 'num_attention_heads'", heads, 1, HEAVIEST)
    theta, scaling = _read_rope(text)
    return DecoderConfig(
        width=width,
        depth=text.integer("num_hidden_layers"),
        heads=heads,
        kv_heads=text.integer("num_key_value_heads", heads),
        mlp_width=text.integer("intermediate_size"),
        vocab=text.integer("vocab_size"),
        head_dim=text.integer("head_dim", width // heads),
        norm_eps=text.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        tied=text.flag("tie_word_embeddings", False),
        context=text.integer("max_position_embeddings", 2048),
    )


def _read_rope(text: _Fields) -> tuple[float, RopeScaling | None]:
    """Version 4 writes `rope_theta` beside `rope_scaling`, version 5 both in `rope_parameters`."""
    new, old = (text.table(key) if key in text else None for key in ("rope_parameters", "rope_scaling"))
    table = new or old or _Fields({}, text.where)
    theta = table.number("rope_theta", text.number("rope_theta", 10_000.0))
    kind = table.text("rope_type", table.text("type", "default"))
    table.must("partial_rotary_factor", 1.0, "every plane turns here")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{table.where} is of type {kind!r}; this decoder knows 'default' and 'llama3'")
    return theta, RopeScaling(
        factor=table.number("factor"),
        low_freq_factor=table.number("low_freq_factor"),
        high_freq_factor=table.number("high_freq_factor"),
        original_context=table.integer("original_max_position_embeddings"),
    )


# What transformers may say of a tower in `model_args`; the rest is read below.
_TIMM_DEFAULTS = {
    "num_classes": 0,
    "in_chans": 3,
    "use_fc_norm": False,
    "use_rot_pos_emb": True,
    "dynamic_img_size": True,
}


def _read_timm(vision: _Fields) -> VisionConfig:
    """One of timm's PE architectures, with every difference in `model_args`; what stands above those does not count."""
    vision.must("model_type", "timm_wrapper", "the tower of a 'timm_wrapper' is expected")
    name, towers = vision.text("architecture"), timm_towers()
    if name not in towers:
        raise ConfigError(f"{vision.where}: no tower {name!r} is known; there are: {', '.join(sorted(towers))}")
    base = towers[name]
    args = vision.table("model_args") if "model_args" in vision else _Fields({}, vision.where)
    known = {"embed_dim", "depth", "num_heads", "patch_size", "img_size", "mlp_ratio", "class_token", "init_values"}
    known |= {"use_post_transformer_norm", "global_pool", "ref_feat_shape", "rope_grid_offset", *_TIMM_DEFAULTS}
    known |= {"attn_pool_num_heads", "attn_pool_mlp_ratio", "drop_path_rate", "rope_mixed_mode"}
    if strange := sorted(set(args.data) - known):
        raise ConfigError(f"{args.where} has keys that are not known: {strange}")
    for key, allowed in _TIMM_DEFAULTS.items():
        args.must(key, allowed, f"this tower has {allowed}")
    args.must("rope_mixed_mode", False, "this tower's rotary angles are fixed")
    if args.text("global_pool", "map" if base.pool else "") not in ("", "avg", "token"):
        raise ConfigError(f"{args.where}: 'global_pool' must be '': the decoder reads patches, not a pooled vector")
    if args.flag("use_post_transformer_norm", base.norm_post):
        raise ConfigError(f"{args.where}: 'use_post_transformer_norm' must be false, as in the published models")
    size = args.pair("img_size") if "img_size" in args else (base.image_size, base.image_size)
    if size[0] != size[1]:
        raise ConfigError(f"{args.where}: 'img_size' is {size}; towers are square here")
    width = args.integer("embed_dim", base.width)
    start = args.data.get("init_values", base.layer_scale)  # null says none
    config = VisionConfig(
        image_size=size[0],
        patch_size=args.integer("patch_size", base.patch_size),
        width=width,
        depth=args.integer("depth", base.depth),
        heads=args.integer("num_heads", base.heads),
        mlp_width=int(width * args.number("mlp_ratio", mlp_ratio(base))),
        class_token=args.flag("class_token", base.class_token),
        layer_scale=None if start is None else args.number("init_values", start),
        norm_post=False,
        pool=None,
    )
    reference = args.pair("ref_feat_shape") if "ref_feat_shape" in args else (base.grid, base.grid)
    if reference != (config.grid, config.grid):
        raise ConfigError(
            f"{args.where}: 'ref_feat_shape' is {list(reference)} and the grid {config.grid} x {config.grid}: timm "
            "would rescale the rotary positions, which the published models do not; say the grid's own shape"
        )
    if args.number("rope_grid_offset", float(base.class_token)) != float(config.class_token):
        raise ConfigError(f"{args.where}: 'rope_grid_offset' must be {float(config.class_token)} for this tower")
    return config


def timm_towers() -> dict[str, VisionConfig]:
    """timm's names of the published towers, and what each is."""
    towers = {}
    for entry in map(MODELS.get, MODELS.names()):
        for weights in entry.weights:
            if found := re.fullmatch(r"hf://timm/(vit_pe_\w+)\.\w+", weights.where):
                towers[found[1]] = entry.vision
    return towers


def write_hugging_face(
    config: PlmConfig, *, media_tokens: tuple[int, int], special: Mapping[str, int], dtype: str
) -> dict[str, Any]:
    """transformers' `config.json`, in the spelling that versions 4 and 5 both read.

    media_tokens  ids of the image's and the video's placeholder
    special       ids of "bos" and of the stop tokens "end", "eot"
    """
    check_plain_plm(config, "the Hugging Face layout")
    vision = config.vision
    name = "vit_pe_core_large_patch14_336" if vision.class_token else "vit_pe_core_gigantic_patch14_448"
    return {
        "architectures": ["PerceptionLMForConditionalGeneration"],
        "model_type": "perception_lm",
        "image_token_id": media_tokens[0],
        "video_token_id": media_tokens[1],
        "projector_pooling_ratio": config.projector.pool,
        "vision_use_cls_token": vision.class_token,
        "tie_word_embeddings": config.decoder.tied,
        "text_config": {
            **write_hugging_face_llama(config.decoder, dtype=dtype),
            "max_position_embeddings": config.media.context,
            "bos_token_id": special["bos"],
            "eos_token_id": [special["end"], special["eot"]],
        },
        "vision_config": {
            "model_type": "timm_wrapper",
            "architecture": name,
            "do_pooling": True,
            "global_pool": "map",
            "initializer_range": 0.02,
            "num_features": vision.width,
            "model_args": {
                "embed_dim": vision.width,
                "depth": vision.depth,
                "num_heads": vision.heads,
                "patch_size": vision.patch_size,
                "img_size": [vision.image_size, vision.image_size],
                "mlp_ratio": mlp_ratio(vision),
                "init_values": vision.layer_scale,
                "global_pool": "",
                "use_post_transformer_norm": False,
                "ref_feat_shape": [vision.grid, vision.grid],
            },
        },
        "torch_dtype": dtype,
        "transformers_version": "4.54.0",
    }


def write_hugging_face_llama(decoder: DecoderConfig, *, dtype: str) -> dict[str, Any]:
    """transformers' `config.json` of a Llama."""
    scaling = decoder.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": decoder.head_dim,
        "hidden_act": "silu",
        "hidden_size": decoder.width,
        "initializer_range": 0.02,
        "intermediate_size": decoder.mlp_width,
        "max_position_embeddings": decoder.context,
        "mlp_bias": False,
        "num_attention_heads": decoder.heads,
        "num_hidden_layers": decoder.depth,
        "num_key_value_heads": decoder.kv_heads,
        "rms_norm_eps": decoder.norm_eps,
        "rope_theta": decoder.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context,
        },
        "tie_word_embeddings": decoder.tied,
        "use_cache": True,
        "vocab_size": decoder.vocab,
        "torch_dtype": dtype,
    }
