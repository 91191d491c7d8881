"""PE-Core-nano's figures: baselines by hand, merged without touching the model's, and the card as the file says."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perception_encoder.training.drawings import STYLES, Concept, Drawings, write_drawings

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import nano_core
finally:
    sys.path.pop(0)

RED, GREEN, BLUE, PINK = (250, 0, 0, 255), (0, 250, 0, 255), (0, 0, 250, 255), (250, 120, 120, 255)


def tiny_data(folder: Path) -> Path:
    """Three seen concepts and two unseen, one colour each in every style, but two seen exchange theirs in openmoji."""
    groups = ("smileys", "food", "food", "objects", "objects")
    concepts = tuple(Concept(str(i), f"thing {i}", (), group) for i, group in enumerate(groups))
    rows = [(s, c) for s in range(len(STYLES)) for c in range(5)]
    colours = [RED, GREEN, BLUE, PINK, GREEN]
    exchanged = [RED, BLUE, GREEN, PINK, GREEN]
    pixels = np.array([[[(exchanged if STYLES[s] == "openmoji" else colours)[c]]] for s, c in rows], np.uint8)
    style, concept = np.array(rows, np.int16).T
    drawings = Drawings(pixels.repeat(16, 1).repeat(16, 2), style, concept, STYLES, concepts)
    write_drawings(drawings, folder / "drawings.npz")
    described = [{"code": c.code, "label": c.label, "tags": c.tags, "group": c.group} for c in concepts]
    (folder / "concepts.json").write_text(json.dumps(described))
    captions = ["A thing 0.", "thing 0", "Some thing 1!", "else", "else", "else"]
    np.savez(folder / "photos.npz", pixels=np.zeros((6, 2, 2, 3), np.uint8), captions=np.array(captions))
    return folder


class Cnn:
    """Features that know red from all else."""

    def __init__(self, folder: Path):
        assert folder.name == nano_core.CNN

    def __call__(self, pixels: Tensor) -> Tensor:
        assert pixels.shape[1:] == (3, nano_core.CNN_SIDE, nano_core.CNN_SIDE)
        mean = pixels.mean((2, 3))
        return torch.stack([mean[:, 0], mean[:, 1] + mean[:, 2]], 1)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    split = {"seen": ["0", "1", "2"], "unseen": ["3", "4"]}
    monkeypatch.setattr(nano_core, "read_split", split.__getitem__)
    monkeypatch.setattr(nano_core, "EfficientNetLite0", Cnn)
    return tiny_data(tmp_path)


def test_baselines_by_hand(data: Path) -> None:
    without = nano_core.baselines(data)
    assert not any("cnn" in name for name in without["T1"]), "its package is absent"
    (data / "packages" / nano_core.CNN).mkdir(parents=True)
    found = nano_core.baselines(data)
    third = pytest.approx(1 / 3, abs=1e-4)
    assert found["T1"]["pixel_nearest"]["top1"] == third, "only the first keeps its colour"
    assert found["T1"]["majority"] == third
    assert found["T1"]["cnn_nearest"]["top1"] >= 1 / 3 - 1e-4, "green and blue are one to it"
    assert found["T3"]["majority"] == 0.5
    assert found["T3"]["pixel_nearest"]["top1"] == 0
    assert set(found["T2"]) == {"twemoji", "noto", "openmoji"}
    for line in found["T2"].values():
        assert line["majority"] == line["among_all"]["majority"] == 0.5
        assert line["pixel_nearest_given_other_styles"]["top1"] == 1
        assert line["cnn_nearest_given_other_styles"]["top1"] == 1
    assert found["T4"] == {
        "all": {"majority": 0.5},
        "named_as_a_seen_concept": {"majority": pytest.approx(2 / 3, abs=1e-4)},
    }


def test_baselines_alone_leave_the_models_figures(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "packages" / nano_core.CNN).mkdir(parents=True)
    for name in ("RESULT", "CARD"):
        copy = data / getattr(nano_core, name).name
        copy.write_text(getattr(nano_core, name).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(nano_core, name, copy)
    monkeypatch.delattr(nano_core, "load_clip")
    before, card = json.loads(nano_core.RESULT.read_text()), nano_core.CARD.read_text(encoding="utf-8")
    nano_core.main(["--data", str(data), "--only", "baselines"])
    after = json.loads(nano_core.RESULT.read_text())
    for name in ("date", "commit", "weights_sha256", "machine"):
        assert after[name] == before[name]
    assert after["results"]["T1"]["top1"] == before["results"]["T1"]["top1"]
    assert after["results"]["T1"]["retrieval"] == before["results"]["T1"]["retrieval"]
    assert after["results"]["T1"]["cnn_nearest"] != before["results"]["T1"].get("cnn_nearest")
    assert after["results"]["T2"]["noto"]["among_all"]["majority"] == 0.5
    assert after["seed"] == {"training": 0, "split": 0}
    assert after["baselines"]["command"].endswith("--only baselines")
    now = nano_core.CARD.read_text(encoding="utf-8")
    assert nano_core.table(after["results"]) in now
    outside = [text.partition(nano_core.BEGIN)[0] + text.partition(nano_core.END)[2] for text in (card, now)]
    assert outside[0] == outside[1]


def test_the_card_is_the_files_table() -> None:
    results: dict[str, Any] = json.loads(nano_core.RESULT.read_text(encoding="utf-8"))
    card = nano_core.CARD.read_text(encoding="utf-8")
    assert f"{nano_core.BEGIN}\n{nano_core.table(results['results'])}\n{nano_core.END}" in card
    assert 0.15 < results["results"]["T1"]["cnn_nearest"]["top1"] < 0.3, "twice what pixels reach, and below the model"
    assert results["seed"] == {"training": 0, "split": 0}
