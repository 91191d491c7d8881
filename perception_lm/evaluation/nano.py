"""PLM-nano's own tasks: pictures with exact answers, asked one question each, and what counts as right.

exact       the answer is the text that was expected
box         intersection over union of at least a half
words       every category of a chart, in order
values      every value of a chart within 5 %
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perception_lm.assistant import Assistant
from perception_lm.regions import parse_boxes
from perception_lm.training.nano.mixture import TASKS, Mixture, conversation
from perception_lm.training.nano.world import COLOURS, SHAPES, SIDE, Sample, Turn, World

GREY = 127


@dataclass(frozen=True)
class Question:
    """One question about one sample, asked alone."""

    sample: Sample
    turn: Turn

    @property
    def kind(self) -> str:
        return f"{self.sample.task}: {self.turn.kind}"

    def messages(self) -> Any:
        return replace_last(conversation(replace(self.sample, turns=(self.turn,))))


def replace_last(talk: Any) -> Any:
    """A conversation without its answer."""
    return replace(talk, messages=talk.messages[:-1])


def questions(world: World, task: str, count: int, *, seed: int = 1000, kinds: Sequence[str] = ()) -> list[Question]:
    """The first `count` questions of a task, one a picture: of the kinds asked for, or of each in turn.

    seed  of pictures that no training run has drawn
    """
    mixture = Mixture(world, {task: 1.0}, count=10**9, seed=seed)
    found: list[Question] = []
    index = 0
    while len(found) < count:
        sample = mixture.sample(index)
        draw = random.Random(f"{seed}/{index}")
        turns = [turn for turn in sample.turns if not kinds or turn.kind in kinds]
        if turns:
            found.append(Question(sample, draw.choice(turns)))
        index += 1
        if index > 100 * count + 1000:
            raise ValueError(f"the task {task!r} asks nothing of the kinds {list(kinds)}")
    return found


def ask(assistant: Assistant, asked: Sequence[Question], *, batch: int = 32, max_new_tokens: int = 96) -> list[str]:
    """The model's answers, in order."""
    answers = [""] * len(asked)
    # Prompts and answers of like length together: nothing is padded for long.
    order = sorted(range(len(asked)), key=lambda i: (asked[i].kind, len(asked[i].turn.question), i))
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        replies = assistant.generate([asked[i].messages() for i in rows], max_new_tokens=max_new_tokens)
        for i, reply in zip(rows, replies, strict=True):
            answers[i] = reply.text
    return answers


def blinded(asked: Iterable[Question]) -> list[Question]:
    """The same questions about pictures of plain grey: what the words alone tell."""
    return [replace(q, sample=replace(q.sample, frames=np.full_like(q.sample.frames, GREY))) for q in asked]


def scores(turn: Turn, answer: str) -> dict[str, bool]:
    """Measure -> whether the answer is right by it; the first is the one that counts."""
    answer = answer.strip()
    if turn.kind == "ground":
        return {"box": iou(answer, turn.facts["box"]) >= 0.5}
    if turn.kind == "describe":
        told = read_chart(answer)
        values = turn.facts["values"]
        return {
            "words": told["names"] == tuple(turn.facts["names"]),
            "values": len(told["values"]) == len(values) and all(map(near, told["values"], values)),
            "axis": told["end"] == turn.facts["end"],
            "exact": answer == turn.answer,
        }
    if turn.kind == "value":
        return {"values": answer.isdecimal() and near(int(answer), turn.facts["value"]), "exact": answer == turn.answer}
    if turn.kind == "names":
        return {"words": answer == turn.answer}
    return {"exact": answer == turn.answer}


def iou(answer: str, box: Sequence[float]) -> float:
    """Of the first box of an answer; 0 when there is none."""
    found = parse_boxes(answer, width=SIDE, height=SIDE)
    if not found:
        return 0.0
    (x1, y1, x2, y2), (a1, b1, a2, b2) = found[0].xyxy, box
    common = max(0.0, min(x2, a2) - max(x1, a1)) * max(0.0, min(y2, b2) - max(y1, b1))
    both = max(0.0, x2 - x1) * max(0.0, y2 - y1) + (a2 - a1) * (b2 - b1) - common
    return common / both if both > 0 else 0.0


def near(found: int, wanted: int) -> bool:
    """Within 5 %, as ChartQA's relaxed accuracy."""
    return abs(found - wanted) <= 0.05 * abs(wanted)


def read_chart(answer: str) -> dict[str, Any]:
    """Names, values and the end of the axis, from a description of a bar plot; what is not there is empty."""
    names = re.search(r"categories: ([^.]*)\.", answer)
    end = re.search(r"from 0 to (\d{1,6})", answer)
    values = re.search(r"The values are ([^.]*)", answer)
    pairs = re.findall(r"([A-Z]+) (\d{1,6})", values[1]) if values else []
    return {
        "names": tuple(re.split(r", | and ", names[1])) if names else (),
        "end": int(end[1]) if end else None,
        "values": tuple(int(value) for _, value in pairs),
    }


def distance(a: str, b: str) -> int:
    """Letters to insert, delete or replace (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


class Prior:
    """What an answer is without looking: the most frequent one to the same question, to others of its wording, or to
    its kind; the first of these that was asked often enough to tell."""

    ENOUGH = 10

    def __init__(self, seen: Iterable[Sample]):
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        kinds: dict[str, Counter[str]] = defaultdict(Counter)
        for sample in seen:
            for turn in sample.turns:
                kinds[f"{sample.task}: {turn.kind}"][turn.answer] += 1
                for text in {turn.question, wording(turn.question)}:
                    counts[text][turn.answer] += 1
        self.by_text = {
            text: count.most_common(1)[0][0] for text, count in counts.items() if count.total() >= self.ENOUGH
        }
        self.by_kind = {kind: count.most_common(1)[0][0] for kind, count in kinds.items()}
        self.answers: Mapping[str, int] = {kind: len(count) for kind, count in kinds.items()}

    def majority(self, question: Question) -> str:
        return self.by_kind.get(question.kind, "")

    def guess(self, question: Question) -> str:
        """By the question's words, as a model that cannot see may learn it."""
        for text in (question.turn.question, wording(question.turn.question)):
            if text in self.by_text:
                return self.by_text[text]
        return self.majority(question)


def wording(question: str) -> str:
    """A question with what differs from picture to picture left out: boxes, numbers, names, colours, shapes."""
    return re.sub(r"\[[\d,]+\]|\b(?:\d+|[A-Z]{2,}|" + "|".join((*COLOURS, *SHAPES)) + r")s?\b", "_", question)


def centre_box() -> str:
    """A box in the middle that is half as wide and as high as the picture."""
    return "[250,250,750,750]"


__all__ = ["TASKS", "Prior", "Question", "ask", "blinded", "centre_box", "questions", "scores", "wording"]
