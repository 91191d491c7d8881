"""Boxes in text and on pictures, to the digit as published."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from perception.errors import ConfigError, RequestError
from perception_lm.regions import (
    Box,
    Moment,
    draw_boxes,
    encode_box,
    extract_lists,
    fill_boxes,
    parse_boxes,
    parse_moment,
    parse_moments,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "regions.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["encode"], ids=lambda case: case["text_000"])
def test_published_texts(case: dict) -> None:
    """Traps 30 and 35: cut off at three digits, not rounded (10/640 = 0.0156 -> 015); x, y, w, h come in and two
    corners go out; 1.0 becomes 0.999; no space after a comma."""
    (width, height), box = case["image_wh"], case["box_xywh"]
    assert encode_box(*box, width=width, height=height) == case["text_000"]
    assert encode_box(*box, width=width, height=height, style="standard") == case["text_standard"]
    assert encode_box(*box, width=width, height=height, form="xywh") == case["text_000_xywh"]
    assert Box.from_xywh(*box).encode(width=width, height=height) == case["text_000"]


@pytest.mark.parametrize("case", GOLDEN["decode"], ids=lambda case: case["text"])
def test_published_boxes(case: dict) -> None:
    """Trap 31: "040" is 0.040 of 640, so 25.6 pixels; neither 40 pixels nor 0.40 of it (256)."""
    assert extract_lists(case["text"]) == case["extracted"]
    for style in ("000", "auto"):
        boxes = parse_boxes(case["text"], width=640, height=480, style=style)  # type: ignore[arg-type]
        assert [list(box.xyxy) for box in boxes] == case[f"boxes_{style}_640x480"]


def test_published_prompt() -> None:
    case = GOLDEN["prompt"]
    boxes = [Box.from_xywh(*box) for box in case["bbox_xywh"]]
    width, height = case["image_wh"]
    got = [fill_boxes(turn["value"], boxes, width=width, height=height) for turn in case["conversations"]]
    assert got == [turn["value"] for turn in case["result"]]
    with pytest.raises(RequestError, match=r"names <\|bbox2\|>, but 2 boxes"):
        fill_boxes("<|bbox2|>", boxes, width=width, height=height)


@given(st.integers(1, 5000), st.integers(1, 5000), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_a_box_comes_back_to_a_thousandth(width: int, height: int, shares: list[float]) -> None:
    sides = (width, height) * 2
    x1, y1, x2, y2 = (share * side for share, side in zip(shares, sides, strict=True))
    box = Box(min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2))
    for style in ("000", "standard"):
        (got,) = parse_boxes(box.encode(width=width, height=height, style=style), width=width, height=height)
        for there, back, side in zip(box.xyxy, got.xyxy, sides, strict=True):
            assert abs(there - back) <= 0.00101 * side


@given(st.text(alphabet="[]0123456789.,- eEnaif١"))
def test_any_answer_can_be_read(text: str) -> None:
    for style in ("auto", "000", "standard"):
        boxes = parse_boxes(text, width=640, height=480, style=style)  # type: ignore[arg-type]
        assert all(np.isfinite(box.xyxy).all() for box in boxes)


def test_styles_do_not_read_each_other() -> None:
    assert parse_boxes("[0.1,0.2,0.3,0.4]", width=100, height=100, style="000") == []
    assert parse_boxes("[100,200,300,400]", width=100, height=100, style="standard") == [
        Box(10000, 20000, 30000, 40000)
    ]
    for odd in ("[1e5,1,1,1]", "[-10,1,1,1]", "[nan,1,1,1]", "[١,1,1,1]", "[,,,]"):
        assert parse_boxes(odd, width=100, height=100) == []


@pytest.mark.parametrize(
    "asked",
    [
        {"width": 0, "height": 10},
        {"width": 10, "height": -1},
        {"width": 10, "height": 10, "style": "xml"},
        {"width": 10, "height": 10, "form": "cxcywh"},
    ],
)
def test_what_cannot_be_encoded(asked: dict) -> None:
    with pytest.raises(ConfigError, match="expected"):
        encode_box(1, 2, 3, 4, **asked)
    with pytest.raises(ConfigError, match="expected"):
        encode_box(float("nan"), 2, 3, 4, width=10, height=10)
    with pytest.raises(ConfigError, match="expected"):
        parse_boxes("", width=1, height=1, style="xml")  # type: ignore[arg-type]


def test_drawing() -> None:
    picture = Image.new("RGB", (40, 30), "white")
    drawn = np.array(draw_boxes(picture, [Box(10, 5, 20, 15)]))
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[5, 10:21].all()
    assert red[6, 10:21].all()
    assert not red[7, 12:19].any()
    assert red[5:16, 20].all()
    assert red.sum() == 11 * 11 - 7 * 7
    assert np.array(picture).min() == 255
    # Upside down, and half outside.
    assert (np.array(draw_boxes(picture, [Box(20, 15, 10, 5)])) == drawn).all()
    assert (np.array(draw_boxes(picture, [Box(30, 20, 90, 90)])) == (255, 0, 0)).all(-1).sum() > 0
    labelled = np.array(draw_boxes(picture, [Box(1, 1, 38, 28, "cat")], colour=(0, 0, 255)))
    assert (labelled[4:26, 4:36] != 255).any()
    with pytest.raises(ConfigError, match="cannot be drawn"):
        draw_boxes(picture, [Box(float("inf"), 0, 1, 1)])


def test_moments() -> None:
    assert parse_moment("It happens in [3, 17].") == Moment(3, 17)
    assert parse_moment("[3, 17] and [18, 20]") == Moment(3, 17)
    for nothing in ("", "[a, b]", "[3]", "3, 17", "[-3, 17]", "[1.5, 2]"):
        assert parse_moment(nothing) is None
    text = "[0, 5]: picks up a ball\n[6,31]: throws it\n"
    assert parse_moments(text) == [Moment(0, 5, "picks up a ball"), Moment(6, 31, "throws it")]
    assert parse_moments("nothing moves") == []
