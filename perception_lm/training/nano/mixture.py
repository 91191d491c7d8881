"""Which generator draws a sample, by its number; and a sample as a conversation."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from perception.errors import ConfigError
from perception_lm.chat import Clip, Conversation, Message, Part, Picture, Text
from perception_lm.training.nano.charts import charts
from perception_lm.training.nano.clips import FRAMES, clips
from perception_lm.training.nano.emoji import emoji, read_sprites
from perception_lm.training.nano.reading import lines, read_words, reading
from perception_lm.training.nano.scenes import easy, shapes
from perception_lm.training.nano.world import Sample, Split, World

TASKS: Mapping[str, Callable[[random.Random, World], Sample]] = {
    "easy": easy,
    "shapes": shapes,
    "charts": charts,
    "reading": reading,
    "lines": lines,
    "emoji": emoji,
    "clips": clips,
}
WEIGHTS = {"easy": 2.0, "shapes": 4.0, "charts": 4.0, "reading": 1.5, "lines": 1.5, "emoji": 1.0, "clips": 2.5}


class Mixture:
    """Samples by number, each drawn from nothing but the seed and its number.

    world    what may be drawn
    weights  task -> its share; tasks not named are left out
    count    how many there are

    Raises ConfigError for a task that is not there, or that the world has nothing for.
    """

    def __init__(
        self, world: World, weights: Mapping[str, float] | None = None, *, count: int = 1_000_000, seed: int = 0
    ):
        self.world, self.count, self.seed = world, count, seed
        self.weights = dict(WEIGHTS if weights is None else weights)
        if strange := sorted(set(self.weights) - set(TASKS)):
            raise ConfigError(f"no tasks {strange}; there are {', '.join(TASKS)}")
        for task, has in (("reading", world.words), ("lines", world.words), ("emoji", world.sprites)):
            if self.weights.get(task) and not has:
                raise ConfigError(f"the world has nothing to draw for {task!r}; give its data, or weight 0")
        self._tasks = [task for task in TASKS if self.weights.get(task)]
        self._shares = [self.weights[task] for task in self._tasks]

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int) -> Sample:
        """Raises IndexError beyond the last."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        draw = random.Random(f"{self.seed}/{self.world.split}/{index}")
        return TASKS[draw.choices(self._tasks, self._shares)[0]](draw, self.world)

    def __getitem__(self, index: int) -> Conversation:
        return conversation(self.sample(index))

    def fingerprint(self) -> str:
        """Changes with the settings and with the code that draws."""
        said = {**asdict(self.world), "sprites": None, "weights": self.weights, "seed": self.seed}
        return hashlib.sha256(f"{sorted(said.items(), key=lambda i: i[0])!r}/{_code()}".encode()).hexdigest()[:16]


def conversation(sample: Sample, turns: int | None = None) -> Conversation:
    """A sample as messages: the media before the first question; of its turns the first few."""
    media: Part
    if sample.video:
        media = Clip(video=sample.frames, indices=tuple(range(len(sample.frames))))
    else:
        media = Picture(image=Image.fromarray(sample.picture), tiling="vanilla")
    messages = []
    for i, turn in enumerate(sample.turns[:turns]):
        text = Text(text=turn.question, literal=True)
        messages.append(Message("user", (media, text) if i == 0 else (text,)))
        messages.append(Message("assistant", (Text(text=turn.answer, literal=True),)))
    return Conversation(tuple(messages))


def make(
    *,
    data: str = "runs/data",
    split: Split = "train",
    level: int = 2,
    told: bool = False,
    weights: Mapping[str, float] | None = None,
    count: int = 1_000_000,
    seed: int = 0,
) -> Mixture:
    """A mixture from what the data folder holds; the source "nano" of run files.

    Raises MediaError without the data, ConfigError for settings that cannot be.
    """
    if split not in ("train", "test") or level not in (0, 1, 2):
        raise ConfigError(f"split={split!r}, level={level!r}; expected 'train' or 'test', and 0, 1 or 2")
    weights = dict(WEIGHTS if weights is None else weights)
    return Mixture(world_of(data, split, level, told, _needs(weights)), weights, count=count, seed=seed)


def _needs(weights: Mapping[str, float]) -> tuple[str, ...]:
    words = ("reading",) if weights.get("reading") or weights.get("lines") else ()
    return (*words, "emoji") if weights.get("emoji") else words


@cache
def world_of(
    data: str, split: Split, level: int = 2, told: bool = False, needs: tuple[str, ...] = ("reading", "emoji")
) -> World:
    """The world of a data folder. `needs`: tasks that want files of it."""
    return World(
        split=split,
        level=level,
        told=told,
        words=read_words(Path(data), split) if "reading" in needs else (),
        sprites=_sprites(data, split) if "emoji" in needs else None,
    )


@cache
def _sprites(data: str, split: Split) -> Any:
    return read_sprites(Path(data), split)


@cache
def _code() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


__all__ = ["FRAMES", "TASKS", "WEIGHTS", "Mixture", "conversation", "make"]
