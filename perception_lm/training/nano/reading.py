"""Words on a plain ground, in capitals, to be read: one somewhere, or several one under another."""

import hashlib
import random
import string
from collections.abc import Iterable, Sequence
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
WORDS = Phrasings(
    (
        "Which words are written here?",
        "Read the words.",
        "Read all words in the image.",
        "What is written here, from top to bottom?",
        "List the words.",
        "Which words are in the image?",
        "Which words do you see?",
    ),
    ("Read all the words.", "Which words are written in the image?"),
)
WHICH = Phrasings(
    (
        "What is the {} word?",
        "Read the {} word.",
        "Which word is the {} one?",
        "Which word is written in the {} line?",
        "What does the {} line say?",
        "Read the {} line.",
        "What is written in the {} line?",
    ),
    ("Which is the {} word?", "What is the word in the {} line?"),
)
WHERE = Phrasings(
    (
        "Which line says {}?",
        "In which line is {}?",
        "Where is {} written?",
        "Which word is {}: the first, the second or another one?",
        "Find {}.",
        "Which line has {}?",
    ),
    ("In which line is {} written?", "In which line do you see {}?"),
)
PLACES = ("first", "second", "third", "fourth", "fifth")
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


def lines(draw: random.Random, world: World) -> Sample:
    """Words one under another, half of them no words at all: a picture full of letters teaches more of them than one
    with a word does, for the same cost."""
    many = draw.choice(((2,), (2, 3), (2, 3, 4, 5))[world.level])
    face, row = draw.choice(FONTS[world.split]), SIDE // many
    size = draw.choice([size for size in SIZES if size <= row - 2])
    longest = (3, 5, LONGEST)[world.level]
    words: list[str] = []
    while len(words) < many:
        word = letters(draw) if not world.words or draw.random() < 0.5 else draw.choice(world.words).upper()
        if word not in words and len(word) <= longest and lettering(word, face, size).shape[1] <= SIDE - 4:
            words.append(word)
    canvas, ink = ground(draw, world), tuple(draw.randint(0, 90) for _ in range(3))
    for i, word in enumerate(words):
        x = draw.randint(1, SIDE - 1 - lettering(word, face, size).shape[1])
        write(canvas, word, x, i * row + draw.randint(0, row - size - 1), face, size, ink)  # type: ignore[arg-type]
    told = Turn("words", world.phrase(draw, WORDS), listed(words))
    turns = [ask(draw, world, words, i) for i in draw.sample(range(many), many)]
    return Sample("lines", finish(canvas)[None], tuple(world.telling(draw, turns, told)))


def ask(draw: random.Random, world: World, words: Sequence[str], i: int) -> Turn:
    """What a line says or, sometimes, which line says it."""
    if draw.random() < 0.35:
        return Turn("where", world.phrase(draw, WHERE, words[i]), PLACES[i])
    return Turn("line", world.phrase(draw, WHICH, PLACES[i]), words[i])


def letters(draw: random.Random) -> str:
    """No word at all, so that none can be guessed from its beginning; never a held-out name of a bar."""
    word = ""
    while not word or word.lower() in BAR_WORDS["test"]:
        word = "".join(draw.choices(string.ascii_uppercase, k=draw.randint(2, 5)))
    return word


def listed(items: Sequence[str]) -> str:
    """A, B and C"""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


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
