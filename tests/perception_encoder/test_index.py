"""Exact search: the answers of numpy, the refusals of a careful library."""

import builtins
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from golden_models import clip_config
from PIL import Image

import perception_encoder as pe
from perception.errors import ConfigError, IndexError_

faiss = pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")


@pytest.fixture(scope="module")
def clip(golden: Path) -> pe.CLIP:
    return pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")


@pytest.fixture
def built(clip: pe.CLIP, tmp_path: Path) -> tuple[pe.Index, Path]:
    photos = tmp_path / "photos"
    photos.mkdir()
    for seed in range(9):
        torch.manual_seed(seed)
        Image.fromarray(torch.randint(0, 255, (20, 30, 3), dtype=torch.uint8).numpy()).save(photos / f"{seed}.png")
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return pe.Index.build(photos, model=clip, out=tmp_path / "idx"), tmp_path


def test_equals_exact_search(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    assert len(index) == 9  # the broken one is left out, and said so in the log
    vectors = pe.embed(clip, [Path(p) for p in index.facts.paths])
    query = clip.encode_text(clip.tokenize(["a red car"]), normalize=True)[0].detach()
    wanted = (vectors @ query).sort(descending=True)
    for opened in (index, pe.Index.open(folder / "idx", model=clip)):
        hits = opened.search("a red car", k=4)
        assert [hit.path for hit in hits] == [index.facts.paths[i] for i in wanted.indices[:4]]
        assert [hit.score for hit in hits] == pytest.approx(wanted.values[:4].tolist(), abs=1e-6)
    picture = folder / "photos" / "3.png"
    assert index.search(str(picture), k=1)[0].path == str(picture)
    assert index.search(query * 7, k=99)[0].path == index.search("a red car")[0].path  # length does not matter
    assert len(index.search(query, k=99)) == 9


def test_remembers_its_model_by_name(golden: Path, clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    _, folder = built
    pe.save(clip, folder / "model")
    saved = pe.load_clip(folder / "model", device="cpu")
    pe.Index.build(folder / "photos", model=saved, out=folder / "named")
    assert pe.Index.open(folder / "named").facts.model == str(folder / "model")
    assert len(pe.Index.open(folder / "named").search("a cat", k=2)) == 2
    nameless = pe.Index.open(folder / "named")
    nameless.facts = dataclasses.replace(nameless.facts, model=None)
    with pytest.raises(ConfigError, match="does not say which model made it"):
        nameless.search("a cat")


def test_f04_no_faiss(clip: pe.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == "faiss":
            raise ModuleNotFoundError("No module named 'faiss'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'perception-vision\[retrieval\]'"):
        pe.Index.build(tmp_path, model=clip, out=tmp_path / "idx")
    assert not (tmp_path / "idx").exists()


def test_refusals(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    with pytest.raises(ValueError, match="k=0"):
        index.search("a", k=0)
    with pytest.raises(ValueError, match="was it made by another model"):
        index.search(torch.zeros(5))
    with pytest.raises(ValueError, match="NaN"):
        index.search(torch.full((12,), torch.nan))
    other = pe.load_clip(folder / "model", device="cpu") if (folder / "model").exists() else clip
    changed = dataclasses.replace(other.preprocess, interpolation="bicubic")
    before, other.preprocess = other.preprocess, changed
    try:
        with pytest.raises(ConfigError, match="another model or preprocessing"):
            pe.Index.open(folder / "idx", model=other)
    finally:
        other.preprocess = before
    with pytest.raises(IndexError_, match="it lacks"):
        pe.Index.open(folder / "photos")
    facts = folder / "idx" / "index.json"
    data = json.loads(facts.read_text())
    for change, message in (
        ({"paths": data["paths"][:3]}, "9 vectors, 3 paths"),
        ({"format": "x"}, "has format 'x'"),
        ({"extra": 1}, "unknown keys"),
    ):
        facts.write_text(json.dumps({**data, **change}))
        with pytest.raises(IndexError_, match=message):
            pe.Index.open(folder / "idx")
    facts.write_text(json.dumps(data))
    store = folder / "idx" / "index.faiss"
    store.write_bytes(store.read_bytes()[:40])
    with pytest.raises(IndexError_, match="cannot be read as an index"):
        pe.Index.open(folder / "idx")
    with pytest.raises(ConfigError, match="no picture of"):
        pe.Index.build([folder / "photos" / "broken.png"], model=clip, out=folder / "none")
