"""The same ids as the reference and as open_clip, for any text."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perception.errors import ConfigError
from perception_encoder.tokenizer import ClipTokenizer, vocabulary

START, END = 49406, 49407


def quietly(tokenizer: ClipTokenizer, texts: list[str]) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a text that is cut; test_truncation looks at that
        return tokenizer(texts)


def test_golden(golden: Path) -> None:
    cases = json.loads((golden / "tokenizer.json").read_text("utf-8"))["cases"]
    assert len(cases) == 60
    for context in (32, 72):
        tokens = quietly(ClipTokenizer(context), [case["text"] for case in cases])
        wanted = torch.zeros(len(cases), context, dtype=torch.int64)
        for row, case in enumerate(cases):
            wanted[row, : len(case[f"ids{context}"])] = torch.tensor(case[f"ids{context}"])
        assert torch.equal(tokens, wanted)
    tokenizer = ClipTokenizer()
    assert [tokenizer.encode(case["text"]) for case in cases] == [case["bpe"] for case in cases]


def test_vocabulary() -> None:
    v = vocabulary()
    assert len(v.symbols) == len(v.ids) == 49408
    assert (v.start, v.end) == (START, END)
    assert (v.ids["!"], v.ids["!</w>"], v.ids["a</w>"]) == (0, 256, 320)


@pytest.fixture(scope="module")
def oracle():
    try:
        import open_clip
    except Exception as error:
        pytest.skip(f"open_clip cannot be imported here: {error}")
    return open_clip.tokenizer.SimpleTokenizer(context_length=32)


AWKWARD = st.text(
    alphabet=st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \t\n'’\"<>&;|_-.,!?0123456789aAbBİßﬁé日本🐶\u200d\u0301\u00a0\u2028"),
    ),
    max_size=40,
)


@given(text=AWKWARD)
@example(text="<end_of_text> hello <START_of_text>")
@example(text="&amp;lt;b&gt; it's they'LL we’ve")
@example(text="x\x00y\x1cz")
@settings(max_examples=400, deadline=None, derandomize=True)
def test_equals_open_clip(oracle, text: str) -> None:
    assert quietly(ClipTokenizer(32), [text])[0].tolist() == oracle([text])[0].tolist()


@given(text=AWKWARD, context=st.integers(2, 80))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_every_row_starts_ends_and_is_padded_with_zeros(text: str, context: int) -> None:
    tokenizer = ClipTokenizer(context, allow_special=False)
    row = quietly(tokenizer, [text])[0]
    assert row[0] == START
    end = int(row.argmax())
    assert row[end] == END
    assert not row[end + 1 :].any()
    assert end + 1 == min(context, len(tokenizer.encode(text)) + 2)


def test_decode_brings_the_words_back() -> None:
    tokenizer = ClipTokenizer(32)
    assert tokenizer.decode(tokenizer("A red car, é 日本")[0]) == "a red car , é 日本"
    with pytest.raises(ValueError, match="id 50000 is not in the vocabulary"):
        tokenizer.decode([50000])


def test_truncation_keeps_the_end_and_says_so() -> None:
    """F-80: one warning with the count, not one a text."""
    texts = ["word " * 5000, "short", "w " * 31]
    with pytest.warns(UserWarning, match="2 of 3 texts are longer than 32 ids and were cut") as caught:
        tokens = ClipTokenizer(32)(texts)
    assert len(caught) == 1
    assert tokens[:, -1].tolist() == [END, 0, END]
    assert tokens[0, 1:31].unique().tolist() == [2653]


@pytest.mark.parametrize("text", ["", "  ", "\x00", "👩\u200d👩\u200d👧\u200d👦"])
def test_f80_odd_texts_are_texts(text: str) -> None:
    row = ClipTokenizer(32)(text)[0]
    assert row[0] == START
    assert END in row


def test_f81_special_strings() -> None:
    text = "<end_of_text> hello"
    assert ClipTokenizer(32)(text)[0, :5].tolist() == [START, END, 3306, END, 0]
    plain = ClipTokenizer(32, allow_special=False)(text)[0].tolist()
    assert plain.count(END) == 1
    assert plain.index(3306) < plain.index(END)


def test_f82_what_is_not_text() -> None:
    tokenizer = ClipTokenizer(32)
    empty = tokenizer([])
    assert empty.shape == (0, 32)
    assert empty.dtype == torch.int64
    for bad in (None, 7, [None], ["a", 3]):
        with pytest.raises(TypeError, match="takes"):
            tokenizer(bad)
    for bad in (1, 0, -3, 2.5, True):
        with pytest.raises(ConfigError, match="2 ids or more"):
            ClipTokenizer(bad)
