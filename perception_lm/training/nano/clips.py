"""Clips of four frames, asked about what one frame cannot tell: direction, order, number of events, which one moved."""

import random
from dataclasses import replace

import numpy as np

from perception_lm.assistant import CAPTION_VIDEO
from perception_lm.training.nano.canvas import STEP, Thing, finish, ground, paint
from perception_lm.training.nano.world import COLOURS, SHAPES, SIDE, STYLES, Phrasings, Sample, Turn, World

FRAMES, MIDDLE = 4, 2
DIRECTION = Phrasings(
    (
        "In which direction does the {} move?",
        "Which way does the {} move?",
        "Where does the {} move?",
        "Where does the {} go?",
        "Which way is the {} moving?",
        "In which direction is the {} going?",
        "What is the direction of the {}?",
        "To which side does the {} move in the video?",
        "Tell me where the {} goes.",
    ),
    ("In which direction does the {} go?", "Which way does the {} go?"),
)
WHICH = Phrasings(
    (
        "Which shape moves?",
        "What moves in the video?",
        "What moves?",
        "Which shape is moving?",
        "Which one moves?",
        "Name the shape that moves.",
        "Which shape moves in this clip?",
        "What is moving in the video?",
    ),
    ("Which shape moves in the video?",),
)
DOES_MOVE = Phrasings(
    (
        "Does the {} move?",
        "Is the {} moving?",
        "Do you see the {} move?",
        "Does the {} go anywhere?",
        "Is it true that the {} moves?",
        "Does the {} move in this clip?",
    ),
    ("Does the {} move in the video?", "Is the {} moving in the video?"),
)
FIRST = Phrasings(
    (
        "Which shape appears {}?",
        "What appears {}?",
        "Name the shape that appears {}.",
        "What appears {} in the video?",
        "Which one appears {}?",
        "Which shape is seen {}?",
        "Which shape comes {} in this clip?",
        "What is shown {} in the video?",
        "Tell me which shape appears {}.",
    ),
    ("Which shape appears {} in the video?",),
)
TIMES = Phrasings(
    (
        "How many times does the {} appear?",
        "Count how often the {} appears.",
        "How many times is the {} seen?",
        "How many times is the {} in the video?",
        "How often is the {} shown?",
        "How often do you see the {}?",
        "Count the times the {} appears.",
        "In how many frames is the {}?",
    ),
    ("How often does the {} appear?", "How many times do you see the {}?"),
)
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}


def clips(draw: random.Random, world: World) -> Sample:
    """A clip with questions about it."""
    return draw.choice((moving, moving, order, blinking))(draw, world)


def moving(draw: random.Random, world: World) -> Sample:
    """One thing moves straight on; perhaps another rests.

    The frame between tells neither the direction nor which of two moves: both things stand there where either could.
    """
    names = _names(draw, 2 if draw.random() < 0.5 else 1)
    way = draw.choice(sorted(MOVES))
    right, down = MOVES[way]
    size = draw.randrange(12, 17, STEP)
    pace = draw.randrange(6, 9, STEP)  # pixels a frame
    steps = [(2 * i - (FRAMES - 1)) * pace // 2 for i in range(FRAMES)]
    middles = _middles(draw, size, pace, len(names), across=int(right != 0))
    mover = Thing(*names[0], 0, 0, size, size)
    path = [replace(mover, x=middles[0][0] + right * s, y=middles[0][1] + down * s) for s in steps]
    frames: list[list[Thing]] = [[thing] for thing in path]
    if len(names) > 1:
        step = draw.choice((-1, 1)) * steps[MIDDLE]  # as far from its middle as what moves is, in the frame between
        rest = Thing(*names[1], middles[1][0] + abs(right) * step, middles[1][1] + abs(down) * step, size, size)
        below = draw.random() < 0.5
        frames = [[rest, thing] if below else [thing, rest] for thing in path]
    picture = _draw(draw, world, frames)
    name = mover.name
    told = Turn("caption", CAPTION_VIDEO, f"A {name} moves {way}.")
    turns = [Turn("direction", world.phrase(draw, DIRECTION, name), way)]
    if len(names) > 1:  # first: the other question names what moves
        if draw.random() < 0.6:
            turns.insert(0, Turn("which", world.phrase(draw, WHICH), name))
        else:
            asked = draw.choice((mover, rest)).name
            turns.insert(0, Turn("moves", world.phrase(draw, DOES_MOVE, asked), "yes" if asked == name else "no"))
    turns = world.telling(draw, turns, told)
    return Sample("clips", picture, tuple(turns), video=True)


def order(draw: random.Random, world: World) -> Sample:
    """Three things, a frame each, and an empty frame; the frame in the middle shows neither the first nor the last."""
    names = _names(draw, 3)
    shown = [Thing(*name, *_somewhere(draw, 20), 20, 20) for name in names]
    frames: list[list[Thing]] = [[thing] for thing in shown]
    frames.insert(draw.randint(0, MIDDLE), [])
    picture = _draw(draw, world, frames)
    turns = [Turn("order", world.phrase(draw, FIRST, place), shown[i].name) for place, i in (("first", 0), ("last", 2))]
    draw.shuffle(turns)
    listed = ", then a ".join(thing.name for thing in shown)
    turns = world.telling(draw, turns, Turn("caption", CAPTION_VIDEO, f"A {listed} appears."))
    return Sample("clips", picture, tuple(turns), video=True)


def blinking(draw: random.Random, world: World) -> Sample:
    """A thing that is there in one to four frames, always in one place, and always in the middle frame."""
    thing = Thing(*_names(draw, 1)[0], *_somewhere(draw, 20), 20, 20)
    many = draw.randint(1, FRAMES)
    on = {MIDDLE, *draw.sample([i for i in range(FRAMES) if i != MIDDLE], many - 1)}
    picture = _draw(draw, world, [[thing] if i in on else [] for i in range(FRAMES)])
    turns = [Turn("times", world.phrase(draw, TIMES, thing.name), str(many), {"many": many})]
    turns = world.telling(draw, turns, Turn("caption", CAPTION_VIDEO, f"A {thing.name} appears {many} times."))
    return Sample("clips", picture, tuple(turns), video=True)


def one_frame(frames: np.ndarray) -> np.ndarray:
    """The same clip for a model that sees one moment only: a middle frame, four times."""
    return np.repeat(frames[MIDDLE : MIDDLE + 1], FRAMES, axis=0)


def _names(draw: random.Random, many: int) -> list[tuple[str, str]]:
    return list(zip(draw.sample(SHAPES, many), draw.sample(list(COLOURS), many), strict=True))


def _somewhere(draw: random.Random, size: int) -> tuple[int, int]:
    x, y = (draw.randrange(0, SIDE - size + 1, STEP) for _ in range(2))
    return x, y


def _middles(draw: random.Random, size: int, pace: int, many: int, across: int) -> list[list[int]]:
    """Where the ways of some things have their middles: far enough from the edges to move, and on ways of their own.

    across  the axis that nothing moves along
    """
    reach = pace * (FRAMES - 1) // 2 + 1
    while True:
        middles = [[draw.randint(reach, SIDE - size - reach) for _ in range(2)] for _ in range(many)]
        if many == 1 or abs(middles[0][across] - middles[1][across]) > size:
            return middles


def _draw(draw: random.Random, world: World, frames: list[list[Thing]]) -> np.ndarray:
    """N S S 3 uint8: one ground, one style, one shade a colour."""
    canvas, style = ground(draw, world), draw.choice(STYLES[world.split])
    shades = {name: world.colour(draw, name) for name in COLOURS}
    seed = draw.random()
    pictures = []
    for things in frames:
        picture = canvas.copy()
        for thing in things:
            paint(picture, thing, shades[thing.colour], style, random.Random(seed))
        pictures.append(finish(picture))
    return np.stack(pictures)
