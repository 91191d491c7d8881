"""One word on a plain ground, in capitals, to be read."""

import hashlib
import random
from collections.abc import Iterable
from pathlib import Path

from perception.errors import MediaError
from perception_lm.training.nano.canvas import finish, ground, lettering, write
from perception_lm.training.nano.world import BAR_WORDS, FONTS, SIDE, Phrasings, Sample, Split, Turn, World

READ = Phrasings(
    (
        "Which word is written here?",
        "Read the word.",
        "What does the image say?",
        "What word is this?",
        "Which word is in the image?",
        "What is written in the image?",
        "What is written here?",
        "Read the word in this picture.",
        "Which word do you see?",
    ),
    ("Read the word in the image.", "Which word is written in the image?"),
)
SIZES = (8, 9, 10, 12, 14)  # of letters, in pixels
LONGEST = 7


def reading(draw: random.Random, world: World) -> Sample:
    """A word somewhere."""
    face, size = draw.choice(FONTS[world.split]), draw.choice(SIZES)
    longest = (3, 5, LONGEST)[world.level]
    word = ""
    while not word or len(word) > longest or lettering(word, face, size).shape[1] > SIDE - 4:
        word = draw.choice(world.words).upper()
    ink = lettering(word, face, size)
    canvas = ground(draw, world)
    x, y = draw.randint(1, SIDE - 1 - ink.shape[1]), draw.randint(0, SIDE - ink.shape[0])
    write(canvas, word, x, y, face, size, tuple(draw.randint(0, 90) for _ in range(3)))  # type: ignore[arg-type]
    return Sample("reading", finish(canvas)[None], (Turn("read", world.phrase(draw, READ), word),))


def read_words(data: Path, split: Split) -> tuple[str, ...]:
    """WordNet's nouns of three to seven letters; one in ten is held out, and so are the held-out names of bars."""
    path = data / "words.txt"
    if not path.is_file():
        raise MediaError(f"no words at {path}; run `python -m perception_encoder.training.drawings --out {data}`")
    return choose_words(path.read_text(encoding="utf-8").split(), split)


def choose_words(words: Iterable[str], split: Split) -> tuple[str, ...]:
    """Of a split, in order. Which a word is in depends on its letters alone."""
    kept = {word for word in words if 3 <= len(word) <= LONGEST and word.isascii() and word.isalpha()}
    return tuple(sorted(word for word in kept if _held_out(word) == (split == "test")))


def _held_out(word: str) -> bool:
    if word in BAR_WORDS["train"]:
        return False
    return word in BAR_WORDS["test"] or hashlib.sha256(word.encode()).digest()[0] % 10 == 0
