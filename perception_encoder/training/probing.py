"""A run file to a linear probe: which labels a tower's frozen features tell apart.

N rows  D features  K classes
"""

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from perception.checkpoint import open_checkpoint, read_json, write_safetensors
from perception.cli import table
from perception.errors import CheckpointError, ConfigError, LimitError, MediaError
from perception.files import atomic_write
from perception.media import read_image
from perception_encoder.evaluation.metrics import wilson_interval
from perception_encoder.training.config import ProbeRun
from perception_encoder.training.pairs import Pairs, class_names, open_pairs
from perception_encoder.training.probe import Probe, linear_probe
from perception_encoder.training.tasks import embed
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import load_encoder

log = logging.getLogger(__name__)
FACTS, WEIGHTS = "probe.json", "probe.safetensors"


class Rows(NamedTuple):
    """Features of pictures, and the number of each one's label."""

    features: Tensor  # N D
    labels: Tensor  # N int64


def probe(run: ProbeRun, *, tower: VisionTransformer | None = None) -> dict[str, Any]:
    """Fit the probe of a run and write it to `out`; what probe.json says of it.

    tower  in place of the run file's

    `accuracy` is that of the rows that chose the strength, and so a little kind. Raises ConfigError for data that is
    not there, MediaError for more bad rows than `data.max_bad` allows.
    """
    tower = tower or _tower(run)
    given = open_pairs(run.data.pairs(run.data.source))
    classes = class_names(given)
    if run.data.validation is None:
        order = torch.randperm(len(given), generator=torch.Generator().manual_seed(run.seed)).tolist()
        cut = max(1, round(run.data.held_out * len(given)))
        learned, held = _rows(run, tower, given, classes, order[cut:]), _rows(run, tower, given, classes, order[:cut])
    else:
        other = open_pairs(run.data.pairs(run.data.validation))
        learned = _rows(run, tower, given, classes, range(len(given)))
        held = _rows(run, tower, other, classes, range(len(other)))
    if not len(learned.labels) or not len(held.labels):
        raise ConfigError(f"{len(learned.labels)} rows to learn from and {len(held.labels)} to choose by; give more")
    found = linear_probe(*learned, *held, kind=run.kind, strengths=run.strengths)
    low, high = wilson_interval(found.accuracy, len(held.labels))
    facts = {
        "run": asdict(run),
        "classes": classes,
        "accuracy": found.accuracy,
        "interval95": [low, high],
        "majority": (held.labels == learned.labels.bincount().argmax()).float().mean().item(),
        "rows": {"learned": len(learned.labels), "validation": len(held.labels)},
        "strength": found.strength,
        "sweep": {f"{strength:g}": accuracy for strength, accuracy in found.sweep.items()},
    }
    _write(Path(run.out), found, facts)
    return facts


def summary(facts: dict[str, Any]) -> str:
    """What `probe` found, for people."""
    low, high = facts["interval95"]
    rows = facts["rows"]
    tried = [[strength, f"{accuracy:.1%}"] for strength, accuracy in facts["sweep"].items()]
    best = f"{facts['accuracy']:.1%} ({low:.1%} to {high:.1%}) of {rows['validation']} rows that chose the strength"
    return (
        f"{table(tried, ['strength', 'right'])}\n\n{best}; {len(facts['classes'])} classes, "
        f"{facts['majority']:.1%} for the commonest; learned from {rows['learned']} rows\n{facts['run']['out']}"
    )


def load_probe(folder: str | Path) -> tuple[Probe, list[str]]:
    """A probe that a run wrote, and the labels of its rows. Raises CheckpointError for what is none."""
    folder = Path(folder)
    if not (folder / FACTS).is_file():
        raise CheckpointError(f"{folder} holds no probe: it lacks {FACTS}; give the folder a probe's run wrote to")
    facts = read_json(folder / FACTS, 64 * 2**20, CheckpointError)
    state = open_checkpoint(folder / WEIGHTS)
    try:
        sweep = {float(strength): float(accuracy) for strength, accuracy in facts["sweep"].items()}
        weight, bias, mean, scale = (state[name] for name in ("weight", "bias", "mean", "scale"))
        found = Probe(weight, bias, mean, scale, float(facts["strength"]), float(facts["accuracy"]), sweep)
        return found, list(facts["classes"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder} holds no probe: {type(error).__name__} {error}") from error


def rehearse(run: ProbeRun, *, tower: VisionTransformer | None = None) -> dict[str, Any]:
    """The features of one batch: shapes, and what they are of."""
    tower = tower or _tower(run)
    pairs = open_pairs(run.data.pairs(run.data.source))
    classes = class_names(pairs)
    rows = _rows(run, tower, pairs, classes, range(min(run.batch, len(pairs))))
    shape = list(rows.features.shape)
    return {"out": run.out, "task": run.task, "samples": len(pairs), "classes": len(classes), "features": shape}


def _tower(run: ProbeRun) -> VisionTransformer:
    found = load_encoder(run.model.init, device=run.device, dtype="fp32")
    if not isinstance(found, VisionTransformer):
        raise ConfigError(f"{run.model.init!r} is no tower of ours")
    return found.eval()


def _rows(run: ProbeRun, tower: VisionTransformer, pairs: Pairs, classes: list[str], which: Any) -> Rows:
    """Features and labels of some rows; those that cannot be read are left out and counted."""
    numbers = {name: number for number, name in enumerate(classes)}
    bad: list[str] = []

    def read(index: int) -> tuple[Tensor, int] | None:
        try:
            pair = pairs[index]
            if (number := numbers.get(pair.texts[0])) is None:
                raise MediaError(f"the label {pair.texts[0]!r} is none of the classes")
            return tower.preprocess(read_image(pair.image)), number
        except (MediaError, LimitError, OSError) as error:
            bad.append(f"{pairs.where(index)}: {error}")
            return None

    features, labels = [], []
    with ThreadPoolExecutor(run.data.workers) as pool:
        for batch in _batches(iter(which), run.batch):
            read_ones = [found for found in pool.map(read, batch) if found is not None]
            if len(bad) > run.data.max_bad * len(pairs):
                raise MediaError(f"{len(bad)} bad rows, more than data.max_bad={run.data.max_bad} of all; {bad[0]}")
            if read_ones:
                features.append(_features(tower, torch.stack([pixels for pixels, _ in read_ones]), run.model.layer))
                labels += [number for _, number in read_ones]
    for why in bad:
        log.warning("left out %s", why)
    return Rows(torch.cat(features) if features else torch.zeros(0, 1), torch.tensor(labels, dtype=torch.int64))


@torch.no_grad()
def _features(tower: VisionTransformer, pixels: Tensor, layer: int | None) -> Tensor:
    """B 3 S S -> B D, on the CPU."""
    pixels = pixels.to(tower.pos_embed.device)
    if layer is None:
        return embed(tower, pixels).float().cpu()
    return tower.intermediates(pixels, [layer])[0].patches.mean((1, 2)).float().cpu()


def _batches(indices: Iterator[int], size: int) -> Iterator[list[int]]:
    while batch := list(islice(indices, size)):
        yield batch


def _write(folder: Path, found: Probe, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(found, name).contiguous() for name in ("weight", "bias", "mean", "scale")}
    with atomic_write(folder / WEIGHTS) as temporary:
        write_safetensors(temporary, tensors)
    with atomic_write(folder / FACTS) as temporary:
        temporary.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
