"""What does PLM-nano see in pictures of a kind it never learned from?

    python -m perception_encoder.training.drawings --out runs/data    # once
    pip install easy-vqa                                              # its test pictures and questions
    python benchmarks/plm_nano.py --data runs/data

Writes benchmarks/results/plm_nano.json and the table of figures in the model's card. Every question is asked alone,
with greedy decoding, through `Assistant.generate`. Held out are fillings, grounds, shades, fonts, words, the emoji set
openmoji, and a set of phrasings; easy-VQA's pictures are in no training data at all.

Beside each figure stand four that need no eyes: chance (the answer to another of the questions), the most frequent
answer of the kind, the most frequent answer to questions of the same words or wording, and the model itself shown grey.
For boxes there is a box in the middle besides; for clips, the model shown one frame four times.
"""

import argparse
import json
import re
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import RESULTS, record

from perception.files import atomic_write, sha256_of
from perception_encoder.evaluation import wilson_interval
from perception_lm import load
from perception_lm.assistant import Assistant
from perception_lm.evaluation.nano import Prior, Question, ask, blinded, centre_box, distance, iou, questions, scores
from perception_lm.training.nano.clips import one_frame
from perception_lm.training.nano.mixture import Mixture, world_of
from perception_lm.training.nano.world import Sample, Turn, World

ROOT = Path(__file__).parents[1]
CARD = ROOT / "perception_lm" / "weights" / "PLM-nano" / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/plm_nano.py -->", "<!-- end of figures -->"

# name -> generator, kinds of question, what it is called in the table, the figures to reach by measure
TESTS: dict[str, tuple[str, tuple[str, ...], str, dict[str, float]]] = {
    "count": ("shapes", ("count",), "counting, 1 to 6 shapes", {"exact": 0.95}),
    "count_of": ("shapes", ("count of",), "counting one shape or colour", {}),
    "attribute": ("shapes", ("attribute",), "color or shape of one of several", {}),
    "exists": ("shapes", ("exists",), "is there ...?", {}),
    "compare": ("shapes", ("compare",), "larger, left of, above ...", {}),
    "scene_caption": ("shapes", ("caption",), "scene caption, every word", {}),
    "ground": ("shapes", ("ground",), "box of a shape, IoU >= 0.5", {"box": 0.90}),
    "region": ("shapes", ("region",), "name of what is in a box", {}),
    "chart_describe": ("charts", ("describe",), "bar chart described", {"words": 0.95, "values": 0.90}),
    "chart_value": ("charts", ("value",), "bar chart, value of a bar within 5 %", {"values": 0.90}),
    "chart_where": ("charts", ("where",), "bar chart, which one is named so?", {}),
    "chart_extreme": ("charts", ("extreme",), "bar chart, largest or smallest bar", {}),
    "chart_compare": ("charts", ("compare",), "bar chart, is A larger than B?", {}),
    "chart_number": ("charts", ("number", "axis"), "bar chart, bars or end of axis", {}),
    "chart_names": ("charts", ("names",), "bar chart, names of all bars", {}),
    "read": ("reading", ("read",), "word read, every letter", {}),
    "lines": ("lines", ("words", "line"), "one or all of two to five words", {}),
    "lines_where": ("lines", ("where",), "which of two to five words is ...?", {}),
    "emoji_name": ("emoji", ("name", "caption"), "emoji named, 64 names", {}),
    "emoji_ground": ("emoji", ("ground",), "box of an emoji, IoU >= 0.5", {}),
    "clip_direction": ("clips", ("direction",), "clip: direction", {"exact": 0.90}),
    "clip_which": ("clips", ("which",), "clip: which one moved", {"exact": 0.90}),
    "clip_moves": ("clips", ("moves",), "clip: does it move?", {}),
    "clip_order": ("clips", ("order",), "clip: first or last to appear", {"exact": 0.90}),
    "clip_times": ("clips", ("times",), "clip: how many times", {"exact": 0.90}),
}


HEADER = (
    "| held-out test | right % (95 % interval) | to reach % | n | known phrasing, seen styles % | chance % "
    "| majority % | question only % | shown grey % | other % |"
)
SEED, PRIOR_SEED = 1000, 2000  # of pictures that no training run draws
EXTRA = (
    ("centre_box", "centre box"),
    ("mean_iou", "mean IoU"),
    ("one_frame", "one frame"),
    ("character_error_rate", "letters wrong"),
)
BLIND = ("chance", "majority", "question_only", "blind")


def measure(assistant: Assistant, prior: Prior, asked: list[Question]) -> dict[str, Any]:
    """Figures of some questions of like kind, beside those that need no eyes."""
    answers = ask(assistant, asked)
    result = figures(asked, answers)
    result["majority"] = shares(asked, [prior.majority(q) for q in asked])
    result["question_only"] = shares(asked, [prior.guess(q) for q in asked])
    result["blind"] = shares(asked, ask(assistant, blinded(asked)))
    # What the answer to another of these questions is worth here. Boxes and descriptions are hardly ever the same, so
    # one of the answers that the kind has says less.
    others = [q.turn.answer for q in asked[1:] + asked[:1]]
    result["chance"] = shares(asked, others)
    if asked[0].turn.kind == "ground":
        result["centre_box"] = share(asked, [centre_box()] * len(asked))
        result["mean_iou"] = round(
            float(np.mean([iou(a, q.turn.facts["box"]) for q, a in zip(asked, answers, strict=True)])), 4
        )
    if asked[0].turn.kind in ("read", "line", "words"):
        letters = sum(len(q.turn.answer) for q in asked)
        wrong = sum(distance(a.strip(), q.turn.answer) for q, a in zip(asked, answers, strict=True))
        result["character_error_rate"] = round(wrong / letters, 4)
    if asked[0].sample.video:
        still = [replace(q, sample=replace(q.sample, frames=one_frame(q.sample.frames))) for q in asked]
        result["one_frame"] = share(asked, ask(assistant, still))
    missed = [(q, a) for q, a in zip(asked, answers, strict=True) if not next(iter(scores(q.turn, a).values()))]
    result["missed"] = [{"question": q.turn.question, "answer": a, "expected": q.turn.answer} for q, a in missed[:5]]
    return result


def figures(asked: list[Question], answers: list[str]) -> dict[str, Any]:
    """Shares of right answers by every measure that the questions have, with their 95 % intervals."""
    rows: dict[str, list[bool]] = defaultdict(list)
    for question, answer in zip(asked, answers, strict=True):
        for name, right in scores(question.turn, answer).items():
            rows[name].append(right)
    found = {}
    for name, right in rows.items():
        value = sum(right) / len(right)
        low, high = wilson_interval(value, len(right))
        found[name] = {"share": round(value, 4), "interval95": [round(low, 4), round(high, 4)], "n": len(right)}
    return {"measures": found}


def share(asked: list[Question], answers: list[str]) -> float:
    """Of right answers, by the first measure of each question."""
    return next(iter(shares(asked, answers).values()))


def shares(asked: list[Question], answers: list[str]) -> dict[str, float]:
    """Measure -> share of right answers."""
    return {name: found["share"] for name, found in figures(asked, answers)["measures"].items()}


def easy_vqa(split: str) -> list[Question]:
    """easy-VQA's own pictures and questions; empty when the package is not installed."""
    try:
        import easy_vqa
    except ImportError:
        return []
    texts, answers, ids = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    pictures = {i: np.asarray(Image.open(path).convert("RGB"))[None] for i, path in paths.items()}
    kinds = ["yes/no" if answer in ("yes", "no") else "other" for answer in answers]
    rows = zip(texts, answers, ids, kinds, strict=True)
    return [Question(Sample("easy-vqa", pictures[i], ()), Turn(kind, text, answer)) for text, answer, i, kind in rows]


def measure_easy_vqa(assistant: Assistant, limit: int) -> dict[str, Any] | None:
    asked = easy_vqa("test")
    if not asked:
        return None
    if limit:
        asked = [asked[i] for i in np.random.default_rng(0).permutation(len(asked))[:limit]]
    # What words alone tell is learned from its training questions; their pictures are not looked at.
    known = Prior(Sample("easy-vqa", q.sample.frames, (q.turn,)) for q in easy_vqa("train"))
    answers = ask(assistant, asked, batch=64, max_new_tokens=8)
    result = figures(asked, answers)
    right = [q.turn.answer == a.strip() for q, a in zip(asked, answers, strict=True)]
    for kind in ("yes/no", "other"):
        part = [r for q, r in zip(asked, right, strict=True) if q.turn.kind == kind]
        low, high = wilson_interval(sum(part) / len(part), len(part))
        result[kind] = {"share": round(sum(part) / len(part), 4), "interval95": [low, high], "n": len(part)}
    some = asked[:1000]
    result["majority"] = shares(asked, ["no"] * len(asked))
    result["question_only"] = shares(asked, [known.guess(q) for q in asked])
    result["blind"] = shares(some, ask(assistant, blinded(some), batch=64, max_new_tokens=8))
    result["chance"] = {"exact": round(1 / 13, 4)}  # of the answers that there are
    missed = [(q, a) for q, a, r in zip(asked, answers, right, strict=True) if not r]
    result["missed"] = [{"question": q.turn.question, "answer": a, "expected": q.turn.answer} for q, a in missed[:8]]
    return result


def rows_of(results: dict[str, Any]) -> list[str]:
    """The table of the card."""

    def percent(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f}"

    lines = [
        HEADER,
        "|---|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for found in results.values():
        if found is None:
            continue
        for measure_name, line in found["measures"].items():
            first = measure_name == next(iter(found["measures"]))
            low, high = line["interval95"]
            other = [f"{label} {percent(found[key])}" for key, label in EXTRA if key in found]
            known = found.get("seen", {}).get(measure_name)
            base = [percent(found[key].get(measure_name)) for key in BLIND]
            to_reach = found["target"].get(measure_name)
            name = found["title"] if first and len(found["measures"]) == 1 else f"{found['title']}: {measure_name}"
            cells = [
                name,
                f"{percent(line['share'])} ({percent(low)} to {percent(high)})",
                f"{100 * to_reach:.0f}" if to_reach else "",
                str(line["n"]),
                percent(known["share"]) if known else "-",
                *base,
                ", ".join(other) if first else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_card(results: dict[str, Any]) -> None:
    """Put the table between the marks of the card, if there is a card."""
    if not CARD.is_file():
        return
    text = CARD.read_text(encoding="utf-8")
    table = "\n".join([BEGIN, *rows_of(results), END])
    text = re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table, text, flags=re.DOTALL)
    with atomic_write(CARD) as temporary:
        temporary.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="PLM-nano")
    parser.add_argument("--data", type=Path, default=Path("runs/data"))
    parser.add_argument("--n", type=int, default=500, help="questions a test")
    parser.add_argument("--easy", type=int, default=0, help="questions of easy-VQA; 0: all")
    parser.add_argument("--tests", nargs="+", default=[*TESTS, "easy_vqa"])
    parser.add_argument("--look", action="store_true", help="print, write nothing")
    options = parser.parse_args()
    assistant = load(options.model, device="cpu")
    began = time.perf_counter()
    seen = world_of(str(options.data), "train")
    held_out = world_of(str(options.data), "test")
    # Of the held-out wordings, too: what their words tell is to be known, though no training run has seen them.
    worlds = (seen, replace(seen, asked="test"))
    prior = Prior(Mixture(world, seed=PRIOR_SEED).sample(i) for world in worlds for i in range(20_000))
    results: dict[str, Any] = {}
    for name in options.tests:
        if name == "easy_vqa":
            found = measure_easy_vqa(assistant, options.easy)
            if found is not None:
                results[name] = {"title": "easy-VQA, its own test", "target": {"exact": 0.97}, **found}
        else:
            results[name] = one_test(assistant, prior, seen, held_out, name, options.n)
        for measure_name, line in results.get(name, {}).get("measures", {}).items():
            print(f"{name:<16}{measure_name:<8}{line['share']:.3f}", flush=True)
    seconds = round(time.perf_counter() - began, 1)
    if not options.look:
        weights = ROOT / "perception_lm" / "weights" / "PLM-nano" / "model.safetensors"
        facts = {
            "model": options.model,
            "weights": sha256_of(weights) if weights.is_file() else None,
            "threads": torch.get_num_threads(),
            "seconds": seconds,
            "seeds": {"questions": SEED, "prior": PRIOR_SEED},
            "results": results,
        }
        print(record("plm_nano", facts))
        write_card(results)


def one_test(assistant: Assistant, prior: Prior, seen: World, held_out: World, name: str, count: int) -> dict[str, Any]:
    """Held-out pictures asked in held-out words; beside them held-out pictures asked in known words, and known all."""
    task, kinds, title, target = TESTS[name]
    found = measure(assistant, prior, questions(held_out, task, count, seed=SEED, kinds=kinds))
    same = questions(replace(held_out, asked="train"), task, count, seed=SEED, kinds=kinds)
    found["known_phrasing"] = figures(same, ask(assistant, same))["measures"]
    plain = questions(seen, task, count, seed=SEED, kinds=kinds)
    found["seen"] = figures(plain, ask(assistant, plain))["measures"]
    return {"title": title, "target": target, **found}


def redraw() -> None:
    """The card again, from the figures that are there."""
    write_card(json.loads((RESULTS / "plm_nano.json").read_text(encoding="utf-8"))["results"])


if __name__ == "__main__":
    main()
