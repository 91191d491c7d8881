"""Emoji: one to name, or a few to count and find. The style openmoji is held out."""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from perception_encoder.training.drawings import TEST_STYLE, read_drawings, read_split
from perception_lm.assistant import CAPTION_IMAGE, DESCRIBE_BOX, GROUND
from perception_lm.regions import encode_box
from perception_lm.training.nano.canvas import finish, ground, place
from perception_lm.training.nano.world import SIDE, Phrasings, Sample, Split, Turn, World

WHAT = Phrasings(
    (
        "What is this?",
        "What is drawn here?",
        "What does the picture show?",
        "Name the drawing.",
        "What do you see?",
        "What is in the image?",
        "What is shown in this picture?",
        "Tell me what this is.",
        "What does this drawing show?",
    ),
    ("What does the image show?", "What is this a drawing of?"),
)
COUNT_OF = Phrasings(
    (
        "How many {} drawings are there?",
        "Count the {} drawings.",
        "How many {} drawings do you see?",
        "What is the number of {} drawings?",
        "Count the {} drawings in the image.",
    ),
    ("How many {} drawings are in the image?",),
)
EXISTS = Phrasings(
    (
        "Is there a drawing of {}?",
        "Do you see {}?",
        "Is {} in the picture?",
        "Can you see {} in the image?",
        "Does the image contain {}?",
        "Is a drawing of {} shown?",
    ),
    ("Is there a drawing of {} in the image?",),
)

# Things that look like themselves in any style, by emojibase's labels; all of them among the seen concepts.
NAMES = (
    "rabbit", "fox", "bear", "lion", "cow", "pig", "frog", "monkey", "bird", "duck", "owl", "bat", "honeybee",
    "butterfly", "turtle", "snake", "octopus", "fish", "whale", "dolphin", "crocodile", "camel", "banana", "red apple",
    "green apple", "grapes", "watermelon", "tangerine", "pineapple", "peach", "tomato", "carrot", "mushroom", "bread",
    "hot dog", "ice cream", "doughnut", "cookie", "house", "automobile", "bus", "airplane", "rocket", "sailboat",
    "umbrella", "sun", "rainbow", "cloud", "snowman", "fire", "balloon", "soccer ball", "basketball", "guitar", "key",
    "hammer", "light bulb", "candle", "bomb", "crown", "rose", "sunflower", "palm tree", "robot",
)  # fmt: skip


@dataclass(frozen=True)
class Sprites:
    """Drawings cut to their ink: name -> pictures in RGBA, of one split's styles."""

    pictures: dict[str, tuple[Image.Image, ...]]

    def get(self, draw: random.Random, name: str, w: int, h: int) -> np.ndarray:
        """h w 4 float32, squeezed into a box."""
        return _sized(draw.choice(self.pictures[name]), w, h)


def read_sprites(data: Path, split: Split) -> Sprites:
    """Raises MediaError where the drawings were not made (`perception_encoder.training.drawings`)."""
    drawings = read_drawings(data)
    seen = set(read_split("seen"))
    styles = [s for s in drawings.styles if (s == TEST_STYLE) == (split == "test")]
    codes = {c.label: c.code for c in drawings.concepts if c.code in seen}
    pictures = {}
    for name in NAMES:
        rows = drawings.rows(styles, [codes[name]])
        pictures[name] = tuple(map(_cut, drawings.pixels[rows]))
    return Sprites({name: found for name, found in pictures.items() if found})


def _cut(pixels: np.ndarray) -> Image.Image:
    picture = Image.fromarray(pixels)
    return picture.crop(picture.getchannel("A").point(lambda a: 255 * (a > 40)).getbbox())


_SIZES: dict[tuple[int, int, int], np.ndarray] = {}


def _sized(picture: Image.Image, w: int, h: int) -> np.ndarray:
    key = id(picture), w, h
    if key not in _SIZES:
        if len(_SIZES) > 20_000:
            _SIZES.clear()
        _SIZES[key] = np.asarray(picture.resize((w, h), Image.Resampling.BOX), np.float32)
    return _SIZES[key]


def emoji(draw: random.Random, world: World) -> Sample:
    """A drawing, or up to four."""
    many = draw.choice(((1,), (1, 1, 2, 3), (1, 1, 2, 3, 4))[world.level])
    kinds = draw.sample(sorted(world.sprites.pictures), draw.randint(1, many))
    names = [*kinds, *(draw.choice(kinds) for _ in range(many - len(kinds)))]
    boxes = place(draw, many, 40, 60) if many == 1 else place(draw, many, 18, 26)
    things = sorted(zip(names, boxes, strict=False), key=lambda thing: thing[1][0])
    canvas = ground(draw, world)
    for name, (x, y, w, h) in things:
        sprite = world.sprites.get(draw, name, w, h)
        if draw.random() < 0.3:
            sprite = sprite[:, ::-1]
        part = canvas[y : y + h, x : x + w]
        part += (sprite[..., :3] - part) * (sprite[..., 3:] / 255)
    if many == 1:
        name = names[0]
        turns = [
            Turn("name", world.phrase(draw, WHAT), _a(name)),
            Turn("caption", CAPTION_IMAGE, f"A drawing of {_a(name)}."),
        ]
        turns = turns[1:] if world.told or draw.random() < 0.5 else turns[:1]
    else:
        asks = (partial(_find, things), partial(_count, things), partial(_exists, things), partial(_region, things))
        turns = [ask(draw, world) for ask in draw.sample(asks, draw.randint(2, 4))]
        turns = world.telling(draw, turns, _caption(things))
    return Sample("emoji", finish(canvas)[None], tuple(turns))


Placed = list[tuple[str, tuple[int, int, int, int]]]


def _caption(things: Placed) -> Turn:
    return Turn("caption", CAPTION_IMAGE, f"{len(things)} drawings: {', '.join(_a(name) for name, _ in things)}.")


def _find(things: Placed, draw: random.Random, world: World) -> Turn:
    names = [name for name, _ in things]
    lone = [thing for thing in things if names.count(thing[0]) == 1]
    name, (x, y, w, h) = draw.choice(lone or things[:1])
    asked = GROUND.format(caption=f"the {name}")
    return Turn("ground", asked, encode_box(x, y, w, h, width=SIDE, height=SIDE), {"box": (x, y, x + w, y + h)})


def _region(things: Placed, draw: random.Random, world: World) -> Turn:
    name, (x, y, w, h) = draw.choice(things)
    box = encode_box(x, y, w, h, width=SIDE, height=SIDE)
    return Turn("region", DESCRIBE_BOX.format(box=box), f"A drawing of {_a(name)}.")


def _count(things: Placed, draw: random.Random, world: World) -> Turn:
    names = [name for name, _ in things]
    name = draw.choice(names)
    return Turn("count of", world.phrase(draw, COUNT_OF, name), str(names.count(name)), {"many": names.count(name)})


def _exists(things: Placed, draw: random.Random, world: World) -> Turn:
    names = {name for name, _ in things}
    if draw.random() < 0.5:
        return Turn("exists", world.phrase(draw, EXISTS, _a(draw.choice(sorted(names)))), "yes")
    other = draw.choice([name for name in world.sprites.pictures if name not in names])
    return Turn("exists", world.phrase(draw, EXISTS, _a(other)), "no")


def _a(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
