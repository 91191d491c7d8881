"""Boxes as Perception LM reads and writes them: thousandths of the picture, in text, or red rectangles drawn on it.

A picture of 640 x 480, and the box from (10, 20) to (40, 60): `[015,041,062,125]`.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageDraw

from perception.errors import ConfigError, RequestError
from perception.media import read_image, to_rgb

Style = Literal["000", "standard"]
LARGEST = 0.999  # the right and the lower edge: three digits know no 1.000
RED = (255, 0, 0)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels, from the upper left (x1, y1) to the lower right (x2, y2)."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str | None = None

    @classmethod
    def from_xywh(cls, x: float, y: float, w: float, h: float, label: str | None = None) -> "Box":
        return cls(x, y, x + w, y + h, label)

    @property
    def xyxy(self) -> tuple[float, float, float, float]:
        return self.x1, self.y1, self.x2, self.y2

    @property
    def upright(self) -> "Box":
        """The upper left corner first: an answer may name the corners the other way round."""
        (x1, x2), (y1, y2) = sorted((self.x1, self.x2)), sorted((self.y1, self.y2))
        return Box(x1, y1, x2, y2, self.label)

    def encode(self, *, width: int, height: int, style: Style = "000") -> str:
        """The box as the model reads it, in a picture of this size."""
        return encode_box(
            self.x1, self.y1, self.x2 - self.x1, self.y2 - self.y1, width=width, height=height, style=style
        )


def check_box(box: Box, width: int, height: int) -> None:
    """RequestError unless some of the box lies in a picture of this size, its upper left corner first."""
    (x1, y1, x2, y2), finite = box.xyxy, all(map(math.isfinite, box.xyxy))
    if not (finite and x1 <= x2 and y1 <= y2 and x1 < width and y1 < height and x2 >= 0 and y2 >= 0):
        raise RequestError(
            f"the box {list(box.xyxy)} in a picture of {width}x{height}; expected x1, y1, x2, y2 in pixels, the upper "
            "left corner first, and some of it in the picture"
        )


def encode_box(
    x: float,
    y: float,
    w: float,
    h: float,
    *,
    width: int,
    height: int,
    style: Style = "000",
    form: Literal["xyxy", "xywh"] = "xyxy",
) -> str:
    """A box in pixels to text: "[015,041,062,125]".

    x, y, w, h     upper left corner, width and height
    width, height  of the picture
    style          "000": three digits after the point, cut off and not rounded; "standard": "[0.016,0.042,0.062,0.125]"
    form           "xyxy": two corners, which the models were trained on; "xywh": a corner, width and height

    No spaces after the commas: they would be other tokens. What lies outside the picture is moved to its edge.
    """
    if style not in ("000", "standard") or form not in ("xyxy", "xywh"):
        raise ConfigError(f"style={style!r}, form={form!r}; expected '000' or 'standard', and 'xyxy' or 'xywh'")
    if not (width > 0 and height > 0 and all(math.isfinite(value) for value in (x, y, w, h))):
        raise ConfigError(
            f"the box {[x, y, w, h]} in a picture of {width}x{height}; expected numbers, and sizes above 0"
        )
    values = (x, y, x + w, y + h) if form == "xyxy" else (x, y, w, h)
    shares = [min(max(v / side, 0.0), LARGEST) for v, side in zip(values, (width, height) * 2, strict=True)]
    texts = [f"{int(share * 1000):03d}" if style == "000" else f"{share:.3f}" for share in shares]
    return f"[{','.join(texts)}]"


def parse_boxes(text: str, *, width: int, height: int, style: Literal["auto", "000", "standard"] = "auto") -> list[Box]:
    """Every box in a model's answer, in pixels of a picture of this size.

    "040" is 0.040 of a side, never 40 pixels and never 0.40. With "auto" a number with a point is taken as it stands;
    with "000" or "standard" brackets in the other style are passed over, and so is whatever is not four numbers.
    """
    if style not in ("auto", "000", "standard"):
        raise ConfigError(f"style={style!r}; expected 'auto', '000' or 'standard'")
    boxes = []
    for numbers in extract_lists(text):
        shares = [_share(number, style) for number in numbers]
        if len(shares) == 4 and None not in shares:
            x1, y1, x2, y2 = (share * side for share, side in zip(shares, (width, height) * 2, strict=True))  # type: ignore[operator]
            boxes.append(Box(x1, y1, x2, y2))
    return boxes


def extract_lists(text: str) -> list[list[str]]:
    """What stands between brackets, split at the commas: "[ 040 , 482]" gives [["040", "482"]]."""
    return [[part.strip() for part in found.split(",")] for found in re.findall(r"\[([^\[\]]*,[^\[\]]*)\]", text)]


def _share(number: str, style: str) -> float | None:
    if style != "standard" and re.fullmatch(r"[0-9]+", number):
        return float(f"0.{number}")
    if style != "000" and re.fullmatch(r"[0-9]*\.[0-9]+|[0-9]+\.?", number):
        return float(number)
    return None


def fill_boxes(text: str, boxes: Sequence[Box], *, width: int, height: int) -> str:
    """`<|bbox0|>`, `<|bbox1|>`, ... in a text become the boxes. Raises RequestError for a number without a box."""

    def box(found: re.Match[str]) -> str:
        if (number := int(found[1])) >= len(boxes):
            raise RequestError(f"the text names {found[0]}, but {len(boxes)} boxes were given")
        return boxes[number].encode(width=width, height=height)

    return re.sub(r"<\|bbox([0-9]{1,6})\|>", box, text)


def draw_boxes(
    image: object, boxes: Iterable[Box], *, colour: tuple[int, int, int] = RED, width: int = 2
) -> Image.Image:
    """A copy of a picture with rectangles on it; what lies outside is left out."""
    picture = to_rgb(read_image(image)).copy()
    draw = ImageDraw.Draw(picture)
    for box in boxes:
        if not all(map(math.isfinite, box.xyxy)):
            raise ConfigError(f"the box {list(box.xyxy)} cannot be drawn; expected numbers")
        x1, y1, x2, y2 = box.upright.xyxy
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=width)
        if box.label:
            draw.text((x1 + width + 1, y1 + width), box.label, fill=colour)
    return picture


# --- answers about time -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """What happens from one frame to another, both counted among the frames the model saw."""

    start: int
    end: int
    text: str = ""


_MOMENT = r"\[\s*([0-9]{1,9})\s*,\s*([0-9]{1,9})\s*\]"


def parse_moment(text: str) -> Moment | None:
    """The first "[start, end]" of an answer; None when it gives none."""
    found = re.search(_MOMENT, text)
    return Moment(int(found[1]), int(found[2])) if found else None


def parse_moments(text: str) -> list[Moment]:
    """Every "[start, end]: what happens" of an answer."""
    found = re.findall(_MOMENT + r"([^\[]*)", text)
    return [Moment(int(start), int(end), what.strip().removeprefix(":").strip()) for start, end, what in found]
