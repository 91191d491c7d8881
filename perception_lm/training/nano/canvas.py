"""Grounds, shapes and letters on small pictures, fast enough to be drawn while training runs.

S side  w h size of a thing
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from perception.errors import MediaError
from perception_lm.training.nano.world import GROUNDS, SIDE, World

Colour = tuple[int, int, int]
STEP = 2  # corners of things lie on every second pixel, so that a coordinate is one of 33 numbers
FINE = 4  # shapes are drawn so much larger, and averaged


@dataclass(frozen=True)
class Thing:
    """A shape in its place: the box it fills, from x, y, is w x h."""

    shape: str
    colour: str
    x: int
    y: int
    w: int
    h: int

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        return self.x + self.w / 2, self.y + self.h / 2


def ground(draw: random.Random, world: World, *, side: int = SIDE) -> np.ndarray:
    """side side 3 float32: something light to draw on."""
    kind = draw.choice(GROUNDS[world.split])
    if kind == "white":
        return np.full((side, side, 3), 255, np.float32)
    first = np.array([draw.randint(222, 255) for _ in range(3)], np.float32)
    canvas = np.broadcast_to(first, (side, side, 3)).copy()
    if kind == "grain":
        canvas += noise(draw, 8)[:side, :side, None]
    elif kind == "halves":
        part = canvas[: draw.randrange(side)] if draw.random() < 0.5 else canvas[:, : draw.randrange(side)]
        part[:] = [draw.randint(222, 255) for _ in range(3)]
    elif kind == "ruled":
        gap = draw.randint(5, 12)
        canvas[draw.randrange(gap) :: gap] -= draw.randint(8, 24)
    elif kind == "fade":
        second = np.array([draw.randint(205, 255) for _ in range(3)], np.float32)
        share = np.linspace(0, 1, side, dtype=np.float32)[:, None, None]
        canvas += (second - first) * (share if draw.random() < 0.5 else share.transpose(1, 0, 2))
    return canvas


def paint(canvas: np.ndarray, thing: Thing, rgb: Colour, style: str, draw: random.Random) -> None:
    """Draw a thing onto a canvas, S S 3 float32, in place."""
    alpha = mask(thing.shape, thing.w, thing.h)
    if style == "shadowed":
        _lay(canvas, thing.x + 2, thing.y + 2, alpha * 0.35, np.float32(60))
    fill = np.broadcast_to(np.array(rgb, np.float32), (thing.h, thing.w, 3))
    if style == "bordered":
        dark = fill * 0.45 if max(rgb) > 90 else np.float32(120)
        fill = dark + (fill - dark) * inner(thing.shape, thing.w, thing.h)[..., None]
    elif style == "shaded":
        fill = fill * np.linspace(1.1, 0.7, thing.h, dtype=np.float32)[:, None, None]
    elif style == "noisy":
        fill = fill + noise(draw, 25)[: thing.h, : thing.w, None]
    elif style == "rimmed":
        light = fill * 0.35 + 255 * 0.65
        fill = light + (fill - light) * inner(thing.shape, thing.w, thing.h)[..., None]
    elif style == "halved":
        fill = np.where(np.arange(thing.w)[None, :, None] < thing.w // 2, fill, fill * 0.75)
    elif style == "dotted":
        fill = fill + (255 - fill) * dots(draw.randrange(4))[: thing.h, : thing.w, None] * 0.35
    elif style == "lit":
        across = np.linspace(0, 1, thing.w, dtype=np.float32)[None, :, None]
        fill = fill + (255 - fill) * 0.35 * (across if draw.random() < 0.5 else 1 - across)
    elif style == "striped":
        fill = fill + (255 - fill) * stripes(draw.randrange(4))[: thing.h, : thing.w, None] * 0.35
    _lay(canvas, thing.x, thing.y, alpha, fill)


def finish(canvas: np.ndarray) -> np.ndarray:
    """S S 3 uint8"""
    return np.clip(canvas, 0, 255).astype(np.uint8)


def _lay(canvas: np.ndarray, x: int, y: int, alpha: np.ndarray, fill: np.ndarray | np.float32) -> None:
    """Mix a fill into the canvas where alpha says; what reaches over the edge is cut off."""
    part = canvas[y : y + alpha.shape[0], x : x + alpha.shape[1]]
    h, w = part.shape[:2]
    if isinstance(fill, np.ndarray) and fill.ndim == 3:
        fill = fill[:h, :w]
    part += (fill - part) * alpha[:h, :w, None]


@lru_cache(maxsize=4096)
def mask(shape: str, w: int, h: int) -> np.ndarray:
    """h w float32: how much of each pixel a shape covers that fills its box."""
    large = Image.new("L", (w * FINE, h * FINE))
    pen = ImageDraw.Draw(large)
    W, H = w * FINE - 1, h * FINE - 1
    if shape == "rectangle":
        pen.rectangle((0, 0, W, H), fill=255)
    elif shape == "circle":
        pen.ellipse((0, 0, W, H), fill=255)
    else:
        pen.polygon([(x * W, y * H) for x, y in OUTLINES[shape]], fill=255)
    return np.asarray(large, np.float32).reshape(h, FINE, w, FINE).mean((1, 3)) / 255


@lru_cache(maxsize=4096)
def inner(shape: str, w: int, h: int) -> np.ndarray:
    """h w float32: the shape without a border of two pixels."""
    return np.pad(mask(shape, max(2, w - 4), max(2, h - 4)), 2)[:h, :w]


@lru_cache(maxsize=8)
def stripes(phase: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (((rows + columns + phase) // 2) % 2).astype(np.float32)


@lru_cache(maxsize=8)
def dots(phase: int) -> np.ndarray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    return (((rows + phase) % 4 < 2) & ((columns + phase // 2) % 4 < 2)).astype(np.float32)


@lru_cache(maxsize=1)
def _grain() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (256, 256)).astype(np.float32)


def noise(draw: random.Random, size: float) -> np.ndarray:
    """S S float32 in [-size, size], cut from one fixed field."""
    x, y = draw.randrange(256 - SIDE), draw.randrange(256 - SIDE)
    return _grain()[y : y + SIDE, x : x + SIDE] * np.float32(size)


def _fit(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """Points moved and stretched to fill the unit square."""
    (x1, x2), (y1, y2) = ((min(values), max(values)) for values in zip(*points, strict=True))
    return tuple(((x - x1) / (x2 - x1), (y - y1) / (y2 - y1)) for x, y in points)


RADII = (1, 0.42) * 5  # of a star's points and of the corners between them
OUTLINES = {
    "triangle": ((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "star": _fit([(r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5)) for i, r in enumerate(RADII)]),
    "cross": tuple(
        (x / 3, y / 3)
        for x, y in (
            (1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (2, 2), (2, 3), (1, 3), (1, 2), (0, 2), (0, 1), (1, 1),
        )
    ),
}  # fmt: skip


def place(draw: random.Random, count: int, low: int, high: int, *, side: int = SIDE) -> list[tuple[int, int, int, int]]:
    """Boxes x, y, w, h on the lattice that leave two pixels between each other; as many as fit, at most `count`."""
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(40 * count):
        if len(boxes) == count:
            break
        w, h = (draw.randrange(low, high + 1, STEP) for _ in range(2))
        x, y = draw.randrange(0, side - w + 1, STEP), draw.randrange(0, side - h + 1, STEP)
        if all(x + w + 2 <= a or a + c + 2 <= x or y + h + 2 <= b or b + d + 2 <= y for a, b, c, d in boxes):
            boxes.append((x, y, w, h))
    return boxes


@lru_cache(maxsize=64)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """Raises MediaError when the system has not got it."""
    try:
        return ImageFont.truetype(f"{name}.ttf", size)
    except OSError as error:
        raise MediaError(
            f"no font {name}; letters are drawn with DejaVu and Liberation (Debian: fonts-dejavu, fonts-liberation)"
        ) from error


@lru_cache(maxsize=20_000)
def lettering(text: str, name: str, size: int) -> np.ndarray:
    """h w float32: how much of each pixel a text covers, cut to its ink from side to side, from the ascender down."""
    face = font(name, size)
    left, _, right, _ = face.getbbox(text)
    ascent, descent = face.getmetrics()
    picture = Image.new("L", (max(1, int(right - left)), ascent + descent))
    ImageDraw.Draw(picture).text((-left, 0), text, fill=255, font=face)
    return np.asarray(picture, np.float32) / 255


def write(canvas: np.ndarray, text: str, x: int, y: int, name: str, size: int, rgb: Colour = (0, 0, 0)) -> int:
    """Letters on a canvas, in place; returns how wide they are."""
    ink = lettering(text, name, size)
    _lay(canvas, x, y, ink, np.broadcast_to(np.array(rgb, np.float32), (*ink.shape, 3)))
    return ink.shape[1]
