"""The pictures and the clip of `perception_lm.samples`, drawn from the held-out world; no training run sees them.

python -m perception_lm.training.nano.samples
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perception.files import atomic_write
from perception_lm import samples
from perception_lm.training.nano import charts, clips, scenes
from perception_lm.training.nano.world import World


def draw() -> dict[str, tuple[list[np.ndarray], dict[str, Any]]]:
    """Name -> frames (of a picture, one) and questions with their answers."""
    world = World(split="test", asked="train")
    dice = random.Random("demo/chart")
    chart, face = charts.invent(dice, replace(world, level=1))  # two or three bars
    picture = charts.plot(dice, world, chart, face)
    largest = chart.names[chart.values.index(max(chart.values))]
    chart_asked = [
        [charts.DESCRIBE.train[0], charts.describe(chart).answer],
        [charts.LARGEST.train[0], largest],
        [charts.VALUE.train[0].format(chart.names[0]), str(chart.values[0])],
    ]
    dice = random.Random("demo/scene")
    things = scenes.arrange(dice, world, 4)
    scene = scenes.show(dice, world, things)
    lone = next(t for t in things if sum(o.colour == t.colour for o in things) == 1)
    scene_asked = [
        [scenes.COUNT.train[0], str(len(things))],
        [scenes.SHAPE_OF.train[0].format(lone.colour), lone.shape],
    ]
    moving = clips.moving(random.Random("demo/clip"), world)
    clip_asked = [[turn.question, turn.answer] for turn in moving.turns if turn.kind in ("direction", "which")]
    return {
        "chart": ([picture], {"questions": chart_asked}),
        "scene": ([scene], {"questions": scene_asked, "find": [things[0].name, scenes.box_text(things[0])]}),
        "clip": (list(moving.frames), {"questions": clip_asked}),
    }


def main(folder: Path = Path(samples.__file__).parent) -> None:
    listed: dict[str, Any] = {}
    for name, (frames, facts) in draw().items():
        paths = (
            [folder / f"{name}.png"] if len(frames) == 1 else [folder / name / f"{i}.png" for i in range(len(frames))]
        )
        for path, frame in zip(paths, frames, strict=True):
            path.parent.mkdir(exist_ok=True)
            with atomic_write(path) as temporary:
                Image.fromarray(frame).save(temporary, "PNG")
        listed[name] = {"path": f"{name}.png" if len(frames) == 1 else name, **facts}
    with atomic_write(folder / "samples.json") as temporary:
        temporary.write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
