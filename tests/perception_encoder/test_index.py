"""The index: a folder in, answers out; the answers of numpy, the refusals of a careful library."""

import builtins
import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden_models import clip_config

import perception_encoder as pe
from perception.errors import CheckpointError, ConfigError, IndexError_, MediaError
from perception_encoder import samples

sys.path.insert(0, str(Path(__file__).parent))
from retrieval_tools import contents, pictures, tar

faiss = pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
pytest.importorskip("pyarrow", reason="the extra `retrieval` is not installed")

from perception_encoder.retrieval.exchange import export_vectors, import_vectors  # noqa: E402
from perception_encoder.retrieval.sheet import contact_sheet  # noqa: E402


@pytest.fixture(scope="module")
def clip(golden: Path) -> pe.CLIP:
    return pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu")


@pytest.fixture
def built(clip: pe.CLIP, tmp_path: Path) -> tuple[pe.Index, Path]:
    pictures(tmp_path / "photos", 9)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return pe.Index.build(tmp_path / "photos", model=clip, out=tmp_path / "idx"), tmp_path


@pytest.mark.parametrize("store", ["faiss", "lance"])
def test_equals_exact_search(clip: pe.CLIP, tmp_path: Path, store: str) -> None:
    if store == "lance":
        pytest.importorskip("lancedb", reason="the extra `lance` is not installed")
    files = pictures(tmp_path / "photos", 9)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    index = pe.Index.build(tmp_path / "photos", model=clip, out=tmp_path / "idx", store=store)  # type: ignore[arg-type]
    assert len(index) == 9  # the broken one is left out, and said so in the log
    vectors = pe.embed(clip, files)
    query = clip.encode_text(clip.tokenize(["a red car"]), normalize=True)[0].detach()
    wanted = (vectors @ query).sort(descending=True)
    for opened in (index, pe.Index.open(tmp_path / "idx", model=clip)):
        hits = opened.search("a red car", k=4)
        assert [hit.path for hit in hits] == [files[i] for i in wanted.indices[:4]]
        assert [hit.score for hit in hits] == pytest.approx(wanted.values[:4].tolist(), abs=2e-6)
        assert hits[0].size == (30, 20)
    assert index.search(files[3], k=1)[0].path == files[3]
    assert index.search(query * 7, k=99)[0].path == index.search("a red car")[0].path  # length does not matter
    assert len(index.search(query, k=99)) == 9
    assert sorted(index.ids()) == sorted(files)


def test_every_kind_of_query(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    files = sorted(str(path) for path in (folder / "photos").glob("0*.png"))
    data = Path(files[4]).read_bytes()
    vectors = pe.embed(clip, files)
    for query in (files[4], Path(files[4]), data, vectors[4], vectors[4].numpy(), index.search(files[4], 1)[0]):
        assert index.search(query, 1)[0].path == files[4]
    mean = torch.nn.functional.normalize(vectors[[1, 2]].mean(dim=0), dim=0)
    assert [h.path for h in index.search([files[1], Path(files[2])], 3)] == [h.path for h in index.search(mean, 3)]
    less = mean - 0.5 * vectors[7]
    found = index.search([files[1], files[2]], 9, minus=files[7])
    assert [h.path for h in found] == [h.path for h in index.search(less, 9)]
    assert found[-1].score < index.search([files[1], files[2]], 9)[-1].score
    many = index.search_many(["a cat", files[0]], 2)
    assert [row[0].path for row in many] == [index.search("a cat")[0].path, files[0]]
    assert index.search_many(vectors[:3], 1)[2][0].path == files[2]
    torch.testing.assert_close(index.vector(files[5]), vectors[5])
    with pytest.raises(ValueError, match="no examples"):
        index.search([])
    with pytest.raises(LookupError, match="nobody"):
        index.vector("nobody")


def test_add_replace_skip_delete(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    more = pictures(folder / "more", 12)[9:]
    assert index.add(more) == 3
    assert len(index) == 12
    assert index.search(more[1], 1)[0].path == more[1]
    with pytest.raises(ConfigError, match="already"):
        index.add(more)
    assert index.add(folder / "more", on_duplicate="skip") == 9
    assert index.add(more, on_duplicate="replace") == 3
    assert len(index) == 21
    assert not list((folder / "idx").glob("adding-*"))
    assert index.delete("nobody") == 0
    assert index.delete([more[0], "nobody"]) == 1
    index.merge()
    reopened = pe.Index.open(folder / "idx", model=clip)
    assert len(reopened) == 20
    assert reopened.search(more[0], 1)[0].path != more[0]
    assert reopened.thumbnail(reopened.search(more[1], 1)[0]).size == (30, 20)
    with pytest.raises(ConfigError, match="on_duplicate"):
        index.add(more, on_duplicate="ignore")  # type: ignore[arg-type]
    assert index.delete(more[1]) == 1, "one id, not its letters"


def test_a_model_by_its_name(built: tuple[pe.Index, Path], clip: pe.CLIP) -> None:
    _, folder = built
    pe.save(clip, folder / "model")
    index = pe.Index.build(folder / "photos", folder / "model", folder / "named")
    assert index.facts.model == str(folder / "model")
    opened = pe.Index.open(folder / "idx", model=str(folder / "model"))
    assert [hit.id for hit in opened.search("a cat", 3)] == [hit.id for hit in index.search("a cat", 3)]
    with pytest.raises(ConfigError, match="another model or preprocessing"):
        pe.Index.open(folder / "idx", model="PE-Core-nano")
    for wrong in (3, torch.nn.Linear(2, 2)):
        with pytest.raises(ConfigError, match="is no model; give one that load_clip or load_encoder made, or its name"):
            pe.Index.open(folder / "idx", model=wrong)
        with pytest.raises(ConfigError, match="is no model; give one"):
            pe.Index.build(folder / "photos", wrong, folder / "none")
    assert not (folder / "none").exists()


def test_a_folder_that_holds_a_model(built: tuple[pe.Index, Path], clip: pe.CLIP) -> None:
    """Neither parts nor an index are mixed with its files."""
    _, folder = built
    pe.save(clip, folder / "model")
    before = contents(folder / "model")
    for make in (
        lambda: pe.embed(clip, folder / "photos", out=folder / "model"),
        lambda: pe.Index.build(folder / "photos", clip, folder / "model"),
    ):
        with pytest.raises(ConfigError, match=r"model holds something else \(config\.json\); use a folder of its own"):
            make()
        assert contents(folder / "model") == before
    (folder / "idx" / "config.json").write_text("{}")  # one that is there already goes on
    assert len(pe.Index.build(folder / "photos", clip, folder / "idx")) == 9


def test_from_archives_with_metadata(clip: pe.CLIP, tmp_path: Path) -> None:
    files = pictures(tmp_path / "p", 10)
    shard = tar(tmp_path / "a.tar", files)
    index = pe.Index.build(shard, clip, tmp_path / "idx", part_rows=4)
    hit = index.search(files[6], 1, filter={"even": True})[0]
    assert (hit.path, hit.id, hit.text) == (str(shard), f"{shard}/a/0006", "picture 6")
    assert hit.metadata == {"even": True, "number": 6}
    assert index.search(files[6], 1, filter={"even": False})[0].metadata["number"] % 2 == 1
    assert index.thumbnail(hit, 10).size == (10, 7)
    page = contact_sheet(index, [hit], "<script>")
    assert page.count("data:image/jpeg;base64,") == 1
    assert "<script>" not in page


def test_building_again(clip: pe.CLIP, tmp_path: Path) -> None:
    """Of the same pictures: opened. Of others: refused, and nothing is touched. Killed before its end: finished."""
    files = pictures(tmp_path / "p", 6)
    pe.Index.build(tmp_path / "p", clip, tmp_path / "idx", part_rows=4)
    whole = contents(tmp_path / "idx")
    assert len(pe.Index.build(tmp_path / "p", clip, tmp_path / "idx", part_rows=4)) == 6
    (tmp_path / "idx" / "index.json").unlink()
    with pytest.raises(IndexError_, match="it lacks"):
        pe.Index.open(tmp_path / "idx")
    pe.Index.build(tmp_path / "p", clip, tmp_path / "idx", part_rows=4)
    assert contents(tmp_path / "idx") == whole
    Path(files[0]).unlink()
    with pytest.raises(ConfigError, match="index of other pictures"):
        pe.Index.build(tmp_path / "p", clip, tmp_path / "idx", part_rows=4)
    assert contents(tmp_path / "idx") == whole
    with pytest.raises(ConfigError, match="comes twice"):
        pe.Index.build([files[1], files[1]], clip, tmp_path / "twice")


def test_from_parts_nothing_is_embedded_again(clip: pe.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = pictures(tmp_path / "p", 6)
    pe.embed(clip, tmp_path / "p", out=tmp_path / "parts", part_rows=4)
    from perception_encoder.retrieval import pipeline

    monkeypatch.setattr(pipeline, "embed_pixels", None)
    index = pe.Index.build(tmp_path / "parts", clip, tmp_path / "idx")
    monkeypatch.undo()
    assert index.search(files[2], 1)[0].path == files[2]
    assert index.thumbnail(index.search(files[2], 1)[0]).size == (30, 20)
    other = pe.load_clip("PE-Core-nano", device="cpu")
    with pytest.raises(ConfigError, match="another model"):
        pe.Index.build(tmp_path / "parts", other, tmp_path / "other")
    index.delete([files[2]])
    assert len(pe.Index.build(tmp_path / "parts", None, tmp_path / "idx")) == 5  # opened, not begun anew
    pe.embed(clip, files[:3], out=tmp_path / "fewer")
    before = contents(tmp_path / "idx")
    with pytest.raises(ConfigError, match="index of other pictures"):
        pe.Index.build(tmp_path / "fewer", clip, tmp_path / "idx")
    (tmp_path / "idx" / "index.json").unlink()
    with pytest.raises(ConfigError, match="parts of something else"):
        pe.Index.build(tmp_path / "fewer", clip, tmp_path / "idx")
    assert contents(tmp_path / "idx") == {name: one for name, one in before.items() if name != "index.json"}
    (tmp_path / "parts" / "part-00001.json").unlink()
    with pytest.raises(ConfigError, match="missing or damaged"):
        pe.Index.build(tmp_path / "parts", clip, tmp_path / "less")


def test_parts_that_a_kill_left_in_the_middle_are_taken_over_again(
    clip: pe.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = pictures(tmp_path / "p", 6)
    parts = pe.embed(clip, tmp_path / "p", out=tmp_path / "parts", part_rows=4).folder
    within = tmp_path / "idx" / "store" / "parts"
    shutil.copytree(parts, within)
    for name in ("part-00000.safetensors", "part-00001.safetensors"):
        (within / name).write_bytes((parts / name).read_bytes()[:-50])
    (within / "part-00001.json").unlink()
    before = contents(parts)
    index = pe.Index.build(parts, clip, tmp_path / "idx")
    assert index.search(files[1], 1)[0].path == files[1]
    assert contents(parts) == before

    def killed(source: Path, target: Path) -> None:
        Path(target).write_bytes(Path(source).read_bytes()[:10])
        raise KeyboardInterrupt

    def unlinked(*args: Path) -> None:
        raise OSError("this disk has no links")

    monkeypatch.setattr(os, "link", unlinked)
    monkeypatch.setattr(shutil, "copyfile", killed)
    with pytest.raises(KeyboardInterrupt):
        pe.Index.build(parts, clip, tmp_path / "other")
    assert contents(tmp_path / "other") == {}
    monkeypatch.undo()
    assert len(pe.Index.build(parts, clip, tmp_path / "other")) == 6


def test_a_refused_model_leaves_no_trace(clip: pe.CLIP, tmp_path: Path) -> None:
    pictures(tmp_path / "p", 2)
    parts = pe.embed(clip, tmp_path / "p", out=tmp_path / "parts").folder
    with pytest.raises(ConfigError, match="another model"):
        pe.Index.build(parts, pe.load_clip("PE-Core-nano", device="cpu"), tmp_path / "idx")
    assert not (tmp_path / "idx").exists()


def test_what_a_finished_index_does_not_look_at(
    clip: pe.CLIP, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same budgets once more are no news; others are not dropped in silence, nor is another store."""
    pictures(tmp_path / "p", 3)
    out, built = tmp_path / "idx", {"kind": "flat", "max_memory": "1GB", "target_recall": 0.9}
    pe.Index.build(tmp_path / "p", clip, out, **built)  # type: ignore[arg-type]
    for same in ({}, built):
        pe.Index.build(tmp_path / "p", clip, out, **same)  # type: ignore[arg-type]
    assert "not looked at" not in caplog.text
    pe.Index.build(tmp_path / "p", clip, out, kind="hnsw", max_memory="1GB", max_latency=0.5, queries=["a cat"])
    assert "not looked at: kind, max_latency, queries; " in caplog.text
    assert f"Index.open({str(out)!r}).optimize(" in caplog.text
    facts = json.loads((out / "index.json").read_text())
    (out / "index.json").write_text(json.dumps({**facts, "store": "lance"}))
    with pytest.raises(ConfigError, match="holds an index in lance; store='faiss' needs another folder"):
        pe.Index.build(tmp_path / "p", clip, out)


def test_f104_parts_that_are_not_normalised(clip: pe.CLIP, tmp_path: Path) -> None:
    files = pictures(tmp_path / "p", 5)
    pe.embed(clip, files, out=tmp_path / "parts", normalize=False, file_format="parquet")
    index = pe.Index.build(tmp_path / "parts", clip, tmp_path / "idx")
    assert index.search(files[2], 1)[0].score == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(index.vector(files[1]), pe.embed(clip, files)[1])


def test_remembers_its_model_by_name(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
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


@pytest.mark.parametrize(
    ("store", "package", "extra"), [("faiss", "faiss", "retrieval"), ("lance", "lancedb", "lance")]
)
def test_f04_not_installed(
    clip: pe.CLIP, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Any, package: str, extra: str
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: object, **more: object) -> object:
        if name == package:
            raise ModuleNotFoundError(f"No module named '{package}'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=rf"pip install 'perception-vision\[{extra}\]'"):
        pe.Index.build(tmp_path, model=clip, out=tmp_path / "idx", store=store)
    assert not (tmp_path / "idx").exists()


def test_f107_another_model_or_preprocessing(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    _, folder = built
    changed = dataclasses.replace(clip.preprocess, interpolation="bicubic")
    before, clip.preprocess = clip.preprocess, changed
    try:
        with pytest.raises(ConfigError, match="another model or preprocessing"):
            pe.Index.open(folder / "idx", model=clip)
    finally:
        clip.preprocess = before
    with pytest.raises(ConfigError, match="another model or preprocessing"):
        pe.Index.open(folder / "idx", model=pe.load_clip("PE-Core-nano", device="cpu"))


def test_queries_that_say_nothing(built: tuple[pe.Index, Path]) -> None:
    """A path that was mistyped is no sentence."""
    index, folder = built
    for query, message in (
        ("", "empty"),
        (" \n", "empty"),
        ("cat.png", "no picture"),
        (str(folder / "x.JPG"), "no pic"),
    ):
        with pytest.raises(ValueError, match=message):
            index.search(query)
    with pytest.warns(UserWarning, match="were cut"):
        assert index.search("a very long sentence " * 100)  # too long for a path, and for the system to look it up


def test_texts_and_pictures_keep_apart(clip: pe.CLIP, built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    (folder / "t.txt").write_text("a cat\n")
    with pytest.raises(ConfigError, match="an index of images; texts belong"):
        index.add(folder / "t.txt")
    words = pe.Index.build(folder / "t.txt", clip, folder / "words")
    with pytest.raises(ConfigError, match="an index of texts; images belong"):
        words.add(folder / "photos")
    assert words.search(str(folder / "photos" / "0001.png"))[0].text == "a cat"


def test_refusals(clip: pe.CLIP, built: tuple[pe.Index, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    index, folder = built
    with pytest.raises(ValueError, match="k=0"):
        index.search("a", k=0)
    with pytest.raises(ValueError, match="was it made by another model"):
        index.search(torch.zeros(5))
    with pytest.raises(ValueError, match="NaN"):
        index.search(torch.full((12,), torch.nan))
    with pytest.raises(ValueError, match="zero"):
        index.search(torch.zeros(12))
    with pytest.raises(IndexError_, match="it lacks"):
        pe.Index.open(folder / "photos")
    facts = folder / "idx" / "index.json"
    data = json.loads(facts.read_text())
    for change, message in (
        ({"width": 13}, "does not fit together"),
        ({"format": "x"}, "has format 'x'"),
        ({"extra": 1}, "unknown keys"),
        ({"store": "tree"}, "cannot be read as an index"),
    ):
        facts.write_text(json.dumps({**data, **change}))
        with pytest.raises(IndexError_, match=message):
            pe.Index.open(folder / "idx")
    facts.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no picture of"):
        pe.Index.build([folder / "photos" / "broken.png"], model=clip, out=folder / "none")
    with pytest.raises(ConfigError, match="store='tree'"):
        pe.Index.build(folder / "photos", clip, folder / "none", store="tree")  # type: ignore[arg-type]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="under torchrun"):
        pe.Index.build(folder / "photos", clip, folder / "none")


def test_f110_pictures_outside_the_index_are_not_opened(built: tuple[pe.Index, Path]) -> None:
    index, folder = built
    hit = index.search("a", 1)[0]
    outside = pictures(folder / "private", 1)[0]
    for path in (outside, str(folder / "photos" / ".." / "private" / "0000.png")):
        with pytest.raises(MediaError, match="lies outside"):
            index.thumbnail(hit._replace(path=path))
        assert "no picture" in contact_sheet(index, [hit._replace(path=path)], "x")
    link = folder / "photos" / "link.png"
    link.symlink_to(outside)
    with pytest.raises(MediaError, match="lies outside"):
        index.thumbnail(hit._replace(path=str(link)))


# --- other tools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["clip-retrieval", "npy"])
def test_export_and_import(clip: pe.CLIP, tmp_path: Path, layout: Any) -> None:
    files = pictures(tmp_path / "p", 10)
    index = pe.Index.build(tar(tmp_path / "a.tar", files), clip, tmp_path / "idx", part_rows=4)
    assert export_vectors(index.store, tmp_path / "out", layout=layout, rows=6) == {"files": 2, "rows": 10}
    if layout == "clip-retrieval":
        import pyarrow.parquet as pq

        array = np.load(tmp_path / "out" / "img_emb" / "img_emb_1.npy")
        assert (array.dtype, array.shape) == (np.float16, (4, 12))
        table = pq.read_table(tmp_path / "out" / "metadata" / "metadata_0.parquet")
        assert table["caption"].to_pylist()[:2] == ["picture 0", "picture 1"]
        assert {"image_path", "id", "number", "even"} <= set(table.column_names)
    parts = import_vectors(tmp_path / "out", tmp_path / "parts", model=clip, part_rows=5, roots=(str(tmp_path),))
    assert [read.sidecar.rows for read in parts] == [5, 1, 4]
    back = pe.Index.build(tmp_path / "parts", clip, tmp_path / "back")
    hit = back.search(files[6], 1, filter={"even": True})[0]
    assert (hit.id, hit.text, hit.metadata["number"]) == (f"{tmp_path / 'a.tar'}/a/0006", "picture 6", 6)
    assert hit.score == pytest.approx(1, abs=1e-3)
    assert back.thumbnail(hit).size == (30, 20)


def test_foreign_vectors_nobody_vouches_for(clip: pe.CLIP, tmp_path: Path) -> None:
    for name in ("img_emb", "text_emb"):
        (tmp_path / "v" / name).mkdir(parents=True)
        np.save(tmp_path / "v" / name / f"{name}_0.npy", np.random.default_rng(0).normal(size=(4, 12)).astype("f4") * 3)
    array = np.load(tmp_path / "v" / "text_emb" / "text_emb_0.npy")
    array[2] = np.nan
    np.save(tmp_path / "v" / "text_emb" / "text_emb_0.npy", array)
    index = pe.Index.build(import_vectors(tmp_path / "v", tmp_path / "p").folder, None, tmp_path / "idx")
    assert index.search(np.load(tmp_path / "v" / "img_emb" / "img_emb_0.npy")[3], 1)[0].id == "img_emb_0#3"
    with pytest.raises(ConfigError, match="does not say which model"):
        index.search("a cat")
    texts = import_vectors(tmp_path / "v", tmp_path / "t", which="text", model=clip)
    assert len(texts) == 3
    assert "#2" in texts.failures()[0].source
    vouched = pe.Index.build(tmp_path / "p", clip, tmp_path / "idx2")
    assert len(vouched.search("a cat", 2)) == 2


def test_somebody_vouches_later(clip: pe.CLIP, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.random.default_rng(0).normal(size=(4, 12)).astype("f4"))
    parts = import_vectors(tmp_path / "v.npy", tmp_path / "p").folder
    with pytest.raises(ConfigError, match="vouch for one"):
        pe.Index.build(parts, None, tmp_path / "idx").search("a cat")
    with pytest.raises(ConfigError, match="vectors of 12; the model given makes 384"):
        pe.Index.build(parts, pe.load_clip("PE-Core-nano", device="cpu"), tmp_path / "idx")
    assert len(pe.Index.build(parts, clip, tmp_path / "idx").search("a cat")) == 4
    assert len(pe.Index.open(tmp_path / "idx", model=clip).search("a cat")) == 4
    with pytest.raises(ConfigError, match="need the model that made the vectors"):
        pe.Index.build(parts, None, tmp_path / "other", queries=["a cat"])


def test_import_for_a_model_of_another_width(clip: pe.CLIP, tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 4), "f4"))
    with pytest.raises(ConfigError, match=r"v\.npy holds vectors of 4; the model given makes 12"):
        import_vectors(tmp_path / "v.npy", tmp_path / "parts", model=clip)
    assert not (tmp_path / "parts").exists()


def test_f110_arrays_with_objects_in_them(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "marker"), "w"))

    np.save(tmp_path / "evil.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match="cannot be read as an array of numbers"):
        import_vectors(tmp_path / "evil.npy", tmp_path / "parts")
    assert not (tmp_path / "marker").exists()
    np.save(tmp_path / "flat.npy", np.zeros(4))
    with pytest.raises(CheckpointError, match="rows by width"):
        import_vectors(tmp_path / "flat.npy", tmp_path / "parts")
    with pytest.raises(ConfigError, match="holds no vectors"):
        import_vectors(tmp_path / "nothing", tmp_path / "parts")


def test_f109_a_table_of_other_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    np.save(tmp_path / "v.npy", np.ones((3, 4), "f4"))
    pq.write_table(pa.table({"path": ["a", "b"]}), tmp_path / "v.parquet")
    with pytest.raises(CheckpointError, match=r"3 rows.*has 2"):
        import_vectors(tmp_path / "v.npy", tmp_path / "parts")


# --- real pictures ---------------------------------------------------------------------------------------------------


def recall_at(index: pe.Index, texts: torch.Tensor, labels: list[str], ks: tuple[int, ...] = (1, 5, 10)) -> list[float]:
    found = index.search_many(texts, max(ks))
    return [
        sum(label in {hit.metadata["label"] for hit in row[:k]} for label, row in zip(labels, found, strict=True))
        / len(labels)
        for k in ks
    ]


def numpy_recall(vectors: np.ndarray, of: list[str], texts: np.ndarray, labels: list[str]) -> list[float]:
    order = np.argsort(-(texts @ vectors.T), axis=1, kind="stable")
    ranks = [[of[row] for row in rows] for rows in order]
    return [sum(label in row[:k] for label, row in zip(labels, ranks, strict=True)) / len(labels) for k in (1, 5, 10)]


def test_drawings_end_to_end(tmp_path: Path) -> None:
    """Folder in, sentences in: recall@1, 5, 10 of the drawings in the package, as numpy finds it."""
    clip = pe.load_clip("PE-Core-nano", device="cpu")
    drawings = samples.drawings()
    index = pe.Index.build(Path(next(iter(drawings.values()))).parent, clip, tmp_path / "idx", part_rows=5)
    with torch.inference_mode():
        texts = clip.encode_text(clip.tokenize([f"a drawing of a {name}" for name in drawings]), normalize=True)
    order = np.argsort(-(texts @ pe.embed(clip, list(drawings.values())).T).numpy(), axis=1)
    files = [str(path) for path in drawings.values()]
    found = index.search_many(texts, 12)
    assert [[hit.path for hit in row] for row in found] == [[files[i] for i in row] for row in order]
    first = sum(row[0].path == file for row, file in zip(found, files, strict=True))
    assert first >= 9  # of 12; these drawings were chosen because the model knows them


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["flat", "ivf-flat"])
def test_thousands_of_drawings(tmp_path: Path, kind: str) -> None:
    """Every drawing of one style, as files: recall@1, 5, 10 equal to numpy's; through an index, within its report."""
    data = Path(__file__).parents[2] / "runs" / "data"
    if not (data / "drawings.npz").is_file():
        pytest.skip("runs/data is made by `make nano`")
    from drawings_as_files import write_drawings

    clip = pe.load_clip("PE-Core-nano", device="cpu")
    table, labels = write_drawings(data, tmp_path / "d.parquet")
    from perception_encoder.retrieval.sources import as_source

    index = pe.Index.build(as_source(table, keep=("label",)), clip, tmp_path / "idx", kind=kind, target_recall=0.99)
    vectors = torch.cat([rows.vectors for rows in index.store.scan()]).numpy()
    of = [str(label) for rows in index.store.scan() for label in rows.columns["meta.label"]]
    names = sorted(set(labels))
    with torch.inference_mode():
        texts = torch.cat(
            [clip.encode_text(clip.tokenize(names[i : i + 256]), normalize=True) for i in range(0, len(names), 256)]
        )
    got, wanted = recall_at(index, texts, names), numpy_recall(vectors, of, texts.numpy(), names)
    assert len(of) > 5000
    assert got == wanted if kind == "flat" else got == pytest.approx(wanted, abs=0.05)
