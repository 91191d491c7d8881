"""What may be drawn and how it may be asked for: one world to learn from, and one held out from it.

Held out are styles of filling, grounds, shades of the colours, fonts, words, an emoji set, and phrasings of questions.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Split = Literal["train", "test"]
SIDE = 64  # pixels of a picture and of a frame

# The eight colours of easy-VQA, and two more. A shade is drawn near one of a colour's values.
COLOURS: Mapping[str, Mapping[Split, Sequence[tuple[int, int, int]]]] = {
    "red": {"train": [(255, 0, 0), (225, 30, 30)], "test": [(205, 15, 40)]},
    "green": {"train": [(0, 255, 0), (30, 160, 50)], "test": [(50, 205, 60)]},
    "blue": {"train": [(0, 0, 255), (40, 70, 220)], "test": [(20, 40, 190)]},
    "black": {"train": [(0, 0, 0), (25, 25, 25)], "test": [(12, 10, 18)]},
    "gray": {"train": [(128, 128, 128), (110, 110, 115)], "test": [(140, 138, 135)]},
    "teal": {"train": [(0, 128, 128), (10, 140, 145)], "test": [(20, 120, 125)]},
    "brown": {"train": [(165, 42, 42), (130, 75, 35)], "test": [(145, 60, 40)]},
    "yellow": {"train": [(255, 255, 0), (240, 215, 20)], "test": [(250, 235, 40)]},
    "orange": {"train": [(255, 140, 0), (245, 125, 30)], "test": [(250, 150, 20)]},
    "purple": {"train": [(128, 0, 128), (140, 60, 190)], "test": [(120, 30, 160)]},
}
EASY_COLOURS = ("red", "green", "blue", "black", "gray", "teal", "brown", "yellow")
EASY_SHAPES = ("circle", "rectangle", "triangle")
SHAPES = (*EASY_SHAPES, "star", "cross")

STYLES: Mapping[Split, Sequence[str]] = {
    "train": ("flat", "flat", "bordered", "shaded", "noisy", "rimmed", "halved", "dotted", "lit"),
    "test": ("striped", "shadowed"),
}
GROUNDS: Mapping[Split, Sequence[str]] = {
    "train": ("pastel", "pastel", "white", "grain", "halves", "ruled"),
    "test": ("fade",),
}

FONTS: Mapping[Split, Sequence[str]] = {
    "train": (
        "DejaVuSansMono",
        "DejaVuSans",
        "DejaVuSansCondensed",
        "DejaVuSansMono-Bold",
        "DejaVuSans-Bold",
        "DejaVuSansCondensed-Bold",
        "LiberationSansNarrow-Regular",
        "LiberationMono-Regular",
        "LiberationSans-Regular",
    ),
    "test": ("LiberationMono-Bold", "LiberationSans-Bold"),
}


def _split(words: str) -> tuple[str, ...]:
    return tuple(words.split())


# Names of bars. The held-out ones name no bar in training, nor are they read there.
BAR_WORDS: Mapping[Split, Sequence[str]] = {
    "train": _split(
        """
        ant arm axe bag bat bed bee bell belt bike bird boat bone book boot bowl box bread brick brush bus
        cake camp car card cat chair city clay clock cloud coal coat coin corn cow cup deer desk dog door
        drum duck dust ear egg eye farm fig fire fish flag fork fox frog gate gold goat grass hand hat hen
        hill home horn horse ice ink jar key king kite lake lamb lamp leaf lion log lumber map milk mood
        moon mouse nail nest nut oak oil owl pan pear pen pig pipe plum pond queen rain ring road rock roof
        rope rose salt sand seed ship shoe silk snow soap song soup star stone sugar sun table tea tent toy
        train tree van wall water well wheel wind wolf wood wool yarn zoo
        """
    ),
    "test": _split(
        """
        barn bean bush cave crab dish dove fern fan gem hawk juice knot lime mask moth net peach pin reef
        seal shell step swan tiger tower tube vine web worm
        """
    ),
}


@dataclass(frozen=True, kw_only=True)
class World:
    """What a generator draws from.

    split     "train", or "test" for what is held out
    level     0 single things, 1 a few, 2 everything
    told      only descriptions, no questions
    asked     which phrasings questions use; those of the split when not given
    words     to be read
    sprites   emoji, from `emoji.read_sprites`; without them no emoji are drawn
    """

    split: Split = "train"
    level: int = 2
    told: bool = False
    asked: Split | None = None
    words: Sequence[str] = ()
    sprites: Any = field(default=None, repr=False)

    def phrase(self, draw: random.Random, phrasings: "Phrasings", *values: object, **named: object) -> str:
        """One way to put a question, with its blanks filled in."""
        return draw.choice(phrasings.get(self.asked or self.split)).format(*values, **named)

    def telling(self, draw: random.Random, turns: "list[Turn]", told: "Turn") -> "list[Turn]":
        """Questions, at times with the whole description after them, where it gives no answer away; or it alone."""
        if self.told or draw.random() < 0.2:
            return [told]
        return [*turns, told] if draw.random() < 0.2 else turns

    def colour(self, draw: random.Random, name: str) -> tuple[int, int, int]:
        """A shade of a colour."""
        base = draw.choice(COLOURS[name][self.split])
        red, green, blue = (min(255, max(0, value + draw.randint(-12, 12))) for value in base)
        return red, green, blue


@dataclass(frozen=True)
class Phrasings:
    """Ways to ask one thing: some to learn from, others held out. Without held-out ones there is but one wording."""

    train: Sequence[str]
    test: Sequence[str] = ()

    def get(self, split: Split) -> Sequence[str]:
        return self.test if split == "test" and self.test else self.train


@dataclass(frozen=True)
class Turn:
    """A question and its exact answer.

    kind   what is asked, for figures by kind
    facts  what an answer is checked against, where its text is not enough
    """

    kind: str
    question: str
    answer: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """A picture or a clip, and what is asked about it.

    task    the generator's name
    frames  N S S 3 uint8; of a picture N = 1
    video   whether the frames are a clip
    """

    task: str
    frames: np.ndarray
    turns: tuple[Turn, ...]
    video: bool = False

    @property
    def picture(self) -> np.ndarray:
        return self.frames[0]
