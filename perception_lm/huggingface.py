"""What transformers needs beside a model's weights: the processor, the tokenizer, the chat template."""

import json
from collections.abc import Mapping
from typing import Any

from perception.errors import ConfigError
from perception_encoder.tokenizer import byte_symbols
from perception_lm.chat import SYSTEM
from perception_lm.config import PlmConfig
from perception_lm.model import PerceptionLM
from perception_lm.tokenizer import BOS, END, EOT, IMAGE, PIECES, SPECIAL, VIDEO, LlamaTokenizer, read_ranks

# transformers has a name of its own for one of the reserved tokens.
NAMES = tuple(VIDEO if name == "<|reserved_special_token_1|>" else name for name in SPECIAL)

# The published format. Parts stand in the order they are given; a plain string is a text.
CHAT_TEMPLATE = """\
{%- macro header(role) -%}
<|start_header_id|>{{ role }}<|end_header_id|>{{ '\\n\\n' }}
{%- endmacro -%}
{%- macro body(content) -%}
{%- if content is string -%}
{{ content }}
{%- else -%}
{%- for part in content -%}
{%- if part['type'] == 'image' -%}<|image|>
{%- elif part['type'] == 'video' -%}<|video|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
<|begin_of_text|>
{%- if messages and messages[0]['role'] == 'system' -%}
{{ header('system') }}{{ body(messages[0]['content']) }}<|eot_id|>
{%- set turns = messages[1:] -%}
{%- else -%}
{{ header('system') }}SYSTEM<|eot_id|>
{%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
{{ header(message['role']) }}{{ body(message['content']) }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ header('assistant') }}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)


def special_ids(model: PerceptionLM, config: PlmConfig, tokenizer: LlamaTokenizer | None) -> dict[str, int]:
    """Ids of "bos", "end", "eot", "image" and "video", from the tokenizer, or by Perception LM's rule without one."""
    if tokenizer is None:
        first = config.decoder.vocab - len(SPECIAL)
        ids = {name: first + place for place, name in enumerate(NAMES)}
    else:
        ids = {**tokenizer.special, VIDEO: tokenizer.video_token}
    found = {"bos": ids[BOS], "end": ids[END], "eot": ids[EOT], "image": model.media_token, "video": ids[VIDEO]}
    if tokenizer is not None and ids[IMAGE] != model.media_token:
        raise ConfigError(f"the model keeps slots with id {model.media_token}, its tokenizer with {ids[IMAGE]}")
    if not all(0 <= id < config.decoder.vocab for id in found.values()):
        raise ConfigError(f"special ids {found} do not fit a vocabulary of {config.decoder.vocab}")
    return found


def side_files(config: PlmConfig, special: Mapping[str, int], tokenizer: LlamaTokenizer | None) -> dict[str, bytes]:
    """Names and contents of every file beside the config and the weights. Version 4 reads some, version 5 others."""
    media = config.media
    image = {
        "image_processor_type": "PerceptionLMImageProcessorFast",
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": media.tile, "width": media.tile},
    }
    video = {**image, "video_processor_type": "PerceptionLMVideoProcessor", "do_center_crop": False}
    del video["image_processor_type"]
    image.update(tile_size=media.tile, max_num_tiles=media.max_tiles, vision_input_type=media.tiling)
    processor = {
        "processor_class": "PerceptionLMProcessor",
        "patch_size": config.vision.patch_size,
        "pooling_ratio": config.projector.pool,
    }
    files: dict[str, Any] = {
        "generation_config.json": {
            "bos_token_id": special["bos"],
            "do_sample": False,
            "eos_token_id": [special["end"], special["eot"]],
            "pad_token_id": special["end"],
        },
        "preprocessor_config.json": {**image, "processor_class": "PerceptionLMProcessor"},
        "video_preprocessor_config.json": {**video, "processor_class": "PerceptionLMProcessor"},
        "processor_config.json": {
            **processor,
            "image_processor": {**image, "image_processor_type": "PerceptionLMImageProcessor"},
            "video_processor": video,
        },
    }
    texts = {"chat_template.jinja": CHAT_TEMPLATE}
    if tokenizer is not None:
        files["tokenizer_config.json"] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "processor_class": "PerceptionLMProcessor",
            "bos_token": BOS,
            "eos_token": EOT,
            "pad_token": END,
            "image_token": IMAGE,
            "video_token": VIDEO,
            "extra_special_tokens": {"image_token": IMAGE, "video_token": VIDEO},
            "model_max_length": media.context,
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
        }
        texts["tokenizer.json"] = tokenizer_json(tokenizer)
    return {
        **{name: (json.dumps(data, indent=2) + "\n").encode() for name, data in files.items()},
        **{name: text.encode() for name, text in texts.items()},
    }


def tokenizer_json(tokenizer: LlamaTokenizer) -> str:
    """Hugging Face's file of a tokenizer: byte pairs with the merges that tiktoken's ranks imply, and our specials."""
    if tokenizer.filename.endswith(".json") and {IMAGE, VIDEO} <= _added(tokenizer.source).keys():
        return tokenizer.source.decode()
    ranks, symbol = ranks_of(tokenizer), byte_symbols()

    def text(piece: bytes) -> str:
        return "".join(symbol[byte] for byte in piece)

    added = [
        {"id": len(ranks) + place, "content": name, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for place, name in enumerate(NAMES)
    ]
    start = {"SpecialToken": {"id": BOS, "type_id": 0}}
    sequences = [{"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB")]
    second = {"SpecialToken": {"id": BOS, "type_id": 1}}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": PIECES}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, sequences[0]],
            "pair": [start, sequences[0], second, sequences[1]],
            "special_tokens": {BOS: {"id": BOS, "ids": [len(ranks)], "tokens": [BOS]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # a piece that is a token is that token, as in tiktoken
            "vocab": {text(piece): rank for piece, rank in ranks.items()},
            "merges": [[text(left), text(right)] for left, right in merges(ranks)],
        },
    }
    return json.dumps(content, ensure_ascii=False, indent=2) + "\n"


def merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs that may become a token, earliest token first.

    tiktoken joins any two neighbours whose union is a token, the earliest token first; a list of merges says the same
    when it holds every way to cut every token in two.
    """
    found = []
    for piece in sorted(ranks, key=ranks.__getitem__):
        cuts = ((piece[:i], piece[i:]) for i in range(1, len(piece)))
        pairs = [pair for pair in cuts if pair[0] in ranks and pair[1] in ranks]
        found += sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
    return found


def ranks_of(tokenizer: LlamaTokenizer) -> dict[bytes, int]:
    """Bytes to rank, whichever file the tokenizer was read from. Raises ConfigError when the ids have holes."""
    if tokenizer.filename.endswith(".model"):
        return read_ranks(tokenizer.source)
    byte = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocabulary, added = json.loads(tokenizer.source)["model"]["vocab"], _added(tokenizer.source)
    ranks = {bytes(byte[s] for s in token): id for token, id in vocabulary.items() if token not in added}
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ConfigError("the tokenizer's ids are not 0, 1, 2, ...: tiktoken's format cannot hold it")
    return ranks


def _added(source: bytes) -> dict[str, int]:
    return {token["content"]: token["id"] for token in json.loads(source).get("added_tokens", ())}


def tiktoken_file(tokenizer: LlamaTokenizer) -> bytes:
    """`tokenizer.model` as the reference reads it, byte for byte where it was read from one."""
    import base64

    if tokenizer.filename.endswith(".model"):
        return tokenizer.source
    ranks = ranks_of(tokenizer)
    first = {name: len(ranks) + place for place, name in enumerate(SPECIAL)}
    if any(tokenizer.special.get(name, id) != id for name, id in first.items()):
        raise ConfigError(
            "the tokenizer's special tokens are not in Perception LM's order; tiktoken's format has no other"
        )
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for piece, rank in ranks.items())
