"""Scenes of shapes, with counts, attributes, comparisons, places and boxes; and the questions of easy-VQA.

easy-VQA (Zhou 2019, the PyPI package) shows one shape in one of eight colours; `easy` asks in its words, of pictures
of our own. Its pictures are used for nothing but measuring.
"""

import random
from collections.abc import Callable

import numpy as np

from perception_lm.assistant import CAPTION_IMAGE, DESCRIBE_BOX, GROUND
from perception_lm.regions import encode_box
from perception_lm.training.nano.canvas import STEP, Thing, finish, ground, paint, place
from perception_lm.training.nano.world import (
    COLOURS,
    EASY_COLOURS,
    EASY_SHAPES,
    SHAPES,
    SIDE,
    STYLES,
    Phrasings,
    Sample,
    Turn,
    World,
)

# --- easy-VQA's wordings: all of them are learned, for its test asks in the same ones -------------------------------

THERE_IS = ("is a {} present?", "is there a {}?", "is there a {} in the image?", "does the image contain a {}?")
THERE_IS_NOT = (
    "is no {} present?",
    "is there not a {}?",
    "is there not a {} in the image?",
    "does the image not contain a {}?",
)
WHICH_COLOUR = ("what color is the {}?", "what is the color of the {}?")
WHICH_SHAPE = ("what shape is in the image?", "what shape does the image contain?", "what shape is present?")
WHICH_SHAPE_OF = ("what is the {} shape?",)

# --- ours: what is asked of several shapes --------------------------------------------------------------------------

COUNT = Phrasings(
    (
        "How many shapes are there?",
        "Count the shapes.",
        "How many shapes do you see?",
        "What is the number of shapes?",
        "How many shapes are in this picture?",
        "How many shapes can be seen in the image?",
        "How many shapes does the image show?",
        "Count all shapes in the picture.",
        "Count the shapes that are shown.",
        "Number of shapes in the image?",
        "Tell me how many shapes there are.",
        "How many things are drawn here?",
    ),
    ("How many shapes are in the image?", "Count the shapes in the image."),
)
COUNT_OF = Phrasings(
    (
        "How many {} are there?",
        "Count the {}.",
        "How many {} do you see?",
        "What is the number of {}?",
        "How many {} are in this picture?",
        "How many {} can be seen in the image?",
        "How many {} does the image show?",
        "Count all {} in the picture.",
        "Count the {} that are shown.",
        "Number of {} in the image?",
        "Tell me how many {} there are.",
    ),
    ("How many {} are in the image?", "Count the {} in the image."),
)
COLOUR_OF = Phrasings(
    (
        "What color is the {}?",
        "Which color does the {} have?",
        "Name the color of the {}.",
        "What color does the {} have?",
        "The {} has which color?",
        "What is the color of the {} in the picture?",
        "In which color is the {} drawn?",
        "Tell me the color of the {}.",
    ),
    ("What is the color of the {}?", "Which color is the {}?"),
)
SHAPE_OF = Phrasings(
    (
        "What shape is the {} one?",
        "Which shape is {}?",
        "Name the {} shape.",
        "What is the shape of the {} one?",
        "Which shape is drawn in {}?",
        "What shape is {}?",
        "Which shape has the color {}?",
        "Tell me which shape is {}.",
    ),
    ("What is the {} shape?", "Which shape does the {} one have?"),
)
EXISTS = Phrasings(
    (
        "Is there a {}?",
        "Do you see a {}?",
        "Does the image contain a {}?",
        "Is a {} in the picture?",
        "Is there a {} in this picture?",
        "Can you see a {}?",
        "Can you see a {} in the image?",
        "Does the picture show a {}?",
        "Is a {} shown?",
    ),
    ("Is there a {} in the image?", "Do you see a {} in the image?"),
)
BESIDE = Phrasings(
    (
        "Is the {a} {side} the {b}?",
        "Do you see the {a} {side} the {b}?",
        "Is the {a} to be seen {side} the {b}?",
        "In this picture, is the {a} {side} the {b}?",
        "Is it true that the {a} is {side} the {b}?",
        "Does the {a} lie {side} the {b}?",
    ),
    ("In the image, is the {a} {side} the {b}?",),
)
LARGER = Phrasings(
    (
        "Which is larger, the {a} or the {b}?",
        "Which one is larger: the {a} or the {b}?",
        "Which one is larger, the {a} or the {b}?",
        "What is larger, the {a} or the {b}?",
        "Which shape is the larger one, the {a} or the {b}?",
        "The {a} or the {b}: which is larger?",
    ),
    ("Which shape is larger, the {a} or the {b}?",),
)
LIST = Phrasings(("List every shape with its box.",))

SIDES = ("left of", "right of", "above", "below")
MANY = (1, 2, 2, 3, 3, 4, 5, 6)


def box_text(thing: Thing) -> str:
    """The box of a thing as Perception LM writes it."""
    return encode_box(thing.x, thing.y, thing.w, thing.h, width=SIDE, height=SIDE)


def easy(draw: random.Random, world: World) -> Sample:
    """One shape, asked about as easy-VQA does; its box and a caption besides."""
    shape, colour = draw.choice(EASY_SHAPES), draw.choice(EASY_COLOURS)
    w = draw.randrange(10, 33)
    h = draw.randrange(10, 33) if shape == "rectangle" else w
    thing = Thing(shape, colour, draw.randrange(0, SIDE - w + 1), draw.randrange(0, SIDE - h + 1), w, h)
    canvas = ground(draw, world)
    exact = draw.random() < 0.5  # easy-VQA's own eight values, else shades of them
    rgb = COLOURS[colour]["train"][0] if exact and world.split == "train" else world.colour(draw, colour)
    paint(canvas, thing, rgb, draw.choice(STYLES[world.split]), draw)
    turns = once([easy_turn(draw, thing) for _ in range(draw.randint(6, 10))])
    turns = world.telling(draw, turns, Turn("caption", CAPTION_IMAGE, f"1 shape: a {thing.name}."))
    return Sample("easy", finish(canvas)[None], tuple(turns))


def easy_turn(draw: random.Random, thing: Thing) -> Turn:
    """One of easy-VQA's questions about its only shape."""
    kind = draw.choice(("shape", "color", "yes/no", "yes/no", "yes/no"))
    if kind == "color":
        subject = draw.choice(("shape", thing.shape))
        return Turn("color", draw.choice(WHICH_COLOUR).format(subject), thing.colour)
    if kind == "shape":
        asked = draw.choice((*WHICH_SHAPE, *WHICH_SHAPE_OF * 2))
        return Turn("shape", asked.format(thing.colour), thing.shape)
    truth, negated = draw.random() < 0.5, draw.random() < 0.5
    if draw.random() < 0.5:
        other = draw.choice([shape for shape in EASY_SHAPES if shape != thing.shape])
        subject = thing.shape if truth else other
    else:
        other = draw.choice([colour for colour in EASY_COLOURS if colour != thing.colour])
        subject = f"{thing.colour if truth else other} shape"
    asked = draw.choice(THERE_IS_NOT if negated else THERE_IS).format(subject)
    return Turn("yes/no", asked, "yes" if truth != negated else "no")


def arrange(draw: random.Random, world: World, many: int) -> list[Thing]:
    """Shapes side by side, no two of the same shape and colour, in the order of reading: from left to right."""
    high = {1: 32, 2: 26, 3: 24}.get(many, 18)
    pairs = draw.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], many)
    things = []
    for (shape, colour), (x, y, w, h) in zip(pairs, place(draw, many, 10, high), strict=False):
        if shape != "rectangle":
            w = h = min(w, h)
        things.append(Thing(shape, colour, x, y, w, h))
    return sorted(things, key=lambda thing: thing.centre)


def show(draw: random.Random, world: World, things: list[Thing], canvas: np.ndarray | None = None) -> np.ndarray:
    """The picture of some things, S S 3 uint8; all of one style."""
    canvas = ground(draw, world) if canvas is None else canvas.copy()
    style = draw.choice(STYLES[world.split])
    for thing in things:
        paint(canvas, thing, world.colour(draw, thing.colour), style, draw)
    return finish(canvas)


def shapes(draw: random.Random, world: World) -> Sample:
    """Up to six shapes; what is where, how many, which and how large."""
    most = (2, 4, 6)[world.level]
    things = arrange(draw, world, draw.choice([n for n in MANY if n <= most]))
    picture = show(draw, world, things)
    asked = draw.choices(QUESTIONS, weights=[weight for _, weight in _WEIGHTED], k=draw.randint(6, 9))
    turns = once([turn for ask in asked if (turn := ask(draw, world, things)) is not None])
    told = locate(things) if world.told or draw.random() < 0.5 else caption(things)
    turns = world.telling(draw, turns, told) if turns else [told]
    return Sample("shapes", picture[None], tuple(turns))


def once(turns: list[Turn]) -> list[Turn]:
    """Without what was asked before."""
    return [turn for i, turn in enumerate(turns) if turn.question not in {earlier.question for earlier in turns[:i]}]


def caption(things: list[Thing]) -> Turn:
    return Turn("caption", CAPTION_IMAGE, _listed(things, [f"a {thing.name}" for thing in things]))


def locate(things: list[Thing]) -> Turn:
    """All there is to say: how many, which, and where."""
    return Turn("list", LIST.train[0], _listed(things, [f"a {thing.name} {box_text(thing)}" for thing in things]))


def _listed(things: list[Thing], each: list[str]) -> str:
    many = f"{len(things)} shapes" if len(things) > 1 else "1 shape"
    return f"{many}: {', '.join(each)}."


def count(draw: random.Random, world: World, things: list[Thing]) -> Turn:
    return Turn("count", world.phrase(draw, COUNT), str(len(things)), {"many": len(things)})


def count_of(draw: random.Random, world: World, things: list[Thing]) -> Turn:
    """How many of one colour or shape; nothing that is not there."""
    one = draw.choice(things)
    if draw.random() < 0.5:
        many, what = sum(thing.shape == one.shape for thing in things), _plural(one.shape)
    else:
        many, what = sum(thing.colour == one.colour for thing in things), f"{one.colour} shapes"
    return Turn("count of", world.phrase(draw, COUNT_OF, what), str(many), {"many": many})


def colour_of(draw: random.Random, world: World, things: list[Thing]) -> Turn | None:
    lone = [thing for thing in things if sum(other.shape == thing.shape for other in things) == 1]
    if not lone:
        return None
    thing = draw.choice(lone)
    return Turn("attribute", world.phrase(draw, COLOUR_OF, thing.shape), thing.colour)


def shape_of(draw: random.Random, world: World, things: list[Thing]) -> Turn | None:
    lone = [thing for thing in things if sum(other.colour == thing.colour for other in things) == 1]
    if not lone:
        return None
    thing = draw.choice(lone)
    return Turn("attribute", world.phrase(draw, SHAPE_OF, thing.colour), thing.shape)


def exists(draw: random.Random, world: World, things: list[Thing]) -> Turn:
    """Half of the answers are no; half of those name a shape and a colour that are there, but not together."""
    there = {thing.name for thing in things}
    if draw.random() < 0.5:
        return Turn("exists", world.phrase(draw, EXISTS, draw.choice(things).name), "yes")
    crossed = [f"{a.colour} {b.shape}" for a in things for b in things if f"{a.colour} {b.shape}" not in there]
    anything = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES if f"{colour} {shape}" not in there]
    name = draw.choice(crossed if crossed and draw.random() < 0.5 else anything)
    return Turn("exists", world.phrase(draw, EXISTS, name), "no")


def beside(draw: random.Random, world: World, things: list[Thing]) -> Turn | None:
    """Is one thing left of, right of, above or below another; only where the centres are clearly apart."""
    if len(things) < 2:
        return None
    a, b = draw.sample(things, 2)
    across = draw.random() < 0.5
    gap = a.centre[not across] - b.centre[not across]
    if abs(gap) < 8:
        return None
    side = draw.choice(SIDES[:2] if across else SIDES[2:])
    truth = (gap < 0) == (side in ("left of", "above"))
    asked = world.phrase(draw, BESIDE, a=a.name, b=b.name, side=side)
    return Turn("compare", asked, "yes" if truth else "no")


def larger(draw: random.Random, world: World, things: list[Thing]) -> Turn | None:
    pairs = [(a, b) for a in things for b in things if min(a.w, a.h) >= max(b.w, b.h) + 4]
    if not pairs:
        return None
    large, small = draw.choice(pairs)
    a, b = (large, small) if draw.random() < 0.5 else (small, large)
    return Turn("compare", world.phrase(draw, LARGER, a=a.name, b=b.name), large.name)


def find(draw: random.Random, world: World, things: list[Thing]) -> Turn:
    """Perception LM's own wording: one for all models, so none is held out."""
    thing = draw.choice(things)
    box = (thing.x, thing.y, thing.x + thing.w, thing.y + thing.h)
    return Turn("ground", GROUND.format(caption=f"the {thing.name}"), box_text(thing), {"box": box})


def name_box(draw: random.Random, world: World, things: list[Thing]) -> Turn:
    thing = draw.choice(things)
    return Turn("region", DESCRIBE_BOX.format(box=box_text(thing)), f"A {thing.name}.")


def _plural(shape: str) -> str:
    return "crosses" if shape == "cross" else f"{shape}s"


_WEIGHTED: tuple[tuple[Callable[[random.Random, World, list[Thing]], Turn | None], float], ...] = (
    (count, 2.0),
    (count_of, 1.0),
    (colour_of, 1.0),
    (shape_of, 1.0),
    (exists, 1.5),
    (beside, 1.2),
    (larger, 0.8),
    (find, 3.0),
    (name_box, 1.0),
)
QUESTIONS = tuple(ask for ask, _ in _WEIGHTED)
__all__ = ["QUESTIONS", "STEP", "Thing", "arrange", "easy", "shapes", "show"]
