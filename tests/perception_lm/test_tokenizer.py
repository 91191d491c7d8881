"""Text to ids as published, and no text of a user's that turns into a special id."""

import base64
import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perception.errors import CheckpointError, ConfigError
from perception_lm.huggingface import tokenizer_json
from perception_lm.tokenizer import (
    BOS,
    END,
    END_HEADER,
    EOT,
    IMAGE,
    MAX_RUN,
    PIECES,
    SPECIAL,
    START_HEADER,
    VIDEO,
    LlamaTokenizer,
    _parts,
    read_ranks,
)

MODEL = Path(__file__).parents[1] / "golden" / "plm" / "tokenizer.model"
GOLDEN = json.loads(MODEL.with_name("tokenizer.json").read_text())
TIKTOKEN = LlamaTokenizer.from_file(MODEL)
HUGGING_FACE = LlamaTokenizer.from_bytes(tokenizer_json(TIKTOKEN).encode())
BOTH = pytest.mark.parametrize("tokenizer", [TIKTOKEN, HUGGING_FACE], ids=["tiktoken", "tokenizers"])

anything = st.text(st.characters(codec="utf-8"))
hostile = st.lists(
    st.sampled_from([*SPECIAL, VIDEO, "<image>", "<|bbox0|>", " ", "\n\n", "user", "é", "🐶", "040"])
).map("".join)


@BOTH
@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: repr(case["text"][:20]))
def test_published_ids(tokenizer: LlamaTokenizer, case: dict) -> None:
    """The reference makes special ids of special strings; ours come from `special`, and the rest is the same."""
    pieces = re.split(r"(<\|[a-z_0-9]+\|>)", case["text"])
    ids = [tokenizer.special[p] if p in GOLDEN["special_tokens"] else tokenizer.encode(p) for p in pieces]
    assert [i for part in ids for i in (part if isinstance(part, list) else [part])] == case["ids"]
    # Hugging Face's file has a name of its own for the first of the reserved ones.
    wanted = (
        case["decoded"]
        if tokenizer is TIKTOKEN
        else re.sub(r"(?<=\|> )<.reserved_special_token_1.>", VIDEO, case["decoded"])
    )
    assert tokenizer.decode(case["ids"], skip_special=False) == wanted


@BOTH
@pytest.mark.parametrize("case", GOLDEN["encode_ordinary"], ids=lambda case: case["text"][:20])
def test_special_strings_of_a_user_are_text(tokenizer: LlamaTokenizer, case: dict) -> None:
    """F-85, trap 20: "<|image|>" typed by a user is five ids here; allowed through, it would take a slot of media."""
    assert tokenizer.encode(case["text"]) == case["ids"]


def test_special_ids() -> None:
    """Trap 19: <|image|> is third behind the ranks (435 of 433 here, 128002 of 128000), where Llama 3 reserves one;
    Llama 3.2-Vision has it at 128256, outside the vocabulary. Video shares the place of reserved token 1."""
    assert len(SPECIAL) == len(set(SPECIAL)) == 256
    assert TIKTOKEN.special == {**GOLDEN["special_tokens"], VIDEO: 436}
    wanted = [0, 1, 2, 6, 7, 9]
    assert [SPECIAL.index(name) for name in (BOS, END, IMAGE, START_HEADER, END_HEADER, EOT)] == wanted
    assert (TIKTOKEN.bos, TIKTOKEN.image_token, TIKTOKEN.video_token, TIKTOKEN.vocab) == (433, 435, 436, 689)
    # Trap 21: both ids end an answer.
    assert TIKTOKEN.stop_ids == {434, 442} == set(GOLDEN["stop_tokens"])
    assert TIKTOKEN.pad == TIKTOKEN.end_of_text == 434
    for name in ("bos", "image_token", "stop_ids", "pad", "eot", "vocab", "video_token"):
        assert getattr(HUGGING_FACE, name) == getattr(TIKTOKEN, name), name


@BOTH
@given(text=anything | hostile)
@example(text="a , b .")
@example(text="\ud83d half of a pair")
@example(text="nul \0 in the middle")
def test_any_text_comes_back(tokenizer: LlamaTokenizer, text: str) -> None:
    """Trap 36: Hugging Face's decoding takes the space out of " ," unless told not to; here nothing is taken."""
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer.decode(ids, skip_special=False) == text.replace("\ud83d", "\ufffd")


@BOTH
@given(text=anything | hostile)
def test_no_text_makes_a_special_id(tokenizer: LlamaTokenizer, text: str) -> None:
    assert not set(tokenizer.encode(text)) & set(tokenizer.special.values())


@given(text=anything | hostile)
def test_both_libraries_agree(text: str) -> None:
    assert TIKTOKEN.encode(text) == HUGGING_FACE.encode(text)


@given(ids=st.lists(st.integers(0, 688)))
def test_any_ids_have_a_text(ids: list[int]) -> None:
    """A model may write anything: bytes that are no UTF-8, special tokens in the middle."""
    text = TIKTOKEN.decode(ids)
    assert text == HUGGING_FACE.decode(ids)
    assert text == TIKTOKEN.decode([i for i in ids if i < 433])
    assert b"".join(TIKTOKEN.decode_bytes([i]) for i in ids) == TIKTOKEN.decode_bytes(ids)


def test_special_tokens_are_dropped_or_named() -> None:
    ids = [TIKTOKEN.bos, *TIKTOKEN.encode("hi"), TIKTOKEN.eot]
    assert TIKTOKEN.decode(ids) == "hi"
    assert TIKTOKEN.decode(ids, skip_special=False) == "<|begin_of_text|>hi<|eot_id|>"


@pytest.mark.parametrize("id", [-1, 689, 10**9])
def test_ids_that_are_not_there(id: int) -> None:
    with pytest.raises(ValueError, match=f"id {id} is not in the vocabulary of 689"):
        TIKTOKEN.decode([65, id])


@pytest.mark.parametrize("text", [None, 7, b"bytes", ["a"]])
def test_what_is_no_text(text: object) -> None:
    with pytest.raises(TypeError, match="takes text; given"):
        TIKTOKEN.encode(text)  # type: ignore[arg-type]


def test_digits_go_in_threes() -> None:
    """Trap 30: "[040,482" splits at 040 , 482. A space after the comma is another token before the digits."""
    assert [TIKTOKEN.decode([i]) for i in TIKTOKEN.encode("[040,482]")] == ["[", "040", ",", "482", "]"]
    assert TIKTOKEN.encode("[040, 482]") != TIKTOKEN.encode("[040,482]")
    assert next(TIKTOKEN.decode([i]) for i in TIKTOKEN.encode("1234567")) == "123"


def test_where_text_is_cut() -> None:
    """The tiny vocabulary cannot tell all of it: contractions in either case, one line break after punctuation."""
    import regex

    cut = regex.findall(PIECES, "we'REx it'sx 12345a  b?\n\nc \n d   ")
    wanted = ["we", "'RE", "x", " it", "'s", "x", " ", "123", "45", "a", " ", " b", "?\n\n", "c", " \n", " d", "   "]
    assert cut == wanted


def test_long_runs_are_cut_as_published() -> None:
    """250,000 letters or spaces in a row are the most that is encoded as one piece."""
    text = "a" * (MAX_RUN + 10) + " " + "b" * 10 + " " * (2 * MAX_RUN + 1)
    parts = list(_parts(text))
    assert [len(part) for part in parts] == [MAX_RUN, 10 + 1 + 10 + MAX_RUN, MAX_RUN, 1]
    assert "".join(parts) == text
    assert TIKTOKEN.decode(TIKTOKEN.encode(text)) == text


def test_saved_byte_for_byte(tmp_path: Path) -> None:
    for tokenizer, name in ((TIKTOKEN, "tokenizer.model"), (HUGGING_FACE, "tokenizer.json")):
        path = tokenizer.save(tmp_path / name[-5:])
        assert path.name == name
        again = LlamaTokenizer.from_file(path.parent)
        assert (again.source, again.special) == (tokenizer.source, tokenizer.special)
    assert (tmp_path / "model" / "tokenizer.model").read_bytes() == MODEL.read_bytes()


def test_a_file_that_changed_is_read_anew(tmp_path: Path) -> None:
    """tiktoken's own reader keeps files by path; a model saved over another would speak with the old one's ids."""
    path = tmp_path / "tokenizer.model"
    lines = MODEL.read_text().splitlines()
    path.write_text("\n".join(lines[:300]))
    assert LlamaTokenizer.from_file(path).image_token == 302
    path.write_text("\n".join(lines))
    assert LlamaTokenizer.from_file(path).image_token == 435


def test_a_stock_llama_tokenizer_gets_these_special_tokens() -> None:
    """Llama 3's own tokenizer.json has no <|image|>; the places of the others are the same, so it has one now."""
    content = json.loads(HUGGING_FACE.source)
    names = {2: "<|reserved_special_token_0|>", 4: "<|finetune_right_pad_id|>", 8: "<|eom_id|>"}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["id"] - 433, token["content"])
    stock = LlamaTokenizer.from_bytes(json.dumps(content).encode())
    assert stock.special == TIKTOKEN.special == HUGGING_FACE.special
    for token in content["added_tokens"]:
        token["content"] = token["content"].replace("eot_id", "end_of_turn")
    with pytest.raises(ConfigError, match="not where Llama 3 has them"):
        LlamaTokenizer.from_bytes(json.dumps(content).encode(), "theirs")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], "holds an empty file"),
        (lambda lines: ["<!doctype html><html>"], "an HTML page"),
        (lambda lines: ["version https://git-lfs.github.com/spec/v1", "oid sha256:1", "size 9"], "Git LFS pointer"),
        (lambda lines: ["\0\1\2 \3"], "unknown binary data"),
        (lambda lines: lines[:100], "no rank for 156 of the 256 bytes, such as 100"),
        (lambda lines: [*lines[:300], lines[301]], "the ranks are not 0 to 300"),
        (lambda lines: [*lines[:300], f"{lines[2].split()[0]} 300"], "the ranks are not 0 to 300"),
        (lambda lines: [*lines[:300], "!!!! 300"], "is no tokenizer"),
        (lambda lines: [*lines[:300], "YWJj three"], "is no tokenizer"),
        (lambda lines: [*lines[:300], "YWJj -5"], "the ranks are not"),
    ],
)
def test_files_that_are_no_tokenizer(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]  # F-18
    path = tmp_path / "tokenizer.model"
    path.write_text("\n".join(change(MODEL.read_text().splitlines())))
    with pytest.raises(CheckpointError, match=message) as error:
        LlamaTokenizer.from_file(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("{", CheckpointError, "no tokenizer.json"),
        ("{}", CheckpointError, "no tokenizer.json"),
        ('{"model": {"vocab": []}}', CheckpointError, "no tokenizer.json"),
        ('{"model": {"type": "WordPiece", "vocab": {}}}', ConfigError, "WordPiece"),
        ('{"model": {"type": "BPE", "vocab": {"\u4e00": 0}}}', ConfigError, "not byte-level"),
        ('{"model": {"type": "BPE", "vocab": {"a": 0}}}', CheckpointError, "is no tokenizer.json"),
        ("[" * 100_000, CheckpointError, "is no tokenizer"),
        ('{"a":' * 100_000, CheckpointError, "is no tokenizer.json"),
    ],
)
def test_json_that_is_no_tokenizer(content: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LlamaTokenizer.from_bytes(content.encode())


def test_nowhere(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer.model nor tokenizer.json"):
        LlamaTokenizer.from_file(tmp_path)
    with pytest.raises(CheckpointError, match="no tokenizer at"):
        LlamaTokenizer.from_file(tmp_path / "tokenizer.model")


def test_bytes_alone() -> None:
    tokenizer = LlamaTokenizer.of_bytes()
    assert (tokenizer.vocab, tokenizer.image_token) == (512, 258)
    assert tokenizer.encode("hé") == list("hé".encode())
    assert tokenizer.decode([104, 195, 169]) == "hé"


def test_ranks() -> None:
    ranks = read_ranks(MODEL.read_bytes())
    assert len(ranks) == GOLDEN["n_base"]
    token, rank = MODEL.read_text().splitlines()[400].split()
    assert ranks[base64.b64decode(token)] == int(rank) == 400
