"""Stores: the same tests for faiss and LanceDB, then what is faiss's own: versions, blocks, tuning, hostile files."""

import json
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from perception.errors import ConfigError, IndexError_
from perception_encoder.retrieval import filters
from perception_encoder.retrieval.store import VectorStore

sys.path.insert(0, str(Path(__file__).parent))
from retrieval_tools import clustered, contents

faiss = pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
pytest.importorskip("pyarrow", reason="the extra `retrieval` is not installed")

from perception_encoder.retrieval import blocks, building, exact, versions  # noqa: E402
from perception_encoder.retrieval.choice import Choice, candidates, choose, list_count, parse_bytes, recall  # noqa: E402
from perception_encoder.retrieval.faiss_store import FaissStore  # noqa: E402
from perception_encoder.retrieval.groups import clusters, duplicates  # noqa: E402

Make = Callable[[Path, int], Any]


def _lance(folder: Path, width: int) -> Any:
    pytest.importorskip("lancedb", reason="the extra `lance` is not installed")
    from perception_encoder.retrieval.lance_store import LanceStore

    return LanceStore.create(folder, width)


def _reopen(store: Any) -> Any:
    return FaissStore(store.folder) if isinstance(store, FaissStore) else type(store)(store.address)


@pytest.fixture(params=["faiss", "lance"])
def make(request: pytest.FixtureRequest) -> Make:
    return {"faiss": FaissStore.create, "lance": _lance}[request.param]


@pytest.fixture
def filled(make: Make, tmp_path: Path) -> tuple[Any, list[str], Tensor]:
    """300 rows of 16, in three adds."""
    store, vectors = make(tmp_path / "store", 16), clustered(300, 16)
    ids = [f"it's {i}" for i in range(300)]
    for start in range(0, 300, 100):
        rows = range(start, start + 100)
        columns = {"meta.label": [f"l{i % 3}" for i in rows], "width": list(rows), "meta.a.b": [i / 2 for i in rows]}
        store.add(ids[start : start + 100], vectors[start : start + 100] * 3, columns)
    return store, ids, vectors


def test_both_are_stores(filled: tuple[Any, list[str], Tensor]) -> None:
    store, _, _ = filled
    assert isinstance(store, VectorStore)
    assert (len(store), store.width, store.stats()["rows"]) == (300, 16, 300)


def test_search_equals_numpy(filled: tuple[Any, list[str], Tensor]) -> None:
    """F-104: vectors of any length go in and cosines come out."""
    store, ids, vectors = filled
    queries = clustered(7, 16, seed=3) * 9
    scores = (torch.nn.functional.normalize(queries) @ vectors.T).numpy()
    wanted = np.argsort(-scores, axis=1)[:, :5]
    for opened in (store, _reopen(store)):
        found = opened.search(queries, 5)
        assert [[match.id for match in row] for row in found] == [[ids[i] for i in row] for row in wanted]
        got = [[match.score for match in row] for row in found]
        np.testing.assert_allclose(got, np.take_along_axis(scores, wanted, 1), atol=2e-6)
    assert found[0][0].columns["width"] == wanted[0][0]
    assert found[0][0].columns["meta.a.b"] == wanted[0][0] / 2


def test_f102_more_than_there_is(filled: tuple[Any, list[str], Tensor], make: Make, tmp_path: Path) -> None:
    store, _, vectors = filled
    assert len(store.search(vectors[:1], 10_000)[0]) == 300
    with pytest.raises(ValueError, match="k=0"):
        store.search(vectors[:1], 0)
    empty = make(tmp_path / "empty", 16)
    assert empty.search(vectors[:2], 5) == [[], []]
    assert list(empty.scan()) == []


def test_f101_another_width(filled: tuple[Any, list[str], Tensor]) -> None:
    store, _, _ = filled
    with pytest.raises(ValueError, match=r"\(5,\) numbers, the index 16"):
        store.search(torch.ones(1, 5), 3)
    with pytest.raises(ValueError, match="expected 1 rows of 16"):
        store.add(["x"], torch.ones(1, 5))


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_f103_vectors_without_a_direction(filled: tuple[Any, list[str], Tensor], bad: float) -> None:
    store, _, vectors = filled
    row = torch.zeros(16) if bad == 0 else vectors[0].clone().index_fill_(0, torch.tensor([3]), bad)
    with pytest.raises(ConfigError, match="row 1"):
        store.add(["x", "y"], torch.stack([vectors[0], row]))
    assert len(store) == 300
    with pytest.raises(ValueError, match="the query"):
        store.search(row[None], 3)


def test_f106_ids(filled: tuple[Any, list[str], Tensor]) -> None:
    store, ids, vectors = filled
    with pytest.raises(ConfigError, match="already"):
        store.add(["new", ids[7]], vectors[:2])
    with pytest.raises(ConfigError, match="comes twice"):
        store.add(["new", "new"], vectors[:2])
    with pytest.raises(ConfigError, match="ids are texts"):
        store.add([7], vectors[:1])
    assert len(store) == 300
    assert store.add([ids[7]], -vectors[7:8], {"width": [1000]}, on_duplicate="replace") == 1
    assert len(store) == 300
    found = store.search(-vectors[7:8], 1)[0][0]
    assert (found.id, found.columns["width"]) == (ids[7], 1000)
    assert found.score == pytest.approx(1, abs=1e-5)


def test_delete_and_get(filled: tuple[Any, list[str], Tensor]) -> None:
    store, ids, vectors = filled
    assert store.delete([ids[5], ids[5], "nobody"]) == 1
    assert len(store) == 299
    assert store.search(vectors[5:6], 1)[0][0].id != ids[5]
    with pytest.raises(LookupError, match="it's 5"):
        store.get([ids[4], ids[5]])
    got = store.get([ids[9], ids[2]])
    torch.testing.assert_close(got.vectors, vectors[[9, 2]])
    assert (got.ids, got.columns["width"]) == ([ids[9], ids[2]], [9, 2])
    assert [one for rows in store.scan(64) for one in rows.ids] == [one for one in ids if one != ids[5]]
    store.add([ids[5]], vectors[5:6])  # it may come back
    assert store.search(vectors[5:6], 1)[0][0].id == ids[5]


@pytest.mark.parametrize(
    ("asked", "meets"),
    [
        ({"label": "l1"}, lambda i: i % 3 == 1),
        ({"label": ["l1", "l2"]}, lambda i: i % 3 > 0),
        ({"width": {">=": 100, "<": 130}}, lambda i: 100 <= i < 130),
        ({"a.b": {"!=": 3.5}, "width": {"<=": 20}}, lambda i: i <= 20 and i != 7),
        ({"label": {"contains": "2"}, "width": {">": 290}}, lambda i: i % 3 == 2 and i > 290),
        ({"label": None}, lambda i: False),
        ({"nothing": None, "width": {"<": 4}}, lambda i: i < 4),
        ({"label": "x' OR 'a' = 'a"}, lambda i: False),
        ({"label": []}, lambda i: False),
    ],
)
def test_filters(filled: tuple[Any, list[str], Tensor], asked: dict[str, Any], meets: Callable[[int], bool]) -> None:
    store, ids, vectors = filled
    found = store.search(vectors[:1], 300, filter=asked)[0]
    assert sorted(match.id for match in found) == sorted(ids[i] for i in range(300) if meets(i))


def test_rows_that_do_not_know_a_column(filled: tuple[Any, list[str], Tensor]) -> None:
    store, _, vectors = filled
    store.add(["bare"], vectors[:1], {"meta.fresh": ["yes"]})
    assert [m.id for m in store.search(vectors[:1], 999, filter={"fresh": "yes"})[0]] == ["bare"]
    assert [m.id for m in store.search(vectors[:1], 999, filter={"label": None})[0]] == ["bare"]
    assert "bare" not in {m.id for m in store.search(vectors[:1], 999, filter={"label": {"!=": "l0"}})[0]}


def test_a_column_that_no_row_has(filled: tuple[Any, list[str], Tensor], make: Make, tmp_path: Path) -> None:
    """A name with a mistake in it is no empty answer, wherever in the filter it is."""
    store, _, vectors = filled
    for asked in ({"lable": "l1"}, {"width": 3, "lable": {"!=": "l1"}}, {"lable": ["l1"]}, {"lable": None, "wdth": 3}):
        with pytest.raises(ConfigError, match=r"no column '(lable|wdth)' to filter by; there are a\.b, id, label, w"):
            store.search(vectors[:1], 3, filter=asked)
    assert make(tmp_path / "empty", 16).search(vectors[:1], 3, filter={"label": 1}) == [[]]


@pytest.mark.parametrize(
    "asked", ["label", {"label": {"like": 1}}, {"label": {"contains": 1}}, {"": 1}, {"a`b": 1}, {"label": object()}]
)
def test_filters_that_cannot_be(asked: Any) -> None:
    with pytest.raises(ConfigError, match="filter"):
        filters.parse(asked)


def test_groups(make: Make, tmp_path: Path) -> None:
    """Duplicates and clusters, from either store."""
    store, base = make(tmp_path / "s", 8), torch.eye(8)[:4]
    vectors = torch.cat([base, base[:2] + 0.01, base[:1] - 0.01])
    store.add([f"p{i}" for i in range(7)], vectors)
    assert [sorted(group) for group in duplicates(store, 0.99)] == [["p0", "p4", "p6"], ["p1", "p5"]]
    assert duplicates(store, 1.0) == []
    found = clusters(store, 4)
    assert {frozenset(c.ids) for c in found} >= {frozenset({"p0", "p4", "p6"})}
    assert sum(len(c.ids) for c in found) == 7
    with pytest.raises(ConfigError, match="k=8"):
        clusters(store, 8)
    with pytest.raises(ConfigError, match="a cosine lies between"):
        duplicates(store, 7)


# --- which index -----------------------------------------------------------------------------------------------------


def test_the_choice_follows_the_budgets() -> None:
    def kind(rows: int, width: int, **budget: Any) -> str:
        return choose(rows, width, bandwidth=lambda: 20e9, **budget).kind

    assert kind(1000, 1024) == "flat"
    assert kind(200_000, 1024) == "flat"  # 0.8 GB in 41 ms
    assert kind(1_000_000, 1024) == "ivf-flat"
    assert kind(1_000_000, 1024, max_latency=1.0) == "flat"
    assert kind(1_000_000, 1024, max_latency=0.002) == "hnsw"
    assert kind(1_000_000, 1024, max_memory=2 * 10**9) == "ivf-sq8"
    assert kind(10**9, 1024, max_memory=80 * 10**9) == "ivf-pq"
    assert choose(10**9, 1024, max_memory=80 * 10**9).code == 64
    with pytest.raises(ConfigError, match=r"too little for 1000000000 vectors.*needs"):
        choose(10**9, 1024, max_memory=10**9)
    with pytest.raises(ConfigError, match="kind='tree'"):
        choose(10, 10, kind="tree")
    for choice in candidates(10**6, 1024):
        assert choice.bytes(10**6, 1024) > 10**6
    assert [parse_bytes(given) for given in ("8GB", "1.5 MiB", 77, None)] == [8 * 10**9, 1572864, 77, None]
    with pytest.raises(ConfigError, match="no amount of memory"):
        parse_bytes("8 potatoes")


def test_f105_too_few_to_train(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = FaissStore.create(tmp_path / "s", 8)
    store.add([str(i) for i in range(50)], clustered(50, 8))
    report = store.optimize(kind="ivf-pq")
    assert report["index"]["kind"] == "flat"
    assert "too few to train ivf-pq" in caplog.text
    assert list_count(300) * 39 <= 300


def _held_in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of 1000 rows, one a search, in a form that takes memory on every machine."""
    monkeypatch.setattr(versions, "BLOCK", 1000)
    monkeypatch.setattr(exact, "LEAST", 100)
    monkeypatch.setattr(exact, "AT_ONCE", 1)
    monkeypatch.setattr(exact, "fastest", lambda *args: exact.Rounded)


def test_measuring_ends_when_all_is_copied(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows there are, and however few of them a search copies."""
    _held_in_8_bits(monkeypatch)
    monkeypatch.setattr(building, "AT_ONCE", 2**12, raising=False)
    looks, look = [], versions.Snapshot.exact

    def counted(self: Any, queries: Tensor, *args: Any, **settings: Any) -> Any:
        looks.append(len(queries))
        return look(self, queries, *args, **settings)

    monkeypatch.setattr(versions.Snapshot, "exact", counted)
    store, report = build(tmp_path / "s", rows, "flat")
    assert looks.count(1) == exact.PATIENCE + 5 + 1 + 5  # five blocks, one search that finds nothing to copy, timing
    assert len(store.snapshot().copies._made) == 5
    assert report["measured"]["seconds a query"] > 0


def test_copies_count_as_memory(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _held_in_8_bits(monkeypatch)
    whole, spare = 4 * rows.numel(), 70_000
    store, _ = build(tmp_path / "s", rows, "flat", max_memory=whole + spare)

    def held(opened: FaissStore) -> int:
        for _ in range(exact.PATIENCE + 8):
            opened.search(rows[:1], 3)
        return opened.snapshot().copies.bytes

    assert 0 < held(store) <= spare
    assert 0 < held(FaissStore(store.folder)) <= spare
    store.add(["new"], torch.nn.functional.normalize(torch.ones(1, 24), dim=1))
    assert 0 < held(store) <= spare - 4 * 24
    store.optimize(kind="flat")
    assert held(store) > spare
    store.optimize(kind="flat", max_memory=whole + 4 * 24)
    assert held(store) == 0
    path = store.folder / "manifest.json"
    data = json.loads(path.read_text())
    del data["choice"]["limit"]  # as earlier releases wrote it
    path.write_text(json.dumps(data))
    assert held(FaissStore(store.folder)) > spare


KINDS = ["flat", "ivf-flat", "ivf-sq8", "hnsw"]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return clustered(4000, 24, centres=60)


def build(folder: Path, rows: Tensor, kind: str, **budget: Any) -> tuple[FaissStore, dict[str, Any]]:
    store = FaissStore.create(folder, rows.shape[1])
    ids = [str(i) for i in range(len(rows))]
    for start in range(0, len(rows), 1500):
        store.add(
            ids[start : start + 1500], rows[start : start + 1500], {"n": list(range(len(rows)))[start : start + 1500]}
        )
    return store, store.optimize(kind=kind, **budget)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_finds_adds_forgets_and_merges(rows: Tensor, tmp_path: Path, kind: str) -> None:
    store, report = build(tmp_path / "s", rows, kind)
    assert report["index"]["kind"] == kind
    assert report["measured"]["recall"] >= 0.95
    assert report["met"]["target_recall"]
    queries = rows[::200] + 0.05 * clustered(20, 24, seed=8)  # near the data, as queries are
    queries = torch.nn.functional.normalize(queries, dim=1)
    wanted = (queries @ rows.T).topk(10).indices.numpy()

    def share(opened: FaissStore) -> float:
        return recall(np.array([[int(m.id) for m in row] for row in opened.search(queries, 10)]), wanted)

    assert share(store) >= 0.9
    assert share(_reopen(store)) == share(store)
    assert store.search(rows[77:78], 1)[0][0].id == "77"
    # A narrow filter is searched exactly, whatever the index.
    found = store.search(queries, 10, filter={"n": {"<": 300}})
    exact = (queries @ rows[:300].T).topk(10).indices.tolist()
    assert [[int(m.id) for m in row] for row in found] == exact
    assert store.delete(["77"]) == 1
    store.add(["seven"], rows[77:78])
    assert store.search(rows[77:78], 2)[0][0].id == "seven"
    assert store.stats()["indexed"] == (0 if kind == "flat" else 4000)
    store.merge()
    after = store.stats()
    assert (after["rows"], after["deleted"], after["searched one by one"]) == (4000, 0, 4000 if kind == "flat" else 0)
    assert store.search(rows[77:78], 2)[0][0].id == "seven"
    store.add(["eight"], rows[78:79])
    store.merge()  # nothing is gone: only what is new is folded in
    assert {m.id for m in store.search(rows[78:79], 2)[0]} == {"78", "eight"}
    assert share(store) >= 0.85


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-sq8", "hnsw"])
def test_f102_as_many_as_there_are(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Lists that are looked through hold fewer rows than are wanted, and a filter leaves a graph in pieces."""
    store, _ = build(tmp_path / "s", rows, kind, target_recall=0.3)
    looked: list[int] = []
    exact_search = versions.Snapshot.exact

    def watch(self: Any, queries: Tensor, k: int, allowed: Any = None, *, first: int = 0) -> Any:
        looked.append(first)
        return exact_search(self, queries, k, allowed, first=first)

    monkeypatch.setattr(versions.Snapshot, "exact", watch)
    assert {len(found) for found in store.search(rows[:3], 2000)} == {2000}
    assert {len({match.id for match in found}) for found in store.search(rows[:3], 9999)} == {4000}
    assert set(looked) == {4000}  # more lists were looked through, not all rows
    monkeypatch.setattr(versions, "FEW", 0)
    monkeypatch.setattr(versions, "SHARE", 0.0)  # the index is asked whatever the filter leaves
    store.delete(["7"])
    found = store.search(rows[:3], 500, filter={"n": {"<": 300}})
    assert {len(one) for one in found} == {299}
    exact = (rows[:3] @ rows[:300].T).sort(descending=True).indices.tolist()
    assert [[int(match.id) for match in one] for one in found] == [[i for i in one if i != 7] for one in exact]


def test_product_quantizer(tmp_path: Path) -> None:
    """Sixteen-fold smaller codes; the exact scores come back from the stored vectors."""
    rows = clustered(12_000, 16, centres=80)
    store, report = build(tmp_path / "s", rows, "ivf-pq")
    assert (report["index"]["kind"], report["index"]["code"]) == ("ivf-pq", 8)
    assert report["measured"]["recall"] >= 0.95
    found = store.search(rows[5:6], 3)[0]
    assert found[0].score == pytest.approx(1, abs=1e-5)
    assert (store.folder / store.snapshot().manifest.index).stat().st_size < rows.numel() * 4 / 3


def test_recall_is_honest(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries that were not added or trained with, against brute force that shares no code with the search."""
    added: list[np.ndarray] = []
    trained: list[int] = []
    fill, train = blocks.fill, blocks.train

    def watch(index: Any, some: Any) -> Any:
        listed = list(some)
        added.append(np.concatenate([ids for ids, _ in listed]))
        return fill(index, iter(listed))

    def watch_training(choice: Choice, sample: np.ndarray, width: int) -> Any:
        trained.extend(np.argmax(sample @ rows.numpy().T, axis=1).tolist())
        return train(choice, sample, width)

    monkeypatch.setattr(blocks, "fill", watch)
    monkeypatch.setattr(blocks, "train", watch_training)
    store, report = build(tmp_path / "s", rows, "ivf-flat", target_recall=0.5)
    blocks_added, held = added[0], added[1]
    assert len(held) == report["measured"]["queries"]["held-out rows"] == 256
    assert not set(held) & set(blocks_added)
    assert not set(held) & set(trained)
    assert sorted([*held, *blocks_added]) == list(range(4000))
    # The same figure, measured here from nothing but faiss and numpy.
    rest = np.setdiff1d(np.arange(4000), held)
    wanted = rest[np.argsort(-(rows[held] @ rows[rest].T).numpy(), axis=1)[:, :10]]
    index = faiss.read_index(str(store.folder / store.snapshot().manifest.index))
    index.remove_ids(np.sort(held))
    index.nprobe = report["index"]["effort"]
    _, found = index.search(rows[held].numpy(), 10)
    assert recall(found, wanted) == pytest.approx(report["measured"]["recall"], abs=0.002)
    assert report["measured"]["recall"] < 1


def test_a_target_that_is_missed_is_said(rows: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, report = build(tmp_path / "s", rows, "ivf-flat", target_recall=1.0, max_latency=1e-9)
    assert not report["met"]["target_recall"]
    assert not report["met"]["max_latency"]
    assert "not the 1.000 asked for" in caplog.text


def test_given_queries_count(rows: Tensor, tmp_path: Path) -> None:
    """The set of queries that does worst is the one that counts."""
    hard = torch.nn.functional.normalize(torch.randn(64, 24, generator=torch.Generator().manual_seed(1)), dim=1)
    _, easy = build(tmp_path / "a", rows, "ivf-flat", target_recall=0.9)
    _, both = build(tmp_path / "b", rows, "ivf-flat", target_recall=0.9, queries=hard)
    assert set(both["measured"]["recall of each"]) == {"held-out rows", "given queries"}
    assert both["measured"]["recall"] == min(both["measured"]["recall of each"].values()) >= 0.9
    assert both["index"]["effort"] > easy["index"]["effort"]


# --- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf-flat", "ivf-sq8", "ivf-pq"])
def test_merged_on_disk_equals_filled_in_memory(rows: Tensor, tmp_path: Path, kind: str) -> None:
    choice = Choice(kind, 32, 24 if kind == "ivf-sq8" else 8 if kind == "ivf-pq" else 0)  # type: ignore[arg-type]
    data = rows.numpy()
    blocks.write(blocks.train(choice, data, 24), tmp_path / "trained")
    spans = [np.arange(0, 1000), np.arange(1000, 1001), np.arange(1001, 4000)]
    for number, span in enumerate(spans):
        index = faiss.read_index(str(tmp_path / "trained"))
        blocks.write(blocks.fill(index, iter([(span, data[span])])), tmp_path / f"b{number}")
    blocks.merge(tmp_path / "trained", [tmp_path / f"b{n}" for n in range(3)], tmp_path / "merged")
    whole = faiss.read_index(str(tmp_path / "trained"))
    whole.add_with_ids(data, np.arange(4000))
    faiss.write_index(whole, str(tmp_path / "whole"))
    assert (tmp_path / "merged").read_bytes() == (tmp_path / "whole").read_bytes()
    mapped = blocks.read(tmp_path / "merged", kind, 24, 4000)
    assert isinstance(faiss.downcast_InvertedLists(mapped.invlists), faiss.OnDiskInvertedLists)  # not read, but mapped
    _, found = blocks.search(mapped, kind, 32, data[:20], 1)
    if kind != "ivf-pq":
        assert found[:, 0].tolist() == list(range(20))
    # Few lists in use: faiss writes those sparsely, and so do we.
    one = faiss.read_index(str(tmp_path / "trained"))
    blocks.write(blocks.fill(one, iter([(np.arange(1), data[:1])])), tmp_path / "one")
    blocks.merge(tmp_path / "trained", [tmp_path / "one"], tmp_path / "sparse")
    assert (tmp_path / "sparse").read_bytes() == (tmp_path / "one").read_bytes()


def test_f112_blocks_in_another_order(rows: Tensor, tmp_path: Path) -> None:
    """The same answers in whichever order blocks are merged; the same part twice is refused."""
    data = rows.numpy()
    blocks.write(blocks.train(Choice("ivf-flat", 16), data, 24), tmp_path / "t")
    for number, span in enumerate((np.arange(2000), np.arange(2000, 4000))):
        index = faiss.read_index(str(tmp_path / "t"))
        blocks.write(blocks.fill(index, iter([(span, data[span])])), tmp_path / f"b{number}")
    answers = []
    for order in ((0, 1), (1, 0)):
        blocks.merge(tmp_path / "t", [tmp_path / f"b{n}" for n in order], tmp_path / "m")
        answers.append(blocks.search(blocks.read(tmp_path / "m", "ivf-flat", 24, 4000), "ivf-flat", 4, data[:50], 5)[1])
    np.testing.assert_array_equal(*answers)
    store, _ = build(tmp_path / "s", rows[:300], "flat")
    manifest = json.loads((store.folder / "manifest.json").read_text())
    manifest["parts"].append(manifest["parts"][0])
    (store.folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(IndexError_, match="names a part twice"):
        FaissStore(store.folder)


def test_blocks_are_filled_once(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that dies while merging takes up its trained index and its blocks, and ends at the same bytes."""
    whole, _ = build(tmp_path / "a", rows, "ivf-flat")
    monkeypatch.setattr(building, "BLOCK_BYTES", 100_000)
    many, _ = build(tmp_path / "b", rows, "ivf-flat")
    merge, filled = blocks.merge, []

    def die(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(blocks, "merge", die)
    store = FaissStore.create(tmp_path / "c", 24)
    for start in range(0, 4000, 1500):
        rest = range(start, min(start + 1500, 4000))
        store.add([str(i) for i in rest], rows[start : start + 1500], {"n": list(rest)})
    with pytest.raises(KeyboardInterrupt):
        store.optimize(kind="ivf-flat")
    monkeypatch.setattr(blocks, "merge", merge)
    fill = building.fill_block
    monkeypatch.setattr(building, "fill_block", lambda *args: filled.append(args) or fill(*args))
    store.optimize(kind="ivf-flat")
    assert not filled
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert whole.stats()["indexed"] == many.stats()["indexed"] == 4000


# --- files nobody vouches for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["ivf-flat", "hnsw"])
@pytest.mark.parametrize("damage", ["empty", "half", "garbage", "d huge", "ntotal huge", "lists huge"])
def test_f100_hostile_indexes(rows: Tensor, tmp_path: Path, kind: str, damage: str) -> None:
    import resource

    store, _ = build(tmp_path / "s", rows[:1000], kind)
    path = store.folder / str(store.snapshot().manifest.index)
    data = bytearray(path.read_bytes())
    if damage == "half":
        data = data[: len(data) // 2]
    elif damage == "empty":
        data = bytearray()
    elif damage == "garbage":
        data[:] = np.random.default_rng(0).bytes(len(data))
    elif damage == "d huge":
        data[4:8] = struct.pack("<i", 2**30)
    elif damage == "ntotal huge":
        data[8:16] = struct.pack("<q", 2**60)
    else:  # a length inside, which the first bytes do not tell
        data[37:45] = struct.pack("<Q", 2**58)
    path.write_bytes(data)
    manifest = json.loads((store.folder / "manifest.json").read_text())
    (store.folder / "manifest.json").write_text(json.dumps({**manifest, "index_bytes": len(data)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(IndexError_, match=path.name):
        FaissStore(store.folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_f100_hostile_manifests(rows: Tensor, tmp_path: Path) -> None:
    """F-110 too: files elsewhere are not opened."""
    store, _ = build(tmp_path / "s", rows[:1000], "ivf-flat")
    path = store.folder / "manifest.json"
    data = json.loads(path.read_text())
    for change, message in (
        ({"index": "../../x.faiss"}, "a file of its own"),
        ({"deleted": "/etc/passwd"}, "a file of its own"),
        ({"indexed": 10**12}, "does not fit together"),
        ({"format": "x"}, "has format 'x'"),
        ({"width": 8}, "wide, not 8"),
        ({"index_bytes": 5}, "bytes, the store says 5"),
        ({"extra": 1}, "unknown keys"),
        ({"parts": [{**data["parts"][0], "sha256": "0"}]}, "does not fit|is not the one"),
        ({"deleted": "deleted-000009.safetensors", "gone": 3}, "cannot be read"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match=message):
            FaissStore(store.folder)
    path.write_text("{")
    with pytest.raises(IndexError_, match="cannot be read"):
        FaissStore(store.folder)
    with pytest.raises(IndexError_, match="is no store"):
        FaissStore(tmp_path)


def test_f109_verify_sees_one_byte(rows: Tensor, tmp_path: Path) -> None:
    store, _ = build(tmp_path / "s", rows[:200], "flat")
    part = next((store.folder / "parts").glob("part-*.safetensors"))
    data = bytearray(part.read_bytes())
    data[-20] ^= 1
    part.write_bytes(data)
    with pytest.raises(ValueError, match="is damaged"):
        FaissStore(store.folder, verify=True)


# --- versions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flat", "flat, copied", "ivf-flat"])
def test_f111_every_search_sees_one_whole_version(
    rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Eight threads search while another adds pairs, deletes pairs and merges: always both of a pair, or neither."""
    if kind == "flat, copied":
        monkeypatch.setattr(exact, "PATIENCE", 0)
        monkeypatch.setattr(exact, "LEAST", 1)
        monkeypatch.setattr(exact, "fastest", lambda *args: exact.Rounded)
    kind = kind.partition(",")[0]
    store, _ = build(tmp_path / "s", rows[:1000], kind)
    pair = torch.nn.functional.normalize(torch.randn(1, 24, generator=torch.Generator().manual_seed(9)), dim=1)
    other = FaissStore(store.folder)  # another process's view of the same files
    wrong: list[str] = []
    seen: set[int] = set()
    stop = threading.Event()

    def search(opened: FaissStore) -> None:
        while not stop.is_set():
            try:
                now = opened.search(pair, 60, filter={"twin": {">=": 0}})[0]
                twins: dict[Any, int] = {}
                for match in now:
                    twins[match.columns["meta.twin"]] = twins.get(match.columns["meta.twin"], 0) + 1
                seen.add(len(now))
                if any(count != 2 for count in twins.values()):
                    wrong.append(f"half a pair: {twins}")
                everything = opened.search(pair, 10_000)[0]
                if (kind == "flat" and len(everything) % 2) or len({match.id for match in everything}) != len(
                    everything
                ):
                    wrong.append(f"{len(everything)} rows")
            except Exception as error:
                wrong.append(repr(error))

    noise = clustered(40, 24, seed=4) * 0.1

    def add(step: int) -> None:
        vectors = pair.repeat(2, 1) + noise[2 * step : 2 * step + 2]
        store.add([f"{step} a", f"{step} b"], vectors, {"meta.twin": [step, step]})

    add(0)  # from here on there is the column that the searches ask for
    threads = [threading.Thread(target=search, args=(store if i % 2 else other,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for step in range(12):
        if step:
            add(step)
        if step % 4 == 3:
            store.delete([f"{step - 1} a", f"{step - 1} b"])
        if step % 6 == 5:
            store.merge()
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:3]
    assert len(seen) > 2  # the searches ran while it changed
    assert len(store) == len(other) == 1000 + 2 * 12 - 2 * 3


def test_old_files_go_and_versions_rise(rows: Tensor, tmp_path: Path) -> None:
    store, _ = build(tmp_path / "s", rows[:1000], "ivf-flat")
    before = store.stats()["version"]
    (store.folder / ".perception-tmp-0.faiss").write_bytes(b"of a writer that was killed")
    store.delete(["1"])
    assert not list(store.folder.glob(".perception-tmp-*"))
    store.delete(["2"])
    assert store.stats()["version"] == before + 2
    assert len(list(store.folder.glob("deleted-*"))) == 1
    store.merge()
    assert not list(store.folder.glob("deleted-*"))
    assert len(list(store.folder.glob("index-*"))) == 1
    assert not list(store.folder.glob("block-*"))
    assert len(store) == 998
