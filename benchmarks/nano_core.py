"""What does PE-Core-nano know about drawings and names it never saw?

    python -m perception_encoder.training.drawings --out runs/data    # once
    python benchmarks/nano_core.py --data runs/data

Writes benchmarks/results/pe_core_nano.json and the table of figures in the model's card. Nothing here is learned from:
openmoji is in no training data, the unseen concepts are in none in any style, nor are the photographs.

    T1  openmoji drawings of the seen concepts, among the names of all of them
    T2  drawings of the 150 unseen concepts, among their names, and among the names of all concepts
    T3  T1 without smileys and people, whose drawings are near-copies of each other
    T4  cut-out photographs (Debian's tuxpaint-stamps-default), among their captions; skipped where they are absent

The pixel baseline is the nearest of reference drawings by 16 x 16 RGB values. In T1 and T3 the references are the
drawings learned from; in T2 and T4 there is no picture of the class to compare with, which is what zero-shot means, so
T2's baseline is given the other styles' drawings of the unseen concepts, which the model does not get.
"""

import argparse
import json
import math
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

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
from perception_encoder.zero_shot import classifier_weights
from perception_encoder.zoo import load_clip

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "pe_core_nano.json"
CARD = ROOT / "perception_encoder" / "weights" / "PE-Core-nano" / "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/nano_core.py -->", "<!-- end of figures -->"
PHOTO_TEMPLATES = ("{}", "a picture of {}")


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


class Evaluation:
    def __init__(self, clip: CLIP, drawings: Drawings):
        self.clip, self.drawings = clip, drawings
        self.label = {concept.code: concept.label for concept in drawings.concepts}
        self.group = {concept.code: concept.group for concept in drawings.concepts}

    def names(self, codes: list[str]) -> Tensor:
        return classifier_weights(self.clip, [self.label[code] for code in codes], EVALUATION_TEMPLATES)

    def pictures(self, styles: tuple[str, ...], codes: list[str]) -> tuple[Tensor, Tensor]:
        """N 3 S S uint8 on white, and each picture's place in `codes`."""
        rows = self.drawings.rows(styles, codes)
        place = {code: i for i, code in enumerate(codes)}
        target = [place[self.drawings.concepts[i].code] for i in self.drawings.concept[rows]]
        return plain(torch.from_numpy(self.drawings.pixels[rows])), torch.tensor(target)

    def seen(self, codes: list[str]) -> dict[str, object]:
        """A style never learned from, concepts learned from: T1 and T3."""
        pictures, target = self.pictures((TEST_STYLE,), codes)
        features, names = embed(self.clip, pictures), self.names(codes)
        references, labels = self.pictures(TRAIN_STYLES, codes)
        recall = retrieval_recall(names[target] @ features.T, torch.eye(len(target), dtype=torch.bool))
        return {
            **score(features @ names.T, target),
            "pixel_nearest": nearest(small(pictures), small(references), labels, target, len(codes)),
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
            others = tuple(s for s in (*TRAIN_STYLES, TEST_STYLE) if s != style)
            references, labels = self.pictures(others, codes)
            found[style] = {
                **score(features @ names.T, target),
                "among_all": score(features @ all_names.T, place[target]),
                "pixel_nearest_given_other_styles": nearest(
                    small(pictures), small(references), labels, target, len(codes)
                ),
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
        labels = {self.label[code] for code in codes}
        bare = [re.sub(r"^(a|an|the|some) |[.!]$", "", caption.lower()) for caption in captions]
        rows = [i for i, name in enumerate(bare) if name in labels]
        if rows:
            few = sorted({bare[i] for i in rows})
            weights = classifier_weights(self.clip, few, PHOTO_TEMPLATES)
            found["named_as_a_seen_concept"] = score(
                features[rows] @ weights.T, torch.tensor([few.index(bare[i]) for i in rows])
            )
        return found


def evaluate(clip: CLIP, data: Path) -> dict[str, object]:
    drawings = read_drawings(data)
    run = Evaluation(clip, drawings)
    drawn = {drawings.concepts[i].code for i in drawings.concept[drawings.rows([TEST_STYLE], run.label)]}
    seen, unseen = [code for code in read_split("seen") if code in drawn], read_split("unseen")
    things = [code for code in seen if run.group[code] not in ("smileys", "people")]
    learned, target = run.pictures(("twemoji",), seen)
    results: dict[str, object] = {
        "T1": run.seen(seen),
        "T2": run.unseen(unseen, seen + unseen),
        "T3": run.seen(things),
        "learned_style_twemoji": score(embed(clip, learned) @ run.names(seen).T, target),
    }
    if (data / "photos.npz").is_file():
        results["T4"] = run.photos(data / "photos.npz", seen)
    return results


def table(results: dict) -> str:  # type: ignore[type-arg]
    """The figures as Markdown."""

    def row(name: str, line: dict, pixel: float | None) -> str:  # type: ignore[type-arg]
        low, high = line["interval95"]
        cells = (
            f"{100 * line['top1']:.1f} ({100 * low:.1f} to {100 * high:.1f})",
            f"{100 * line['top5']:.1f}",
            f"{100 * line['chance']:.2f}",
            "-" if pixel is None else f"{100 * pixel:.1f}",
            str(line["n"]),
            str(line["ways"]),
        )
        return f"| {name} | {' | '.join(cells)} |"

    t1, t2, t3, t4 = (results.get(name) for name in ("T1", "T2", "T3", "T4"))
    lines = [
        "| held-out test | top-1 % (95 % interval) | top-5 % | chance % | pixel 1-NN % | n | ways |",
        "|---|---|--:|--:|--:|--:|--:|",
        row("T1 openmoji, seen concepts", t1, t1["pixel_nearest"]["top1"]),
        row("T3 the same without smileys and people", t3, t3["pixel_nearest"]["top1"]),
    ]
    for style, line in t2.items():
        lines.append(row(f"T2 unseen concepts, {style}", line, line["pixel_nearest_given_other_styles"]["top1"]))
    for style, line in t2.items():
        lines.append(row(f"T2 unseen concepts among all names, {style}", line["among_all"], None))
    if t4:
        lines.append(row("T4 photographs, all captions", t4["all"], None))
        if "named_as_a_seen_concept" in t4:
            lines.append(row("T4 photographs named as a seen concept", t4["named_as_a_seen_concept"], None))
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
            "T2's pixel baseline is given drawings of the unseen concepts in the other styles; the model saw none. "
            "It says how alike the pictures are."
        ),
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, default=ROOT / "runs" / "data")
    parser.add_argument(
        "--model", default="PE-Core-nano", help="a name or a folder; other than the default only prints"
    )
    options = parser.parse_args()
    clip = load_clip(options.model, device="cpu")
    results = evaluate(clip, options.data)
    record = {
        "command": "python benchmarks/nano_core.py --data runs/data",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _git("rev-parse", "HEAD"),
        "weights_sha256": sha256_of(CARD.parent / "model.safetensors") if options.model == "PE-Core-nano" else None,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "machine": {"cpu": _cpu(), "cores": os.cpu_count(), "system": platform.system()},
        "templates": EVALUATION_TEMPLATES,
        "photo_templates": PHOTO_TEMPLATES,
        "interval": "Wilson, 95 %",
        "results": results,
    }
    print(json.dumps(record, indent=1))
    if options.model != "PE-Core-nano":
        return
    with atomic_write(RESULT) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    before, rest = CARD.read_text(encoding="utf-8").split(BEGIN)
    with atomic_write(CARD) as file:
        file.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}", encoding="utf-8")
    print(f"wrote {RESULT} and the figures in {CARD}", file=sys.stderr)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text(encoding="utf-8")) if info.is_file() else []
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
