"""Where foreign names meet ours, and the folders they come in. No model file knows that other names exist.

Meta and the reference turn neighbouring channels of a head; Hugging Face turns channel i with channel i + head_dim/2,
and its files hold the rows of the query and key matrices in that other order. The tables carry them over, exactly.

E decoder width
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from perception.checkpoint import (
    CONFIG,
    INDEX,
    MAX_CONFIG,
    WEIGHTS,
    Checkpoint,
    Converted,
    Rule,
    check_folder,
    check_vacant,
    convert,
    inside,
    open_checkpoint,
    prefixed,
    read_config,
    read_folder,
    read_json,
    save_folder,
    write_safetensors,
)
from perception.errors import CheckpointError, ConfigError
from perception.files import atomic_write, sha256_of
from perception.pixels import PixelSpec
from perception_encoder.checkpoints import REFERENCE_TOWER, TIMM_TOWER
from perception_encoder.vision import VisionTransformer
from perception_lm import foreign_configs as foreign
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.decoder import Decoder
from perception_lm.model import PerceptionLM, build
from perception_lm.projector import PROJECTORS
from perception_lm.tokenizer import SPECIAL, LlamaTokenizer

Format = Literal["native", "original", "hf"]

# --- Tables ----------------------------------------------------------------------------------------------------------


def to_neighbours(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key matrix from half-split to neighbouring pairs: heads*head_dim E, both."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """The inverse of `to_neighbours`."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _turned(heads: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    return partial(to_neighbours, heads=heads), partial(to_halves, heads=heads)


def meta_llama(config: DecoderConfig) -> tuple[Rule, ...]:
    """Meta's names, which are the reference's too. Of a tied model, copies of the embedding are known and dropped."""
    head = (Rule("output.weight", None), Rule("output.tied_module.weight", None))
    return (
        Rule("tok_embeddings.weight", "token_embed.weight"),
        Rule("layers.*.attention_norm.weight", "blocks.*.norm1.weight"),
        Rule("layers.*.attention.wq.weight", "blocks.*.attn.q.weight"),
        Rule("layers.*.attention.wk.weight", "blocks.*.attn.k.weight"),
        Rule("layers.*.attention.wv.weight", "blocks.*.attn.v.weight"),
        Rule("layers.*.attention.wo.weight", "blocks.*.attn.o.weight"),
        Rule("layers.*.ffn_norm.weight", "blocks.*.norm2.weight"),
        Rule("layers.*.feed_forward.w1.weight", "blocks.*.mlp.gate.weight"),
        Rule("layers.*.feed_forward.w3.weight", "blocks.*.mlp.up.weight"),
        Rule("layers.*.feed_forward.w2.weight", "blocks.*.mlp.down.weight"),
        Rule("norm.weight", "norm.weight"),
        *(head if config.tied else (Rule("output.weight", "head.weight"),)),
        Rule("rope.freqs", None),  # a table that is computed
    )


def hugging_face_llama(config: DecoderConfig, inner: str = "model.") -> tuple[Rule, ...]:
    """transformers' names. Queries and keys have their own numbers of heads, so each is turned by its own."""
    layer = f"{inner}layers.*."
    return (
        Rule(f"{inner}embed_tokens.weight", "token_embed.weight"),
        Rule(f"{layer}input_layernorm.weight", "blocks.*.norm1.weight"),
        Rule(f"{layer}self_attn.q_proj.weight", "blocks.*.attn.q.weight", *_turned(config.heads)),
        Rule(f"{layer}self_attn.k_proj.weight", "blocks.*.attn.k.weight", *_turned(config.kv_heads)),
        Rule(f"{layer}self_attn.v_proj.weight", "blocks.*.attn.v.weight"),
        Rule(f"{layer}self_attn.o_proj.weight", "blocks.*.attn.o.weight"),
        Rule(f"{layer}post_attention_layernorm.weight", "blocks.*.norm2.weight"),
        Rule(f"{layer}mlp.gate_proj.weight", "blocks.*.mlp.gate.weight"),
        Rule(f"{layer}mlp.up_proj.weight", "blocks.*.mlp.up.weight"),
        Rule(f"{layer}mlp.down_proj.weight", "blocks.*.mlp.down.weight"),
        Rule(f"{inner}norm.weight", "norm.weight"),
        Rule("lm_head.weight", None if config.tied else "head.weight"),
        Rule(f"{layer}self_attn.rotary_emb.inv_freq", None),  # old files store what is computed
    )


def original(config: PlmConfig) -> tuple[Rule, ...]:
    """The reference's names of a whole model."""
    return (
        *prefixed(REFERENCE_TOWER, "vision_model.", "encoder."),
        Rule("vision_projector.projector.0.*", "projector.fc1.*"),
        Rule("vision_projector.projector.2.*", "projector.fc2.*"),
        *prefixed(meta_llama(config.decoder), "", "decoder."),
    )


def hugging_face(config: PlmConfig) -> tuple[Rule, ...]:
    """transformers' names of a whole model. The tower's rotary order is ours already: its qkv is left as it is."""
    return (
        *prefixed(TIMM_TOWER, "model.vision_tower.timm_model.", "encoder."),
        Rule("model.multi_modal_projector.linear_1.*", "projector.fc1.*"),
        Rule("model.multi_modal_projector.linear_2.*", "projector.fc2.*"),
        *prefixed(hugging_face_llama(config.decoder, "model.language_model."), "", "decoder."),
    )


# The embedding, and the names under which a tied model's file may hold it again.
_META_TIES = ("tok_embeddings.weight", ("output.weight", "output.tied_module.weight"))
_TIES = {
    "original": _META_TIES,
    "hf": ("model.language_model.embed_tokens.weight", ("lm_head.weight",)),
    "meta llama": _META_TIES,
    "hf llama": ("model.embed_tokens.weight", ("lm_head.weight",)),
}


def _check_ties(state: Mapping[str, Tensor], ties: tuple[str, tuple[str, ...]], where: object) -> None:
    """A tied model's second copy must be the first, to the bit: one of the two would be lost."""
    embedding, copies = ties
    for copy in copies:
        if copy in state and embedding in state and not same_bits(state[copy], state[embedding]):
            raise CheckpointError(
                f"{where}: {copy} and {embedding} are one matrix in a tied model, and differ here; set the config to "
                "an untied model if the file is right"
            )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit: NaN equals itself, and 0 is not -0."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    a, b = (t.contiguous().flatten().view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


# --- Folders of others -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A model on disk: what it is, and how its tensors become ours.

    layout        "native", "original", "hf", "meta llama" or "hf llama"
    media_token   the id that keeps a slot for media
    tokenizer     the tokenizer's file, None when the folder has none
    pixels        what its tower expects
    """

    layout: str
    folder: Path
    config: PlmConfig | DecoderConfig
    checkpoint: Checkpoint
    table: tuple[Rule, ...]
    media_token: int = -1
    tokenizer: Path | None = None
    pixels: PixelSpec | None = field(default=None)

    def state(self) -> Converted:
        """The tensors in our names. Names that no rule knows are in `unknown`, for `load_into` to refuse."""
        decoder = self.config.decoder if isinstance(self.config, PlmConfig) else self.config
        if decoder.tied and self.layout in _TIES:
            _check_ties(self.checkpoint, _TIES[self.layout], self.checkpoint.path)
        return convert(self.checkpoint, self.table, strict=False, origin=self.checkpoint.path)


def open_folder(folder: str | Path) -> Found:
    """A folder that holds a Perception Language Model, in any layout, or a Llama alone.

    Ours and Hugging Face's are told by `config.json`; the original by `params.json`, here or under `original/`. A
    folder with both is read as Hugging Face's, whose safetensors need no unpickling.

    Raises ConfigError for a config that is missing, hostile or another model's, CheckpointError for weights that are
    missing or damaged. No weights are read yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder}; a language model is a folder with its config and tokenizer")
    if (folder / CONFIG).exists():
        data = read_config(folder)
        if data.get("format") == FORMAT:
            return _open_native(folder, data)
        kind = data.get("model_type")
        if kind == "perception_lm":
            return _open_hugging_face(folder, data)
        if kind == "llama":
            config = foreign.read_hugging_face_llama(data, folder / CONFIG)
            return Found("hf llama", folder, config, open_checkpoint(folder), hugging_face_llama(config))
        if not _has_params(folder):
            if data.get("format") is not None:
                raise ConfigError(f"{folder / CONFIG} holds a {data['format']!r} model; expected {FORMAT!r}")
            raise ConfigError(f"{folder / CONFIG} is of model_type {kind!r}; expected 'perception_lm' or 'llama'")
    if (folder / PARAMS).exists():
        return _open_original(folder)
    if _has_params(folder):
        return _open_original(folder / ORIGINAL)
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise ConfigError(
        f"folder {folder} has neither {CONFIG} nor {PARAMS}: it holds {there}. A model folder has {PARAMS} with "
        f"consolidated.pth (original), or {CONFIG} with {WEIGHTS} (Hugging Face and ours)"
    )


PARAMS, ORIGINAL, TOKENIZER = "params.json", "original", "tokenizer.model"


def _has_params(folder: Path) -> bool:
    return (folder / ORIGINAL / PARAMS).is_file()


def _within(folder: Path, name: str) -> Path:
    """`inside`, also for `original/` in a snapshot of the hub's cache, whose links lead to the cache's blobs."""
    path, home = folder / name, folder.resolve()
    nested = folder.name == ORIGINAL and home.parent.parent.name == "snapshots" and Path(name).name == name
    if nested and path.is_symlink() and path.resolve().is_relative_to(home.parents[2] / "blobs"):
        return path
    return inside(folder, name)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    """A table from a JSON file in `folder`; the tested reader of `config.json` for every other name."""
    return read_json(_within(folder, name), MAX_CONFIG, ConfigError)


def _open_original(folder: Path) -> Found:
    data = _read_json(folder, PARAMS)
    checkpoint = open_parts(folder)
    where = folder / PARAMS
    tokenizer = _first_file(folder, TOKENIZER) or (
        _first_file(folder.parent, TOKENIZER) if folder.name == ORIGINAL else None
    )
    model = data.get("model")
    if not (isinstance(model, dict) and model.get("vision_model")) and "dim" in data:
        embedding, copies = _META_TIES
        tied = embedding in checkpoint and all(
            same_bits(checkpoint[embedding], checkpoint[copy]) for copy in copies if copy in checkpoint
        )
        llama = foreign.read_meta_llama(data, tied, where)
        return Found("meta llama", folder, llama, checkpoint, meta_llama(llama), tokenizer=tokenizer)
    config = foreign.read_params(data, where)
    if config.decoder.vocab <= len(SPECIAL):
        raise ConfigError(f"{where}: a vocabulary of {config.decoder.vocab} has no room for {len(SPECIAL)} specials")
    # The special tokens follow the ranks, however many those are.
    media_token = config.decoder.vocab - len(SPECIAL) + SPECIAL.index("<|image|>")
    return Found(
        "original", folder, config, checkpoint, original(config), media_token, tokenizer, plm_pixels(config.media)
    )


def _first_file(folder: Path, *names: str) -> Path | None:
    return next((_within(folder, name) for name in names if (folder / name).is_file()), None)


class _Part:
    """One file of several, as `Checkpoint` takes its sources."""

    def __init__(self, checkpoint: Checkpoint):
        self.keys, self.read, self.release = checkpoint.keys, checkpoint.__getitem__, checkpoint.release


def open_parts(folder: Path) -> Checkpoint:
    """`consolidated.pth`, or all of `consolidated.00.pth`, `consolidated.01.pth`, ... as one. Safetensors also.

    Raises CheckpointError for a part that is missing, and for a tensor that two parts hold and that differs.
    """
    whole = [name for name in ("consolidated.safetensors", "consolidated.pth") if (folder / name).exists()]
    parts: dict[str, dict[int, str]] = {}
    for path in sorted(folder.iterdir()):
        if found := re.fullmatch(r"consolidated\.(\d{2,5})\.(pth|safetensors)", path.name):
            parts.setdefault(found[2], {})[int(found[1])] = path.name
    if bool(whole) + len(parts) > 1 or len(whole) > 1:
        names = [*whole, *(name for numbered in parts.values() for name in numbered.values())]
        raise CheckpointError(f"{folder} holds {', '.join(names)}: which of them is the model? Remove the others")
    if whole:
        return open_checkpoint(_within(folder, whole[0]))
    if not parts:
        raise CheckpointError(f"folder {folder} has {PARAMS} and no consolidated.pth")
    ((suffix, numbered),) = parts.items()
    if missing := [n for n in range(max(numbered) + 1) if n not in numbered]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {max(numbered) + 1} parts are missing, such as "
            f"consolidated.{missing[0]:02}.{suffix}"
        )
    opened = [open_checkpoint(_within(folder, name)) for name in numbered.values()]
    seen: dict[str, Checkpoint] = {}
    for part in opened:
        for key in part:
            if key in seen and not same_bits(seen[key][key], part[key]):
                raise CheckpointError(
                    f"{part.path} and {seen[key].path} both hold {key!r}, and not the same: slices for several "
                    "devices are not joined here; use the Hugging Face layout of this model"
                )
            seen.setdefault(key, part)
    often = sum(part.release_after for part in opened)
    return Checkpoint(folder, [_Part(part) for part in reversed(opened)], release_after=often)


def _open_hugging_face(folder: Path, data: dict[str, Any]) -> Found:
    names = ("processor_config.json", "preprocessor_config.json")
    processor = next((_read_json(folder, name) for name in names if (folder / name).is_file()), None)
    config = foreign.read_hugging_face(data, processor, folder / CONFIG)
    image, _ = foreign.read_media_tokens(data, folder / CONFIG)
    if image >= config.decoder.vocab:
        raise ConfigError(f"{folder / CONFIG}: image_token_id {image} is outside the vocabulary")
    tokenizer = _first_file(folder, "tokenizer.json", TOKENIZER)
    if tokenizer is None and (folder / ORIGINAL).is_dir():
        tokenizer = _first_file(folder / ORIGINAL, TOKENIZER)
    return Found(
        "hf",
        folder,
        config,
        open_checkpoint(folder),
        hugging_face(config),
        image,
        tokenizer,
        plm_pixels(config.media),
    )


def plm_pixels(media: MediaConfig) -> PixelSpec:
    """What every published model was shown: tiles squashed bicubically, in [-1, 1]."""
    return PixelSpec(size=media.tile, interpolation="bicubic")


def builder(config: PlmConfig, media_token: int, pixels: PixelSpec | None = None) -> PerceptionLM:
    """A fresh model whose tower knows its pixels."""
    model = build(config, media_token)
    cast(VisionTransformer, model.encoder).preprocess = pixels or plm_pixels(config.media)
    return model


# --- Our own folder --------------------------------------------------------------------------------------------------

FORMAT, VERSION = "perception-lm", 1


def _open_native(folder: Path, data: dict[str, Any]) -> Found:
    _check_native(data, folder / CONFIG)  # before the weights are opened
    data, checkpoint = read_folder(folder)
    config, media_token, pixels = _check_native(data, folder / CONFIG)
    path = None
    if (tokenizer := data["tokenizer"]) is not None:
        path = inside(folder, tokenizer["file"])
        if not path.is_file():
            raise CheckpointError(f"{folder} has lost its tokenizer, {path.name}")
        if sha256_of(path) != tokenizer["sha256"]:
            raise CheckpointError(f"{path} is not the tokenizer this model was saved with: its sha256 differs")
    return Found("native", folder, config, checkpoint, (Rule("**", "**"),), media_token, path, pixels)


def _check_native(data: Mapping[str, Any], where: Path) -> tuple[PlmConfig, int, PixelSpec]:
    if data.get("version") != VERSION:
        raise ConfigError(f"{where} has version {data.get('version')!r}; this release reads {VERSION}")
    wanted = {"format", "version", "model", "media_token", "pixels", "tokenizer"}
    strange, missing = set(data) - wanted - {"weights"}, wanted - set(data)
    if strange or missing:
        raise ConfigError(f"{where}: unknown keys {sorted(strange)}, missing keys {sorted(missing)}")
    config, token, tokenizer = PlmConfig.from_dict(data["model"]), data["media_token"], data["tokenizer"]
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < config.decoder.vocab:
        raise ConfigError(f"{where}: media_token is {token!r}; expected an id below {config.decoder.vocab}")
    if tokenizer is not None and not (
        isinstance(tokenizer, dict)
        and set(tokenizer) == {"file", "sha256"}
        and all(isinstance(value, str) for value in tokenizer.values())
    ):
        raise ConfigError(f"{where}: 'tokenizer' is {str(tokenizer)[:80]}; expected its 'file' and 'sha256'")
    return config, token, PixelSpec.from_dict(data["pixels"])


def config_of(model: nn.Module, media: MediaConfig | None = None) -> PlmConfig:
    """The config of a model of our own parts. Raises ConfigError for others: their parts have formats of their own."""
    if not isinstance(model, PerceptionLM):
        raise ConfigError(f"only a PerceptionLM is written in these formats; given {type(model).__name__}")
    kinds = {kind: name for name, kind in PROJECTORS.items()}
    parts = {
        "encoder": isinstance(model.encoder, VisionTransformer),
        "projector": type(model.projector) in kinds,
        "decoder": isinstance(model.decoder, Decoder),
    }
    if strangers := [
        f"its {name} is a {type(getattr(model, name)).__name__}" for name, ours in parts.items() if not ours
    ]:
        raise ConfigError(f"only models of our own parts are written; {', '.join(strangers)}")
    encoder, decoder = cast(VisionTransformer, model.encoder), cast(Decoder, model.decoder)
    projector = cast(Any, model.projector)
    size = encoder.config.image_size
    return PlmConfig(
        vision=encoder.config,
        projector=ProjectorConfig(
            kind=cast(Any, kinds[type(projector)]),
            in_width=projector.in_width,
            width=projector.width,
            pool=projector.pool,
        ),
        decoder=decoder.config,
        media=media or MediaConfig(tile=size, context=min(decoder.config.context, MediaConfig().context)),
    )


def save(
    model: PerceptionLM,
    folder: str | Path,
    *,
    media: MediaConfig | None = None,
    tokenizer: LlamaTokenizer | None = None,
    pixels: PixelSpec | None = None,
    replace: bool = True,
) -> None:
    """Write a model as a folder of ours: at every instant it holds one whole model, old or new.

    media    how pictures are shown to it; the published way for its size when not given
    pixels   how a tile becomes numbers; what its tower says when not given
    replace  False: a folder that holds another model is refused

    Raises ConfigError for a model with foreign parts, CheckpointError when the disk refuses.
    """
    folder, config = Path(folder), config_of(model, media)
    pixels = pixels or cast(VisionTransformer, model.encoder).preprocess
    if not isinstance(pixels, PixelSpec):
        raise ConfigError("the tower's `preprocess` is no PixelSpec, so it cannot be written down; give pixels=")
    data: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model": config.to_dict(),
        "media_token": model.media_token,
        "pixels": pixels.to_dict(),
        "tokenizer": None,
    }
    state = _plain_state(model)
    if not replace:
        check_vacant(folder, CONFIG, data)
    with _disk(folder):
        if tokenizer is not None:
            data["tokenizer"] = _save_tokenizer(folder, tokenizer)
        save_folder(folder, state, data, replace=replace)


def _save_tokenizer(folder: Path, tokenizer: LlamaTokenizer) -> dict[str, str]:
    """Beside the old one, if that is another: until the config changes, the folder is the old model.

    Nor is the old one removed after that: another process may be saving a model that names it.
    """
    sha256 = hashlib.sha256(tokenizer.source).hexdigest()
    path = folder / tokenizer.filename
    if path.is_file() and sha256_of(path) != sha256:
        path = path.with_stem(f"{path.stem}-{sha256[:12]}")
    if not path.is_file() or sha256_of(path) != sha256:
        with atomic_write(path) as temporary:
            temporary.write_bytes(tokenizer.source)
    return {"file": path.name, "sha256": sha256}


# --- Writing other people's formats ----------------------------------------------------------------------------------

SHARD = 5 * 10**9  # bytes; what transformers' own files are cut at


def export(
    model: PerceptionLM,
    folder: str | Path,
    format: Format = "native",
    *,
    media: MediaConfig | None = None,
    tokenizer: LlamaTokenizer | None = None,
    pixels: PixelSpec | None = None,
    shard: int = SHARD,
    replace: bool = True,
) -> None:
    """Write a model as a folder in one of three layouts.

    "native"    ours; see `save`
    "original"  `params.json`, `consolidated.pth`, `tokenizer.model`, as the reference reads them
    "hf"        `config.json`, safetensors in shards of at most `shard` bytes, and what transformers needs of the
                processor, the tokenizer and the chat template

    replace     False: a folder that holds another model is refused

    Every file is whole or not there, and the config comes last. Raises ConfigError for a model the layout cannot hold,
    CheckpointError when the disk refuses.
    """
    if format not in get_args(Format):
        raise ConfigError(f"no format {format!r} to write; there are: {', '.join(get_args(Format))}")
    folder = Path(folder)
    check_folder(folder, "a language model")
    if format == "native":
        save(model, folder, media=media, tokenizer=tokenizer, pixels=pixels, replace=replace)
        return
    config = config_of(model, media)
    if pixels is not None and pixels != plm_pixels(config.media):
        raise ConfigError(
            f"the {format!r} layout has one way to make pixels, {plm_pixels(config.media)}; given {pixels}"
        )
    write = _export_original if format == "original" else partial(_export_hugging_face, shard=shard)
    with _disk(folder):
        write(model, config, folder, tokenizer, replace=replace)


def _export_original(
    model: PerceptionLM, config: PlmConfig, folder: Path, tokenizer: LlamaTokenizer | None, *, replace: bool
) -> None:
    from perception_lm.huggingface import tiktoken_file

    state = _plain_state(model)
    dtype = {torch.float32: "fp32", torch.float16: "fp16"}.get(_dtype(state), "bf16")
    params = foreign.write_params(config, name=folder.name, dtype=dtype)
    source = None if tokenizer is None else tiktoken_file(tokenizer)
    if not replace:
        check_vacant(folder)
    if (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder} holds a {CONFIG}, whose model would be read in its place; give another folder, or remove that"
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Own storage for each: torch.save writes whole storages, and a view may be part of a mapped file.
    theirs = {key: _own(tensor) for key, tensor in convert(state, original(config), back=True).items()}
    if config.decoder.tied:  # the reference's own files hold it twice; here it is one storage, so no larger
        theirs["output.tied_module.weight"] = theirs["tok_embeddings.weight"]
    with atomic_write(folder / "consolidated.pth") as temporary:
        torch.save(theirs, temporary)
    if source is not None:
        _write_bytes(folder / TOKENIZER, source)
    _write_json(folder / PARAMS, params)


def _own(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def _export_hugging_face(
    model: PerceptionLM, config: PlmConfig, folder: Path, tokenizer: LlamaTokenizer | None, *, shard: int, replace: bool
) -> None:
    from perception_lm import huggingface

    state = _plain_state(model)
    special = huggingface.special_ids(model, config, tokenizer)
    files = huggingface.side_files(config, special, tokenizer)
    dtype = str(_dtype(state)).removeprefix("torch.")
    tokens = (special["image"], special["video"])
    described = foreign.write_hugging_face(config, media_tokens=tokens, special=special, dtype=dtype)
    if not replace:
        check_vacant(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_shards(folder, convert(state, hugging_face(config), back=True), shard)
    for name, content in files.items():
        _write_bytes(folder / name, content)
    _write_json(folder / CONFIG, described)


def write_shards(folder: Path, state: Mapping[str, Tensor], limit: int = SHARD) -> None:
    """`model.safetensors`, or shards of at most `limit` bytes with their index; a larger tensor is a shard alone."""
    groups: list[list[str]] = [[]]
    size = total = 0
    for key in state:
        nbytes = state[key].nbytes
        if groups[-1] and size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(key)
        size, total = size + nbytes, total + nbytes
    names = [f"model-{n:05}-of-{len(groups):05}.safetensors" for n in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [WEIGHTS]
    for name, keys in zip(names, groups, strict=True):
        with atomic_write(folder / name) as temporary:
            write_safetensors(temporary, _Some(state, keys))
    if len(groups) > 1:
        table = {key: name for name, keys in zip(names, groups, strict=True) for key in keys}
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})
    # What an earlier export of another size left would be read first, or not at all.
    for path in folder.glob("model*.safetensors*"):
        stale = re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?", path.name)
        if stale and path.name not in names and not (path.name == INDEX and len(groups) > 1):
            path.unlink()


class _Some(Mapping[str, Tensor]):
    """Some tensors of a state dict, still read and changed one at a time."""

    def __init__(self, state: Mapping[str, Tensor], keys: Sequence[str]):
        self.state, self.names = state, list(keys)

    def __getitem__(self, key: str) -> Tensor:
        return self.state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    if odd := [name for name, tensor in state.items() if type(tensor) is not Tensor or tensor.is_meta]:
        raise ConfigError(
            f"{len(odd)} tensors of the model are not plain ({', '.join(odd[:3])}): a quantised or empty model is not "
            "written; write the model it was made from"
        )
    return state


def _dtype(state: Mapping[str, Tensor]) -> torch.dtype:
    return state["decoder.token_embed.weight"].dtype


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    _write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def _write_bytes(path: Path, content: bytes) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def _disk(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = error.filename or os.fspath(folder)
        raise CheckpointError(
            f"cannot write {where}: {error.strerror or error}; free space, or another folder"
        ) from error
