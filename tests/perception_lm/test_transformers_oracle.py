"""transformers, run live on the same tiny random weights: its models read here, and ours read there.

Both directions go through files: `save_pretrained` -> our loader, and our export -> `from_pretrained`.
"""

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from plm_tiny import perturb, tiny_config, tiny_model
from safetensors.torch import load_file
from torch import Tensor

from perception.checkpoint import load_into
from perception_lm import checkpoints
from perception_lm import foreign_configs as foreign
from perception_lm.chat import read_conversation, render, to_ids
from perception_lm.checkpoints import export, open_folder
from perception_lm.config import PlmConfig
from perception_lm.decoder import Decoder
from perception_lm.tokenizer import IMAGE, LlamaTokenizer
from perception_lm.zoo import load_model


def sized(**changes: Any) -> PlmConfig:
    """transformers wants the width to divide into the heads, though each has a width of its own."""
    return tiny_config(**{"width": 48, "head_dim": 12, **changes})


VARIANTS = {
    "like 1B": {"tied": True, "class_token": True, "scaled": True},
    "like 8B": {"tied": False, "class_token": False, "scaled": False, "heads": 4, "kv_heads": 1, "head_dim": 8},
}


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    try:
        import timm  # noqa: F401
        import transformers
        from transformers import PerceptionLMForConditionalGeneration  # noqa: F401
    except Exception as error:
        pytest.skip(f"transformers with its PerceptionLM cannot be imported here: {error}")
    return transformers


@pytest.fixture
def tokenizer(golden: Path) -> LlamaTokenizer:
    return LlamaTokenizer.from_file(golden / "plm" / "tokenizer.model")


@pytest.fixture(params=VARIANTS)
def config(request: pytest.FixtureRequest) -> PlmConfig:
    return sized(**VARIANTS[request.param])


def inputs(config: PlmConfig, items: int = 2) -> tuple[Tensor, Tensor]:
    """Tokens 1 T with slots for two tiles, and their pixels."""
    g = torch.Generator().manual_seed(3)
    grid = config.vision.grid // config.projector.pool
    tokens = torch.randint(0, 430, (1, 20 + items * grid**2), generator=g)
    tokens[0, 7 : 7 + items * grid**2] = config.decoder.vocab - 254
    return tokens, torch.randn(items, 3, config.media.tile, config.media.tile, generator=g)


def theirs(model: Any, tokens: Tensor, pixels: Tensor) -> Tensor:
    return model(input_ids=tokens, pixel_values=pixels[None], attention_mask=torch.ones_like(tokens)).logits


def from_pretrained(transformers: ModuleType, folder: Path) -> Any:
    model, info = transformers.PerceptionLMForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


@torch.inference_mode()
def test_what_we_export_loads_there_and_gives_equal_logits(
    transformers: ModuleType, tmp_path: Path, config: PlmConfig, tokenizer: LlamaTokenizer
) -> None:
    """No key missing, none unexpected; logits of text, of pictures and of both differ by less than 1e-4."""
    ours = tiny_model(config)
    export(ours, tmp_path / "hf", "hf", media=config.media, tokenizer=tokenizer)
    model = from_pretrained(transformers, tmp_path / "hf")
    tokens, pixels = inputs(config)
    wanted = theirs(model, tokens, pixels)
    assert wanted.std() > 0.3
    assert (ours(tokens, pixels) - wanted).abs().max() < 1e-4
    text = torch.randint(0, 430, (2, 9))
    assert (ours(text) - model(input_ids=text).logits).abs().max() < 1e-4
    tie = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tie == config.decoder.tied


@torch.inference_mode()
def test_shards_load_there(transformers: ModuleType, tmp_path: Path, tokenizer: LlamaTokenizer) -> None:
    config = sized(tied=False)
    ours = tiny_model(config)
    export(ours, tmp_path / "hf", "hf", media=config.media, tokenizer=tokenizer, shard=100_000)
    model = from_pretrained(transformers, tmp_path / "hf")
    tokens, pixels = inputs(config)
    assert (ours(tokens, pixels) - theirs(model, tokens, pixels)).abs().max() < 1e-4


@torch.inference_mode()
def test_what_they_save_loads_here_and_gives_equal_logits(
    transformers: ModuleType, tmp_path: Path, config: PlmConfig
) -> None:
    """Their own random model, their own `save_pretrained` in the spelling of the installed version, in shards too."""
    special = {"bos": 433, "end": 434, "eot": 442}
    described = foreign.write_hugging_face(config, media_tokens=(435, 436), special=special, dtype="float32")
    settings = transformers.PerceptionLMConfig(**{k: v for k, v in described.items() if k != "model_type"})
    torch.manual_seed(1)
    model = perturb(transformers.PerceptionLMForConditionalGeneration(settings).float(), 2)
    tokens, pixels = inputs(config)
    wanted = theirs(model, tokens, pixels)
    for name, options in {"one": {}, "shards": {"max_shard_size": "100KB"}}.items():
        model.save_pretrained(tmp_path / name, **options)
        ours, read, _ = load_model(tmp_path / name, device="cpu")
        assert read.vision == config.vision
        assert read.decoder == config.decoder
        assert read.projector == config.projector
        assert (ours(tokens, pixels) - wanted).abs().max() < 1e-4
    assert (tmp_path / "shards" / "model.safetensors.index.json").is_file()
    assert "rope_parameters" in json.loads((tmp_path / "one" / "config.json").read_text())["text_config"]
    # And out again: the very tensors they wrote.
    export(ours, tmp_path / "again", "hf", media=read.media)
    before = load_file(tmp_path / "one" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    before.pop("lm_head.weight", None) if config.decoder.tied else None
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", ["A", "B"])
@torch.inference_mode()
def test_the_golden_originals_load_there_after_our_export(
    transformers: ModuleType, golden: Path, tmp_path: Path, tokenizer: LlamaTokenizer, name: str
) -> None:
    """original -> ours -> Hugging Face: the logits of the reference, from another library's code."""
    ours, read, _ = load_model(golden / "plm" / name / "original", device="cpu", dtype="float32")
    export(ours, tmp_path / "hf", "hf", media=read.media, tokenizer=tokenizer)
    model = from_pretrained(transformers, tmp_path / "hf")
    from plm_tiny import golden_case

    tokens, pixels, wanted = golden_case(golden, name)
    assert (theirs(model, tokens, pixels)[0, -1] - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("tied", [True, False])
@torch.inference_mode()
def test_a_llama_of_theirs_is_our_decoder(transformers: ModuleType, tmp_path: Path, tied: bool) -> None:
    """Llama 3.2's scaled rope, grouped heads, a head_dim of its own; and the same out again."""
    config = sized(tied=tied).decoder
    settings = foreign.write_hugging_face_llama(config, dtype="float32")
    torch.manual_seed(0)
    settings = {k: v for k, v in settings.items() if k not in ("architectures", "model_type")}
    model = perturb(transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)), 1)
    model.save_pretrained(tmp_path / "llama")
    found = open_folder(tmp_path / "llama")
    assert found.config == config
    ours, _ = load_into(lambda: Decoder(config), lambda names: found.state())
    tokens = torch.randint(0, 600, (2, 40))
    wanted = model(input_ids=tokens).logits
    assert wanted.std() > 0.3
    assert (ours(ours.embed(tokens)) - wanted).abs().max() < 1e-4
    back = checkpoints.convert(ours.state_dict(), checkpoints.hugging_face_llama(config), back=True)
    state = model.state_dict()
    assert set(back) | {"lm_head.weight"} == set(state)
    assert all(torch.equal(back[key], state[key]) for key in back)


@torch.inference_mode()
def test_greedy_answers_are_equal(
    transformers: ModuleType, tmp_path: Path, config: PlmConfig, tokenizer: LlamaTokenizer
) -> None:
    """24 tokens of their `generate` with its cache are the 24 of ours without one."""
    ours = tiny_model(config)
    export(ours, tmp_path / "hf", "hf", media=config.media, tokenizer=tokenizer)
    model = from_pretrained(transformers, tmp_path / "hf")
    tokens, pixels = inputs(config)
    out = model.generate(
        input_ids=tokens,
        pixel_values=pixels[None],
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
    )
    mine = tokens
    for _ in range(24):
        mine = torch.cat([mine, ours(mine, pixels, last=1)[:, -1].argmax(-1)[:, None]], 1)
    assert out.tolist() == mine.tolist()


# --- The files beside the weights ----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, tokenizer: LlamaTokenizer) -> Path:
    config = sized()
    export(tiny_model(config), tmp_path / "hf", "hf", media=config.media, tokenizer=tokenizer)
    return tmp_path / "hf"


TEXTS = (
    "This is a test sentence.",
    "",
    " ",
    "a  b\n\n c\t\r\n  ",
    "[040,482,112,576] 1234567 3.14",
    "It's we'LL don'T I'm",
    "naïve café Ünïcödé 中文字符 🙂👩‍👩‍👧 \u200b",
    "x" * 300 + " " * 50,
    "!?.,;:()[]{} ... ---",
    "\x00\x07",
)


def test_their_tokenizer_gives_our_ids(transformers: ModuleType, folder: Path, tokenizer: LlamaTokenizer) -> None:
    """`tokenizer.json` is made from the ranks: the same ids for every text, the same text back, one BOS if asked."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert words.encode(text, add_special_tokens=False) == ids, text
        assert words.decode(ids) == tokenizer.decode(ids), text
    assert words.encode("a") == [433, *tokenizer.encode("a")]
    assert len(words) == tokenizer.vocab == 689
    assert (words.bos_token_id, words.eos_token_id, words.pad_token_id) == (433, 442, 434)
    assert (words.image_token_id, words.video_token_id) == (435, 436)
    assert words.convert_ids_to_tokens([435, 436, 437, 441, 688]) == [
        "<|image|>",
        "<|video|>",
        "<|reserved_special_token_2|>",
        "<|reserved_special_token_4|>",
        "<|reserved_special_token_250|>",
    ]
    for name, id in tokenizer.special.items():
        if name != "<|reserved_special_token_1|>":  # their name for it is <|video|>
            assert words.convert_tokens_to_ids(name) == id


def test_the_golden_tokenizers_strings_are_theirs_too(transformers: ModuleType, folder: Path, golden: Path) -> None:
    words = transformers.AutoTokenizer.from_pretrained(folder)
    data = json.loads((golden / "plm" / "tokenizer.json").read_text())
    pairs = _strings(data)
    assert len(pairs) > 5
    for text, ids in pairs:
        assert words.encode(text, add_special_tokens=False) == ids, text


def _strings(data: dict) -> list[tuple[str, list[int]]]:
    """The strings of the golden file in which no special token stands."""
    return [(entry["text"], entry["ids"]) for entry in data["encode"] if "<|" not in entry["text"]]


def test_our_reader_takes_the_tokenizer_we_made(folder: Path, tokenizer: LlamaTokenizer) -> None:
    """tokenizer.model -> tokenizer.json -> our tokenizer -> tokenizer.model: the same ids, the same ranks."""
    from perception_lm.huggingface import ranks_of, tiktoken_file

    again = LlamaTokenizer.from_file(folder / "tokenizer.json")
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text), text
    assert (again.image_token, again.video_token, again.vocab) == (435, 436, 689)
    assert ranks_of(again) == ranks_of(tokenizer)
    assert LlamaTokenizer.from_bytes(tiktoken_file(again)).encode("hello") == tokenizer.encode("hello")
    assert tiktoken_file(tokenizer) == tokenizer.source


def test_a_token_that_no_merges_reach_is_still_itself() -> None:
    """tiktoken looks a whole piece up before it merges: "abc" is a token here, though neither "ab" nor "bc" is."""
    import base64

    from perception_lm.huggingface import tokenizer_json

    pieces = [*(bytes([byte]) for byte in range(256)), b"abc"]
    lines = b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))
    words = LlamaTokenizer.from_bytes(lines)
    again = LlamaTokenizer.from_bytes(tokenizer_json(words).encode())
    assert words.encode("abc") == again.encode("abc") == [256]
    assert words.encode("abcd") == again.encode("abcd") == [97, 98, 99, 100]


CONVERSATIONS = (
    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}],
    [{"role": "user", "content": "Plain text, as a string."}],
    [
        {
            "role": "user",
            "content": [{"type": "text", "text": "  a  "}, {"type": "image"}, {"type": "text", "text": "b"}],
        }
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Differ?"}]},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "How?"},
    ],
)


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_their_chat_template_renders_our_prompt(
    transformers: ModuleType, folder: Path, tokenizer: LlamaTokenizer, messages: list
) -> None:
    """The exported template keeps order, spaces and plain strings, which the published one loses; ids are ours."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    template = (folder / "chat_template.jinja").read_text()
    with_media = json.loads(json.dumps(messages))
    for message in with_media:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image":
                    part["image"] = "x.png"
    conversation = read_conversation(with_media)
    ours = to_ids(render(conversation, [1] * len(conversation.media)), tokenizer, lambda slots: 1)
    text = words.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    assert words.encode(text, add_special_tokens=False) == ours
    plain = words.apply_chat_template(messages, chat_template=template, tokenize=False)
    assert text == plain + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_their_processor_makes_our_prompt(transformers: ModuleType, folder: Path, tokenizer: LlamaTokenizer) -> None:
    """AutoProcessor reads every file: slots, tiles and pixels of a picture are those of our processor."""
    from PIL import Image

    from perception_lm.processor import Processor

    processor = transformers.AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "PerceptionLMProcessor"
    assert (processor.patch_size, processor.pooling_ratio) == (6, 2)
    assert (processor.image_processor.tile_size, processor.image_processor.max_num_tiles) == (24, 4)
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 255, (31, 50, 3), dtype=np.uint8)).resize((150, 93))
    messages = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]}]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    config = sized()
    ours = Processor(tokenizer, config.media, 4)([messages])
    assert batch["input_ids"].tolist() == ours.tokens.tolist()
    assert int((ours.tokens == tokenizer.special[IMAGE]).sum()) == 5 * 4
    assert ours.pixels is not None
    assert batch["pixel_values"].shape == (1, 5, 3, 24, 24)
    assert (batch["pixel_values"][0] - ours.pixels).abs().max() < 3.5 / 127.5  # three grey levels


def test_their_generation_config_stops_where_ours_does(transformers: ModuleType, folder: Path) -> None:
    settings = transformers.GenerationConfig.from_pretrained(folder)
    assert (settings.do_sample, settings.bos_token_id, settings.eos_token_id) == (False, 433, [434, 442])
