"""Every named language model as data, and the functions that load one or put one together.

A name binds what must travel together: the config, where the weights are, the tokens and the pixels they expect.
"""

import os
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from perception.checkpoint import CONFIG, load_into, read_config
from perception.device import pick_device, pick_dtype, shapes_only
from perception.errors import CheckpointError, ConfigError, UnknownName
from perception.hub import locate
from perception.pixels import PixelSpec
from perception.registry import Registry, unknown
from perception.rope import RopeScaling
from perception_encoder import zoo as towers
from perception_encoder.protocol import VisionEncoder
from perception_encoder.vision import VisionTransformer
from perception_lm.checkpoints import Format, Found, builder, export, open_folder, plm_pixels, save
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM
from perception_lm.projector import build_projector
from perception_lm.tokenizer import SPECIAL, LlamaTokenizer

if TYPE_CHECKING:
    from perception_lm.assistant import Assistant

__all__ = [
    "MODELS",
    "Entry",
    "Format",
    "Memory",
    "compose",
    "describe",
    "download",
    "estimate",
    "export",
    "list_models",
    "load",
    "load_decoder",
    "load_model",
    "save",
]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What travels together under one name.

    hub         the hub id; only its safetensors, configs and tokenizer are ever downloaded, never the pickles beside
    parameters  of the language model, the vision tower and the projector
    base        the decoder it was made from
    """

    config: PlmConfig
    hub: str
    parameters: tuple[int, int, int]
    base: str
    licence: str = "FAIR Noncommercial Research License"


MODELS: Registry[Entry] = Registry("language model")

# --- The published models: Cho et al. 2025 (arXiv:2504.13180), https://huggingface.co/facebook/Perception-LM-8B -----

_SCALING = RopeScaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=8192)
_1B = DecoderConfig(
    width=2048,
    depth=16,
    heads=32,
    kv_heads=8,
    mlp_width=8192,
    vocab=128_256,
    rope_scaling=_SCALING,
    tied=True,
    context=11_520,
)
_3B = replace(_1B, width=3072, depth=28, heads=24, mlp_width=8192, head_dim=128)
_8B = replace(_1B, width=4096, depth=32, mlp_width=14_336, head_dim=128, rope_scaling=None, tied=False)

for _size, _decoder, _tower, _parameters, _base in (
    ("1B", _1B, "PE-Lang-L14-448-Tiling", (1_235_814_400, 291_415_040, 6_295_552), "Llama-3.2-1B-Instruct"),
    ("3B", _3B, "PE-Lang-L14-448-Tiling", (3_212_749_824, 291_415_040, 12_589_056), "Llama-3.2-3B-Instruct"),
    ("8B", _8B, "PE-Lang-G14-448-Tiling", (8_030_261_248, 1_740_922_624, 23_076_864), "Llama-3.1-8B-Instruct"),
):
    _vision = towers.MODELS.get(_tower).vision
    _config = PlmConfig(
        vision=_vision,
        projector=ProjectorConfig(in_width=_vision.width, width=_decoder.width),
        decoder=_decoder,
    )
    MODELS.add(
        f"Perception-LM-{_size}",
        Entry(config=_config, hub=f"facebook/Perception-LM-{_size}", parameters=_parameters, base=_base),
    )

# The small model that comes with the package; its folder says what it is.
PACKAGED = ("PLM-nano",)
_WEIGHTS_FOLDER = Path(__file__).parent / "weights"


# --- Looking up ------------------------------------------------------------------------------------------------------


def list_models(pattern: str = "*") -> list[str]:
    """The names `load` knows that match a pattern. Case is ignored."""
    names = {*MODELS.names(), *_packaged()}
    return sorted(name for name in names if fnmatchcase(name.casefold(), pattern.casefold()))


def describe(name: str) -> dict[str, Any]:
    """What the zoo knows about a name or a published hub id, as plain values. Nothing is downloaded.

    Raises LookupError for names it does not know.
    """
    if name in _packaged():
        found = open_folder(_packaged()[name])
        config = cast(PlmConfig, found.config)
        return {
            "name": name,
            "config": config.to_dict(),
            "pixels": (found.pixels or plm_pixels(config.media)).to_dict(),
            "parameters": count_parameters(config),
            "hub": None,
        }
    name = _short(name)
    entry = _entry(name)
    parts = dict(zip(("decoder", "vision", "projector"), entry.parameters, strict=True))
    return {
        "name": name,
        "config": entry.config.to_dict(),
        "pixels": plm_pixels(entry.config.media).to_dict(),
        "parameters": {**parts, "total": sum(entry.parameters)},
        "hub": entry.hub,
        "base": entry.base,
        "licence": entry.licence,
    }


def catalogue(pattern: str = "*") -> list[dict[str, Any]]:
    """One entry for every name that matches: what `perception models` shows through the entry-point group
    `perception.models`.

    An entry has the keys of `perception_encoder.zoo.describe`; `text` is None, as there is no text tower, and beside
    them there is `decoder`.
    """
    found = []
    for name in list_models(pattern):
        known = describe(name)
        found.append(
            {
                "name": name,
                "kind": "lm",
                "parameters": known["parameters"]["total"],
                "vision": known["config"]["vision"],
                "text": None,
                "decoder": known["config"]["decoder"],
                "pixels": known["pixels"],
                "context": known["config"]["media"]["context"],
                "licence": known.get("licence", "Apache-2.0"),  # the packaged models are this project's own
                "weights": {"hub": known["hub"]} if known["hub"] else {"native": f"package://weights/{name}"},
            }
        )
    return found


def download(name: str, *, revision: str | None = None, offline: bool | None = None) -> Path:
    """Fetch a model into the hub's cache, and say where it is. Errors as `load`'s."""
    return _folder(name, revision, offline)


def count_parameters(config: PlmConfig) -> dict[str, int]:
    """Of each part and of all; a tied matrix counts once. Nothing is allocated."""
    with shapes_only():
        model = builder(config, 0)
    parts = {name: getattr(model, part) for name, part in _PARTS.items()}
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    return {**counts, "total": sum(counts.values())}


_PARTS = {"decoder": "decoder", "vision": "encoder", "projector": "projector"}


def _packaged() -> dict[str, Path]:
    folders = {name: _WEIGHTS_FOLDER / name for name in PACKAGED}
    return {name: folder for name, folder in folders.items() if (folder / CONFIG).is_file()}


def _short(name: str) -> str:
    """The zoo's name of a published hub id; other names as they are."""
    hubs = {MODELS.get(known).hub: known for known in MODELS.names()}
    return hubs.get(name.removeprefix("hf://"), name)


def _entry(name: str) -> Entry:
    if name not in MODELS:
        raise _unknown(name)
    return MODELS.get(name)


def _unknown(name: str) -> UnknownName:
    if towers.is_known(name):
        return UnknownName(
            f"{name!r} is a vision encoder; perception_encoder.load_encoder takes it, and `perception classify`, "
            "`embed` and `features`; compose(encoder=...) makes a language model see with it"
        )
    return unknown("language model", name, list_models())


@dataclass(frozen=True)
class Memory:
    """Bytes that a request needs: `weights`, `cache` for `tokens` positions, and `logits` and `media` at their peak."""

    weights: int
    cache: int
    media: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.media + self.logits


def estimate(
    name_or_config: str | PlmConfig,
    *,
    dtype: str | torch.dtype = "bfloat16",
    batch: int = 1,
    tokens: int | None = None,
    media_chunk: int = 8,
) -> Memory:
    """How much memory a model needs to answer, computed and not measured.

    tokens       of prompt and answer together; the model's whole context when not given
    media_chunk  tiles that go through the tower at once

    Raises LookupError for an unknown name.
    """
    if isinstance(name_or_config, PlmConfig):
        config = name_or_config
    elif name_or_config in _packaged():
        config = cast(PlmConfig, open_folder(_packaged()[name_or_config]).config)
    else:
        config = _entry(_short(name_or_config)).config
    size = pick_dtype(dtype, "cpu", torch.bfloat16).itemsize
    decoder, vision, media = config.decoder, config.vision, config.media
    tokens = media.context if tokens is None else tokens
    patches = (media.tile // vision.patch_size) ** 2 + vision.class_token
    # The widest moment of a tower's block: what it carries, and the hidden layer of its MLP before and after the GELU.
    tower = media_chunk * patches * (2 * vision.width + 2 * vision.mlp_width)
    return Memory(
        weights=count_parameters(config)["total"] * size,
        cache=2 * decoder.depth * decoder.kv_heads * decoder.head_dim * tokens * batch * size,
        media=tower * size,
        logits=batch * decoder.vocab * 4,
    )


# --- Loading ---------------------------------------------------------------------------------------------------------


def load(
    name_or_path: str | Path,
    *,
    tokenizer: str | Path | LlamaTokenizer | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    check_finite: bool = False,
) -> "Assistant":
    """A model that answers, in evaluation mode.

    name_or_path  a name of `list_models()`; a hub id (`facebook/Perception-LM-1B`); a folder in the original, the
                  Hugging Face or our own layout; a folder with a LoRA adapter, which names the model it is folded into
    tokenizer     another tokenizer than the folder's: a file (`tokenizer.model`, `tokenizer.json`) or an object
    device        "auto": the best one here
    dtype         "auto": float32 on a CPU, elsewhere what is stored
    check_finite  refuse NaN and infinity anywhere, instead of warning about those a quick look finds
    offline       True: no network. None: as HF_HUB_OFFLINE says

    Raises LookupError for an unknown name, ConfigError for a config that cannot be or a tokenizer that does not fit,
    CheckpointError for weights that are missing, damaged or another model's.
    """
    if os.path.isfile(os.path.join(name_or_path, "adapter_config.json")):  # noqa: PTH113, PTH118  a name may be too long for a Path
        from perception_lm.training.lora import apply_adapter, as_trained, base_of

        base = load(base_of(Path(name_or_path)), tokenizer=tokenizer, device=device, dtype=dtype, offline=offline)
        base = as_trained(base, name_or_path)
        apply_adapter(base.model, name_or_path)
        return base
    found = _open(name_or_path, revision, offline)
    words = _tokenizer(found, tokenizer)  # before the weights: it is quick, and may be missing
    model = _fill(found, device, dtype, check_finite)
    return assemble(model, words, cast(PlmConfig, found.config).media)


def load_model(
    name_or_path: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    offline: bool | None = None,
    check_finite: bool = False,
) -> tuple[PerceptionLM, PlmConfig, Path | None]:
    """The model alone, its config, and its tokenizer's file if the folder has one. Arguments and errors as `load`'s."""
    found = _open(name_or_path, revision, offline)
    return _fill(found, device, dtype, check_finite), cast(PlmConfig, found.config), found.tokenizer


def assemble(
    model: PerceptionLM, tokenizer: LlamaTokenizer, media: MediaConfig, pixels: PixelSpec | None = None
) -> "Assistant":
    """A model, its tokenizer and how it is shown media, as one thing that answers. Its tower's pixels by default."""
    from perception_lm.assistant import Assistant
    from perception_lm.processor import Processor

    patch = model.encoder.patch_size
    slots = cast(Any, model.projector).tokens(media.tile // patch, media.tile // patch)
    processor = Processor(tokenizer, media, slots, pixels or getattr(model.encoder, "preprocess", None))
    return Assistant(model, processor, tokenizer)


def _open(name_or_path: str | Path, revision: str | None, offline: bool | None) -> Found:
    found = open_folder(_folder(name_or_path, revision, offline))
    if not isinstance(found.config, PlmConfig):
        raise ConfigError(
            f"{found.folder} holds a Llama alone, which cannot see; put it behind a vision tower with "
            f"compose(encoder='PE-Lang-L14-448-Tiling', decoder={str(name_or_path)!r})"
        )
    return found


def _folder(name_or_path: str | Path, revision: str | None, offline: bool | None) -> Path:
    """A name, a hub id or a path to the folder it stands for."""
    if isinstance(name_or_path, str):
        if name_or_path in _packaged():
            return _packaged()[name_or_path]
        if name_or_path in MODELS:
            name_or_path = f"hf://{MODELS.get(name_or_path).hub}"
        elif not {"/", "\\"} & set(name_or_path) and not os.path.exists(name_or_path):  # noqa: PTH110  a name may be too long for a Path
            raise _unknown(name_or_path)
    # A snapshot is configs, tokenizers and safetensors: of a repository in two layouts, one is fetched.
    path = locate(name_or_path, revision=revision, offline=offline)
    if not path.is_dir():
        raise ConfigError(f"{path} is a file; a language model is a folder with its config and its tokenizer")
    return path


def _fill(found: Found, device: str | torch.device, dtype: str | torch.dtype, check_finite: bool) -> PerceptionLM:
    config, where = cast(PlmConfig, found.config), pick_device(device)
    model, _ = load_into(
        lambda: builder(config, found.media_token, found.pixels),
        lambda names: found.state(),
        dtype=pick_dtype(dtype, where, towers.stored_dtype(found.checkpoint)),
        device=where,
        check_finite=check_finite,
        origin=found.checkpoint.path,
    )
    return cast(PerceptionLM, model.eval())


def _tokenizer(found: Found, given: str | Path | LlamaTokenizer | None) -> LlamaTokenizer:
    if isinstance(given, LlamaTokenizer):
        tokenizer = given
    else:
        path = found.tokenizer if given is None else Path(given)
        if path is None:
            raise CheckpointError(
                f"{found.folder} has no tokenizer.model and no tokenizer.json; give one with tokenizer=PATH "
                "(--tokenizer PATH in the shell)"
            )
        tokenizer = LlamaTokenizer.from_file(path)
    config = cast(PlmConfig, found.config)
    if tokenizer.vocab != config.decoder.vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids and the model {config.decoder.vocab}: they do not belong together"
        )
    if tokenizer.image_token != found.media_token:
        raise ConfigError(
            f"its image token is {tokenizer.image_token}, but the model keeps slots with {found.media_token}"
        )
    return tokenizer


# --- Putting together ------------------------------------------------------------------------------------------------


def load_decoder(
    name_or_path: str | Path | DecoderConfig,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    offline: bool | None = None,
) -> tuple[nn.Module, Path | None]:
    """A decoder alone, and its tokenizer's file if there is one.

    name_or_path  a folder or hub id of a Llama 3 in Meta's or Hugging Face's layout; of a whole Perception LM, whose
                  decoder is taken; of any other causal language model of transformers (extra `hf`); a config, for
                  fresh weights

    Raises ConfigError and CheckpointError as `load` does, MissingExtra without transformers.
    """
    where = pick_device(device)
    if isinstance(name_or_path, DecoderConfig):
        with torch.device(where):
            decoder = Decoder(name_or_path).to(pick_dtype(dtype, where))
        return decoder, None
    folder = _folder(name_or_path, revision, offline)
    if (folder / CONFIG).is_file():
        data = read_config(folder)
        kind = data.get("model_type")
        ours = kind in ("llama", "perception_lm") or "format" in data
        if not ours and isinstance(kind, str) and not (folder / "original").is_dir():
            from perception_lm.integrations.transformers_decoder import TransformersDecoder

            tokenizer = next((path for path in (folder / "tokenizer.json",) if path.is_file()), None)
            return TransformersDecoder.load(folder, device=where, dtype=dtype), tokenizer
    found = open_folder(folder)
    if isinstance(found.config, PlmConfig):
        whole = _fill(found, where, dtype, False)
        return cast(nn.Module, whole.decoder), found.tokenizer
    config = found.config
    decoder, _ = load_into(
        lambda: Decoder(config),
        lambda names: found.state(),
        dtype=pick_dtype(dtype, where, towers.stored_dtype(found.checkpoint)),
        device=where,
        origin=found.checkpoint.path,
    )
    tokenizer = found.tokenizer or next(
        (path for path in (folder / "tokenizer.json", folder / "tokenizer.model") if path.is_file()), None
    )
    return decoder.eval(), tokenizer


def compose(
    *,
    encoder: str | Path | VisionEncoder,
    decoder: str | Path | DecoderConfig | nn.Module,
    projector: str | ProjectorConfig | nn.Module = "pooling",
    tokenizer: str | Path | LlamaTokenizer | None = None,
    media: MediaConfig | None = None,
    pixels: PixelSpec | None = None,
    media_token: int | None = None,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    seed: int = 0,
    offline: bool | None = None,
) -> "Assistant":
    """Any encoder and any decoder, with a projector between that has everything to learn.

    encoder      a name, hub id or path that `perception_encoder.load_encoder` takes, or a `VisionEncoder`
    decoder      what `load_decoder` takes, or a module of the `Decoder` protocol
    projector    "pooling" or "pixel_shuffle"; a config; a module of the `Projector` protocol
    tokenizer    its file, or an object; the decoder's own when not given
    media        how pictures are shown; tiles of the encoder's size when not given
    pixels       how a tile becomes numbers; squashed bicubically, with the encoder's own mean and deviation by default
    media_token  the id that keeps a slot; the tokenizer's `<|image|>` when not given
    seed         of the projector's fresh weights; the global generator is left as it was

    Raises ConfigError for parts that do not fit, and what loading them raises.
    """
    where = pick_device(device)
    if loaded := isinstance(encoder, str | Path):
        encoder = towers.load_encoder(encoder, device=where, dtype=dtype, offline=offline)
    path = None
    if isinstance(decoder, str | Path | DecoderConfig):
        decoder, path = load_decoder(decoder, device=where, dtype=dtype, offline=offline)
    if not isinstance(tokenizer, LlamaTokenizer):
        chosen = tokenizer or path
        if chosen is None:
            raise ConfigError("the decoder came without a tokenizer; give tokenizer='.../tokenizer.model'")
        tokenizer = LlamaTokenizer.from_file(chosen)
    width, context = int(cast(Any, decoder).width), _context(decoder)
    vocab = _vocab(decoder)
    if vocab is not None and tokenizer.vocab > vocab:
        raise ConfigError(
            f"the tokenizer has {tokenizer.vocab} ids and the decoder {vocab}; they do not belong together "
            f"(a Llama 3 decoder has room for the {len(SPECIAL)} special tokens)"
        )
    if media is None:
        media = MediaConfig(tile=_tile(encoder), context=min(context, MediaConfig().context))
    if isinstance(projector, str):
        if projector not in ("pooling", "pixel_shuffle"):
            raise ConfigError(f"no projector {projector!r}; there are 'pooling' and 'pixel_shuffle'")
        projector = ProjectorConfig(kind=cast(Any, projector), in_width=encoder.width, width=width)
    if isinstance(projector, ProjectorConfig):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            projector = build_projector(projector)
    like = next(cast(nn.Module, decoder).parameters())
    projector = projector.to(device=where, dtype=like.dtype)
    token = tokenizer.image_token if media_token is None else media_token
    model = PerceptionLM(encoder, cast(Any, projector), cast(Any, decoder), token)
    pixels = pixels or _pixels(encoder, media)
    if loaded and isinstance(encoder, VisionTransformer):
        encoder.preprocess = pixels
    return assemble(model.eval(), tokenizer, media, pixels)


def _pixels(encoder: Any, media: MediaConfig) -> PixelSpec:
    """A tile as the encoder expects it. Raises ConfigError for one that does not say its mean and deviation."""
    found = getattr(encoder, "preprocess", None)
    if not isinstance(found, PixelSpec):  # another library's transform: a list with a normalisation in it
        steps = getattr(getattr(found, "transform", None), "transforms", ())
        found = next((step for step in steps if hasattr(step, "mean") and hasattr(step, "std")), None)
    if found is None:
        raise ConfigError(
            f"{type(encoder).__name__} does not say how its pixels are normalised; give pixels=PixelSpec(...)"
        )
    mean, std = (tuple(float(v) for v in values) for values in (found.mean, found.std))
    return PixelSpec(size=media.tile, interpolation="bicubic", mean=cast(Any, mean), std=cast(Any, std))


def _tile(encoder: Any) -> int:
    """The side of the pictures an encoder was made for."""
    spec = getattr(encoder, "preprocess", None)
    config = getattr(encoder, "config", None)
    size = getattr(spec, "size", None) or getattr(config, "image_size", None)
    if not isinstance(size, int):
        raise ConfigError(f"{type(encoder).__name__} does not say its picture size; give media=MediaConfig(tile=...)")
    return size


def _context(decoder: Any) -> int:
    config = getattr(decoder, "config", None)
    return int(getattr(config, "context", None) or getattr(config, "max_position_embeddings", None) or 8192)


def _vocab(decoder: Any) -> int | None:
    config = getattr(decoder, "config", None)
    return getattr(config, "vocab", None) or getattr(config, "vocab_size", None)
