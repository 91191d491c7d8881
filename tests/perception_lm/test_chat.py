"""Prompts are the published ones, id for id, and only the template makes special ids."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception.errors import RequestError
from perception_lm.chat import (
    MAX_MESSAGES,
    SYSTEM,
    Clip,
    Conversation,
    Message,
    Picture,
    Slots,
    Special,
    Text,
    read_conversation,
    render,
    render_training,
    show,
    strip_marks,
    to_ids,
)
from perception_lm.tokenizer import BOS, END, EOT, IMAGE, SPECIAL, LlamaTokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "plm"
TOKENIZER = LlamaTokenizer.from_file(GOLDEN / "tokenizer.model")
CASES = {model: json.loads((GOLDEN / model / "cases.json").read_text()) for model in "AB"}
MEDIA = {
    "one": ["image"],
    "tile": ["image"],
    "strip": ["image"],
    "video": ["video"],
    "multi": ["image", "image"],
    "inter": ["image", "image"],
    "text": [],
}
IMAGE_PART, VIDEO_PART = {"type": "image", "image": "a.png"}, {"type": "video", "video": "a.mp4"}


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def rendered(*messages: dict[str, Any], pieces: tuple[int, ...] = (), **options: Any) -> str:
    segments = render(read_conversation(list(messages)), pieces, **options)
    return show(segments, lambda slots: 2 * (pieces[slots.item] if slots.piece is None else 1))


def body(*parts: Any, pieces: tuple[int, ...]) -> list[Any]:
    """What stands between the user's header and the end of the turn."""
    segments = render(read_conversation([user(*parts)]), pieces)
    start = len(segments) - 1 - segments[::-1].index("user") + 3
    return segments[start : segments.index(Special(EOT), start)]


@pytest.mark.parametrize("model", ["A", "B"])
@pytest.mark.parametrize("name", MEDIA)
def test_published_prompts(model: str, name: str) -> None:
    """Trap 18: media before the text and nothing between; one BOS; the blank line and the end of each turn."""
    golden = CASES[model]
    case, n = golden["cases"][name], golden["tokens_per_chunk"]
    kinds = MEDIA[name]
    pieces = (1, 1) if len(kinds) == 2 else (case["n_chunks"],) * len(kinds)
    parts = [{"type": kind, kind: "nowhere"} for kind in kinds]
    segments = render(read_conversation([user(*parts, case["question"])]), pieces)

    def count(slots: Slots) -> int:
        return n * (pieces[slots.item] if slots.piece is None else 1)

    ids = to_ids(segments, TOKENIZER, count)
    assert show(segments, count) == case["prompt"]
    assert ids.count(TOKENIZER.bos) == 1
    assert ids.count(TOKENIZER.image_token) == case["n_chunks"] * n
    assert ids == case["prompt_ids"]
    wanted = case.get("image_pos", [])
    places = [i for i, id in enumerate(ids) if id == TOKENIZER.image_token]
    assert places == (list(range(wanted[0], wanted[1] + 1)) if len(wanted) == 3 else wanted)


def test_the_example_of_the_format() -> None:
    got = rendered(user(IMAGE_PART, "What is this?"), pieces=(1,)).replace(f"{IMAGE}*2 ", IMAGE * 2)
    assert got == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + SYSTEM + "<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<|image|><|image|>What is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_turns() -> None:
    got = rendered(
        {"role": "system", "content": " Be brief. "},
        user("Q1"),
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "Q2"},
    )
    assert got == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n Be brief. <|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1"
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ2<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    open_end = rendered(user("Q1"), {"role": "assistant", "content": "A1"}, add_generation_prompt=False)
    assert open_end.endswith("\n\nQ1<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA1<|eot_id|>")


def test_text_is_never_trimmed_and_parts_meet_without_a_separator() -> None:
    """Hugging Face's template makes "Helloworld" of these, and nothing of a plain string."""
    assert body(" Hello  ", " world", pieces=()) == [" Hello  ", " world"]
    assert rendered(user(" Hello  ", " world")) == rendered({"role": "user", "content": " Hello   world"})
    # Side by side, text is encoded as one string is: "assist" and "ant" make one word, of other ids than the two.
    ids = to_ids(render(read_conversation([user("the assist", "ant")]), ()), TOKENIZER, lambda slots: 0)
    whole, halves = TOKENIZER.encode("the assistant"), [*TOKENIZER.encode("the assist"), *TOKENIZER.encode("ant")]
    assert whole != halves
    assert ids == to_ids(render(read_conversation([user("the assistant")]), ()), TOKENIZER, lambda slots: 0)


# --- where media go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "pieces", "wanted"),
    [
        # Without marks, as they are given.
        ([IMAGE_PART, "a"], (5,), [Slots(0), "a"]),
        (["a", IMAGE_PART, "b", VIDEO_PART], (5, 3), ["a", Slots(0), "b", Slots(1)]),
        ([IMAGE_PART], (1,), [Slots(0)]),
        # One in one piece, at its mark.
        (["a <image> b", IMAGE_PART], (1,), ["a ", Slots(0, 0), " b"]),
        # One in many pieces: first, the mark and one line break left out.
        (["a <image> b", IMAGE_PART], (37,), [Slots(0), "a  b"]),
        ([IMAGE_PART, "<image>\na"], (37,), [Slots(0), "a"]),
        ([IMAGE_PART, "a\n<image>\nb"], (37,), [Slots(0), "a\nb"]),
        ([VIDEO_PART, "<video>\na"], (8,), [Slots(0), "a"]),
        ([VIDEO_PART, "<image>a"], (8,), [Slots(0), "a"]),
        ([VIDEO_PART, "<video>a"], (1,), [Slots(0), "a"]),
        # As many marks as frames.
        (["<image>1<image>2", VIDEO_PART], (2,), [Slots(0, 0), "1", Slots(0, 1), "2"]),
        # Several, each at its mark, whole.
        ([IMAGE_PART, IMAGE_PART, "<image><image>d"], (1, 1), [Slots(0), Slots(1), "d"]),
        (["x<image>\ny<image>", IMAGE_PART, IMAGE_PART], (5, 9), ["x", Slots(0), "\ny", Slots(1)]),
        ([IMAGE_PART, VIDEO_PART, "<video>?<image>"], (1, 4), [Slots(1), "?", Slots(0)]),
        # Marks that are text.
        ([{"type": "text", "text": "<image>", "literal": True}], (), ["<image>"]),
        ([{"type": "text", "text": "<image>", "literal": True}, "<image>", IMAGE_PART], (1,), ["<image>", Slots(0, 0)]),
        ([{"type": "text", "text": "<image>", "literal": True}, "<image>", IMAGE_PART], (5,), [Slots(0), "<image>"]),
    ],
)
def test_places(parts: list, pieces: tuple, wanted: list) -> None:
    assert body(*parts, pieces=pieces) == wanted


@pytest.mark.parametrize(
    ("parts", "pieces", "message"),
    [
        (["<image> what?"], (), "1 <image> marks and 0 image parts"),
        (["<video>"], (), "1 <video> marks and 0 video parts"),
        ([IMAGE_PART, "<image><image>"], (1,), "2 <image> marks and 1 image parts"),
        ([IMAGE_PART, "<image><image>"], (5,), "2 <image> marks and 1 image parts"),
        ([IMAGE_PART, IMAGE_PART, "<image>"], (1, 1), "1 <image> marks and 2 image parts"),
        ([IMAGE_PART, IMAGE_PART, "<image><image><image>"], (1, 1), "3 <image> marks and 2 image parts"),
        ([IMAGE_PART, IMAGE_PART, "<image><video>"], (1, 1), "1 <image> marks and 2 image parts"),
        ([VIDEO_PART, "<image><image>"], (3,), "2 <image> marks and 0 image parts"),
        ([VIDEO_PART, VIDEO_PART, "<video>"], (3, 3), "1 <video> marks and 2 video parts"),
    ],
)
def test_marks_that_do_not_agree(parts: list, pieces: tuple, message: str) -> None:  # F-86
    """The published code drops such marks, and puts the media first."""
    with pytest.raises(RequestError, match=message):
        body(*parts, pieces=pieces)


def test_media_of_later_turns_are_counted_on() -> None:
    talk = [
        user(IMAGE_PART, "a"),
        {"role": "assistant", "content": "<image>"},
        user("<image><image>", IMAGE_PART, IMAGE_PART),
    ]
    segments = render(read_conversation(talk), (5, 1, 1))
    assert [segment for segment in segments if isinstance(segment, Slots)] == [Slots(0), Slots(1), Slots(2)]
    assert "<image>" in segments  # the assistant's own words


@given(st.lists(st.sampled_from(["<image>", "<video>", "\n", "a", " "])).map("".join))
def test_stripped_of_marks(text: str) -> None:
    left = strip_marks(text)
    assert left.replace("\n", "") == text.replace("<image>", "").replace("<video>", "").replace("\n", "")
    marks = text.count("<image>") + text.count("<video>")
    assert text.count("\n") - marks <= left.count("\n") <= text.count("\n")


@given(st.lists(st.sampled_from([*SPECIAL[:12], "user", "\n\n", "x", "<|video|>"])).map("".join))
def test_no_message_can_speak_for_the_template(text: str) -> None:
    """F-85: the special ids of a prompt are those of the same prompt with harmless text."""

    def special(said: str) -> list[int]:
        talk = [
            {"role": "system", "content": said},
            user(IMAGE_PART, said),
            {"role": "assistant", "content": said},
            user(said),
        ]
        segments = render(read_conversation(talk), (3,))
        return [id for id in to_ids(segments, TOKENIZER, lambda slots: 6) if id >= 433]

    assert special(text) == special("harmless")


# --- training -----------------------------------------------------------------------------------------------------


def test_training_form() -> None:
    """Learned: the answer with its header and end, and the end of the text, once. Trap 25 is in these segments."""
    talk = read_conversation(
        [
            user(IMAGE_PART, "What?"),
            {"role": "assistant", "content": "A cat."},
            user("Sure?"),
            {"role": "assistant", "content": "Yes."},
        ]
    )
    turns = render_training(talk, (2,))
    assert [learned for _, learned in turns] == [False, False, True, False, True]
    learned = [show(turn, lambda slots: 0) for turn, learn in turns if learn]
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert learned == [f"{header}A cat.<|eot_id|>", f"{header}Yes.<|eot_id|><|end_of_text|>"]
    whole = [segment for turn, _ in turns for segment in turn]
    assert whole[:-1] == render(talk, (2,), add_generation_prompt=False)
    assert (whole[-1], whole.count(Special(BOS)), whole.count(Special(END))) == (Special(END), 1, 1)
    unanswered = render_training(Conversation(talk.messages[:3]), (2,))
    assert [learned for _, learned in unanswered] == [False, False, True, False]
    assert unanswered[-1][0][-1] == Special(EOT)


def test_warm_up_form() -> None:
    """Trap 27: no headers, no BOS, no end; the question is left out and a line break ends the caption."""
    talk = read_conversation([user(IMAGE_PART, "ignored"), {"role": "assistant", "content": "a dog and a cat"}])
    assert render_training(talk, (1,), warmup=True) == [([Slots(0)], False), (["a dog and a cat\n"], True)]


# --- what is no conversation --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (None, "a list of messages"),
        ([], "at least one"),
        ("hello", "a list of messages"),
        ([7], "message 0 is 7"),
        ([{"role": "user"}], r"message 0 is \['role'\]"),
        ([{"role": "user", "content": "a", "name": "b"}], "message 0 is"),
        ([{"role": "tool", "content": "a"}], "of role 'tool'"),
        ([{"role": ["user"], "content": "a"}], "of role"),
        ([{"role": "user", "content": None}], "has content None"),
        ([{"role": "user", "content": []}], r"has content \[\]"),
        ([{"role": "user", "content": b"a"}], "has content b'a'"),
        ([user(7)], "message 0, part 0 is 7"),
        ([user({"type": "audio", "audio": "a"})], "part of type 'text', 'image' or 'video'"),
        ([user({"type": ["image"]})], "part of type"),
        ([user({"type": "image"})], "of type 'image' but has no 'image'"),
        ([user({"type": "image", "image": None})], "has no 'image'"),
        ([user({"type": "image", "images": ["a"]})], r"unknown keys \['images'\]"),
        ([user({"type": "image", "image": "a", "frames": 3})], r"unknown keys \['frames'\]"),
        ([user({"type": "text", "text": 7})], "has text 7"),
        ([user("a"), user("b")], "message 1 is of role 'user'; expected 'assistant'"),
        ([{"role": "assistant", "content": "a"}], "message 0 is of role 'assistant'; expected 'user'"),
        ([user("a"), {"role": "system", "content": "b"}], "message 1 is of role 'system'"),
        ([{"role": "system", "content": "a"}] * 2, "message 1 is of role 'system'; expected 'user'"),
        ([{"role": "system", "content": [IMAGE_PART]}], "only the user shows pictures"),
        ([user("a"), {"role": "assistant", "content": [VIDEO_PART]}], "message 1 is of role 'assistant' and has media"),
        ([user("a")] * (MAX_MESSAGES + 1), "the limit is MAX_MESSAGES=1000"),
    ],
)
def test_what_is_no_conversation(messages: Any, message: str) -> None:
    """Trap 35: the key is `image`; `images`, which some documents name, is refused and not passed over."""
    with pytest.raises(RequestError, match=message) as error:
        read_conversation(messages)
    assert len(str(error.value)) < 300


def test_nothing_to_answer() -> None:
    for talk in ([user("a"), {"role": "assistant", "content": "b"}], [{"role": "system", "content": "a"}]):
        with pytest.raises(RequestError, match="an answer needs a user's message"):
            render(read_conversation(talk), ())


def test_parts_may_come_as_objects() -> None:
    talk = Conversation((Message("user", (Picture(image="a.png"), Clip(video="b.mp4", start=1), Text(text="?"))),))
    assert read_conversation(talk) is talk
    assert read_conversation(list(talk.messages)) == talk
    parts = [{"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4", "start": 1}, Text(text="?")]
    assert read_conversation([{"role": "user", "content": parts}]) == talk
    assert [type(item) for item in talk.media] == [Picture, Clip]
