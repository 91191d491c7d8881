"""Bar charts: horizontal bars with a name each, and an axis from 0.

Names are capitals, which the tokenizer spells letter by letter; an axis ends at 10, 20, 50 or 100, and a value is a
tenth of that, or several.
"""

import random
from dataclasses import dataclass

import numpy as np

from perception_lm.training.nano.canvas import finish, ground, lettering, write
from perception_lm.training.nano.reading import PLACES, letters, listed
from perception_lm.training.nano.scenes import once
from perception_lm.training.nano.world import BAR_WORDS, FONTS, SIDE, Phrasings, Sample, Turn, World

DESCRIBE = Phrasings(("Describe the bar plot in the image.",))  # the reference's own question
VALUE = Phrasings(
    (
        "What is the value of {}?",
        "How large is {}?",
        "Which value does {} have?",
        "What value does {} have?",
        "Tell me the value of {}.",
        "What is the value of {} in the bar plot?",
        "Which value does the bar {} show?",
        "How long is the bar {}?",
        "Read the value of {}.",
    ),
    ("What is the value of the bar {}?", "Which value has {}?"),
)
LARGEST = Phrasings(
    (
        "Which category has the largest value?",
        "Which bar is the longest?",
        "Name the category with the largest value.",
        "What is the largest category?",
        "Which category is the largest?",
        "Name the longest bar.",
        "Which one has the largest value?",
        "What has the longest bar?",
    ),
    ("Which category has the longest bar?", "Name the largest category."),
)
SMALLEST = Phrasings(
    (
        "Which category has the smallest value?",
        "Which bar is the shortest?",
        "Name the category with the smallest value.",
        "What is the smallest category?",
        "Which category is the smallest?",
        "Name the shortest bar.",
        "Which one has the smallest value?",
        "What has the shortest bar?",
    ),
    ("Which category has the shortest bar?", "Name the smallest category."),
)
MORE = Phrasings(
    (
        "Is {a} larger than {b}?",
        "Is the value of {a} larger than the value of {b}?",
        "Is {a} more than {b}?",
        "Does {a} have a larger value than {b}?",
        "Is the bar of {a} longer than that of {b}?",
        "Is the value of {a} larger than that of {b}?",
    ),
    ("Is the bar of {a} larger than the bar of {b}?",),
)
NUMBER = Phrasings(
    (
        "How many bars are there?",
        "Count the bars.",
        "How many categories are there?",
        "How many bars does the plot have?",
        "What is the number of bars?",
        "Number of categories?",
        "How many categories do you see?",
        "Count the bars in the image.",
    ),
    ("How many bars do you see?", "Count the categories."),
)
AXIS = Phrasings(
    (
        "Where does the axis end?",
        "What is the largest value of the axis?",
        "At which value does the axis end?",
        "What is the last number of the axis?",
        "How far does the axis go?",
    ),
    ("What is the end of the axis?",),
)
NAMES = Phrasings(
    (
        "Name the categories.",
        "Which categories are there?",
        "Name all bars.",
        "Which bars does the bar plot have?",
        "What are the categories of the bar plot?",
        "List the categories.",
    ),
    ("Name the categories of the bar plot.",),
)
WHERE = Phrasings(
    (
        "Which bar is {}, counted from the top?",
        "Where is the bar {}?",
        "In which place from the top is {}?",
        "The bar {} is which one from the top?",
        "Find the bar {}.",
    ),
    ("In which row is the bar {}?", "Where do you see the bar {}?"),
)

ENDS = (10, 20, 50, 100)
NUMBERS = ("zero", "one", "two", "three", "four")
LEFT, RIGHT, FOOT = 27, 62, 53  # pixels: where bars start, where the axis ends, where it lies
BAR_COLOURS = {
    "train": ((70, 110, 180), (220, 120, 50), (80, 160, 80), (190, 60, 60), (130, 100, 180), (120, 120, 120)),
    "test": ((30, 150, 160), (200, 90, 150), (160, 140, 40)),
}


@dataclass(frozen=True)
class Chart:
    """What a chart says, from top to bottom."""

    names: tuple[str, ...]
    values: tuple[int, ...]
    end: int


def charts(draw: random.Random, world: World) -> Sample:
    """A bar chart, described or asked about."""
    chart, face = invent(draw, world)
    picture = plot(draw, world, chart, face)
    asked = (value, value, value, where, where, extreme, more, number, axis, names)
    turns = once([ask(draw, world, chart) for ask in draw.choices(asked, k=draw.randint(5, 8))])
    turns = [describe(chart)] if draw.random() < 0.3 else world.telling(draw, turns, describe(chart))
    return Sample("charts", picture[None], tuple(turns))


def invent(draw: random.Random, world: World) -> tuple[Chart, str]:
    """A chart whose names fit beside its bars, and the font that they fit in."""
    likely = (0.4, 0.3, 0.3) if world.split == "train" else (1.0, 0.0, 0.0)
    bars = draw.choice(((2,), (2, 3), (2, 3, 4))[world.level])
    face = draw.choice(FONTS[world.split])
    chosen: list[str] = []
    while len(chosen) < bars:
        word = draw.choices((bar_word, noun, nonsense), likely)[0](draw, world)
        if word not in chosen and lettering(word, face, 8).shape[1] < LEFT - 1:
            chosen.append(word)
    end = draw.choice(ENDS)
    # No two bars alike: the largest and the smallest are one each.
    tenths = draw.sample(range(1, 11), bars)
    return Chart(tuple(chosen), tuple(tenth * end // 10 for tenth in tenths), end), face


def bar_word(draw: random.Random, world: World) -> str:
    return draw.choice(BAR_WORDS[world.split]).upper()


def noun(draw: random.Random, world: World) -> str:
    """Of all the words there are to read: from the few names of bars alone, a model learns names and no letters."""
    return draw.choice(world.words).upper() if world.words else bar_word(draw, world)


def nonsense(draw: random.Random, world: World) -> str:
    return letters(draw)


def size_of(chart: Chart, face: str) -> int:
    """Of the names' letters: as large as the room beside and above the bars allows."""
    high = {2: 11, 3: 10}.get(len(chart.names), 8)
    fitting = (s for s in range(high, 8, -1) if all(lettering(n, face, s).shape[1] < LEFT - 1 for n in chart.names))
    return next(fitting, 8)


def plot(draw: random.Random, world: World, chart: Chart, face: str) -> np.ndarray:
    """S S 3 uint8"""
    canvas = ground(draw, world)
    row = FOOT // len(chart.names)
    thick = max(6, row - draw.choice((4, 5, 6)))
    palette = list(BAR_COLOURS[world.split])
    draw.shuffle(palette)
    size = size_of(chart, face)
    one_colour = draw.random() < 0.5
    for i, (name, value) in enumerate(zip(chart.names, chart.values, strict=True)):
        top, middle = i * row + (row - thick) // 2, i * row + row // 2
        length = round((RIGHT - LEFT) * value / chart.end)
        canvas[top : top + thick, LEFT : LEFT + length] = palette[0 if one_colour else i % len(palette)]
        write(canvas, name, 1, middle - round(0.7 * size), face, size)
    canvas[:FOOT, LEFT - 1] = 60
    canvas[FOOT, LEFT - 1 : RIGHT + 1] = 60
    end = str(chart.end)
    write(canvas, "0", LEFT - 2, FOOT + 1, face, 8)
    write(canvas, end, SIDE - 1 - lettering(end, face, 8).shape[1], FOOT + 1, face, 8)
    return finish(canvas)


def describe(chart: Chart) -> Turn:
    """Categories, axis and values, as the reference's models describe a bar plot."""
    names = listed(chart.names)
    values = listed([f"{name} {value}" for name, value in zip(chart.names, chart.values, strict=True)])
    answer = (
        f"The bar plot displays the values of {NUMBERS[len(chart.names)]} categories: {names}. "
        f"The axis runs from 0 to {chart.end}. The values are {values}."
    )
    return Turn("describe", DESCRIBE.train[0], answer, {"names": chart.names, "values": chart.values, "end": chart.end})


def value(draw: random.Random, world: World, chart: Chart) -> Turn:
    i = draw.randrange(len(chart.names))
    asked = world.phrase(draw, VALUE, chart.names[i])
    return Turn("value", asked, str(chart.values[i]), {"value": chart.values[i]})


def where(draw: random.Random, world: World, chart: Chart) -> Turn:
    i = draw.randrange(len(chart.names))
    return Turn("where", world.phrase(draw, WHERE, chart.names[i]), PLACES[i])


def extreme(draw: random.Random, world: World, chart: Chart) -> Turn:
    largest = draw.random() < 0.5
    i = chart.values.index(max(chart.values) if largest else min(chart.values))
    return Turn("extreme", world.phrase(draw, LARGEST if largest else SMALLEST), chart.names[i])


def more(draw: random.Random, world: World, chart: Chart) -> Turn:
    a, b = draw.sample(range(len(chart.names)), 2)
    asked = world.phrase(draw, MORE, a=chart.names[a], b=chart.names[b])
    return Turn("compare", asked, "yes" if chart.values[a] > chart.values[b] else "no")


def number(draw: random.Random, world: World, chart: Chart) -> Turn:
    return Turn("number", world.phrase(draw, NUMBER), str(len(chart.names)))


def axis(draw: random.Random, world: World, chart: Chart) -> Turn:
    return Turn("axis", world.phrase(draw, AXIS), str(chart.end))


def names(draw: random.Random, world: World, chart: Chart) -> Turn:
    return Turn("names", world.phrase(draw, NAMES), listed(chart.names), {"names": chart.names})
