"""Exact search: the answers of faiss's flat index and of numpy, whatever the blocks, the layout and the rounding."""

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from retrieval_tools import clustered

faiss = pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
pytest.importorskip("pyarrow", reason="the extra `retrieval` is not installed")

from perception.kernels import linear  # noqa: E402
from perception_encoder.retrieval import exact, versions  # noqa: E402
from perception_encoder.retrieval.exact import (  # noqa: E402
    Block,
    Copies,
    Packed,
    Rounded,
    _Found,
    exact_search,
    rounding,
)
from perception_encoder.retrieval.faiss_store import FaissStore, Origin  # noqa: E402

WIDTH = 48
FORMS = ["plain", "transposed", "onednn", "8 bits"]


@pytest.fixture(scope="module")
def rows() -> Tensor:
    return clustered(5000, WIDTH, centres=30)


@pytest.fixture(scope="module")
def queries(rows: Tensor) -> Tensor:
    near = rows[::80] + 0.05 * clustered(63, WIDTH, seed=5)
    return torch.nn.functional.normalize(torch.cat([near, torch.randn(1, WIDTH)]), dim=1)  # 64


def blocks_of(rows: Tensor, size: int, keep: np.ndarray | None = None) -> list[Block]:
    starts = range(0, len(rows), size)
    return [Block((size, s), s, rows[s : s + size], None if keep is None else keep[s : s + size]) for s in starts]


def by_numpy(queries: Tensor, rows: Tensor, k: int, keep: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The rule in words: products as float32 has them, the largest first, equal ones in the order of their rows."""
    scores = (queries.double() @ rows.double().T).numpy().astype(np.float32)
    if keep is not None:
        scores[:, ~keep] = -np.inf
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, order, 1)
    return scores, np.where(np.isneginf(scores), -1, order)


def search(
    queries: Tensor, rows: Tensor, k: int, *, size: int = 1500, keep: np.ndarray | None = None, copies: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    asked = blocks_of(rows, size, keep)
    return exact_search(queries, asked, k, lambda at: rows[torch.from_numpy(at)].float(), copies or Copies())


def same(got: tuple[np.ndarray, np.ndarray], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    np.testing.assert_array_equal(got[1], wanted[1])
    np.testing.assert_allclose(got[0], wanted[0], rtol=0, atol=1e-7)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Copies]:
    """Copies that are made at the first search, of every block, in the form that is named."""

    def make(form: str) -> Copies:
        monkeypatch.setattr(exact, "PATIENCE", 0)
        monkeypatch.setattr(exact, "LEAST", 1)
        monkeypatch.setattr(exact, "fastest", lambda *args: Rounded if form == "8 bits" else Packed)
        monkeypatch.setattr(linear, "choose", lambda *args, **settings: form)
        return Copies()

    return make


@pytest.mark.parametrize("count", [1, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_equals_faiss_and_numpy(rows: Tensor, queries: Tensor, count: int, dtype: torch.dtype) -> None:
    stored, asked = rows.to(dtype), queries[:count]
    flat = faiss.IndexFlatIP(WIDTH)
    flat.add(stored.float().numpy())
    scores, found = search(asked, stored, 10)
    theirs, wanted = flat.search(asked.numpy(), 10)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_allclose(scores, theirs, rtol=0, atol=1e-6)
    same((scores, found), by_numpy(asked, stored, 10))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_layout_gives_the_same_bits(
    rows: Tensor, queries: Tensor, eager: Callable[[str], Copies], form: str, dtype: torch.dtype
) -> None:
    stored = rows.to(dtype)
    wanted = search(queries, stored, 7)
    copies = eager(form)
    for count in (64, 1):
        for size in (1500, 499):
            got = search(queries[:count], stored, 7, size=size, copies=copies)
            np.testing.assert_array_equal(got[1], wanted[1][:count])
            np.testing.assert_array_equal(got[0], wanted[0][:count])
        copies.forget([])
    assert copies.bytes == 0


@pytest.mark.parametrize(
    ("form", "dtype", "held"),
    [
        ("plain", torch.float32, 0),
        ("plain", torch.float16, 4),
        ("onednn", torch.float32, 4),
        ("transposed", torch.float16, 4),
    ],
)
def test_what_a_copy_holds(
    rows: Tensor, eager: Callable[[str], Copies], form: str, dtype: torch.dtype, held: int
) -> None:
    """Nothing where the rows as they lie are the fastest; else float32, once for few queries and for many."""
    copies = eager(form)
    for count in (1, 64, 1):
        copies.products(blocks_of(rows.to(dtype), 1500), count)
        assert copies.bytes == held * rows.numel()
    copies.forget([(1500, 0)])
    assert copies.bytes == held * 1500 * WIDTH
    copies.forget([])
    assert copies.bytes == 0


def test_equal_rows_come_in_their_order(rows: Tensor, queries: Tensor, eager: Callable[[str], Copies]) -> None:
    """More copies of one picture than there are spare places, over several blocks and within one."""
    twins = rows.clone()
    same_row = [*range(3, 5000, 40), *range(2000, 2100)]
    twins[same_row] = queries[0]
    for form in (None, *FORMS):
        copies = eager(form) if form else Copies()
        scores, found = search(queries[:5], twins, 10, copies=copies)
        assert found[0].tolist() == sorted(set(same_row))[:10]
        assert len(set(scores[0].tolist())) == 1
        same((scores, found), by_numpy(queries[:5], twins, 10))
        same(search(queries[:5], twins, 200, copies=copies), by_numpy(queries[:5], twins, 200))


@pytest.mark.parametrize("form", ["plain", "8 bits"])
@pytest.mark.parametrize("share", [1.0, 0.8, 0.2])
def test_thousands_of_equal_rows_are_not_all_remembered(
    rows: Tensor, queries: Tensor, eager: Callable[[str], Copies], form: str, share: float
) -> None:
    """Who asks with a picture that is there thousands of times does not get thousands of candidates."""
    twins, keep = rows.clone(), np.random.default_rng(0).random(len(rows)) < share
    twins[500:4500] = queries[0]
    asked = torch.cat([queries[:1].expand(200, -1), queries])
    counted: list[int] = []

    def vectors_of(at: np.ndarray) -> Tensor:
        counted.append(len(at))
        return twins[torch.from_numpy(at)]

    got = exact_search(asked, blocks_of(twins, 1500, keep), 10, vectors_of, eager(form))
    same(got, by_numpy(asked, twins, 10, keep))
    assert sum(counted) <= len(asked) * 4 * max(10 + exact.SPARE, 1500 // exact.MANY)


def test_rounding_of_the_product_does_not_show(rows: Tensor, queries: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products that are off by as much as they may be, in the worst direction there is: the answer is the same."""
    slack = 0.01  # far more than any gap between neighbours
    monkeypatch.setattr(exact, "rounding", lambda width: slack)
    chance = torch.Generator().manual_seed(0)

    def noisy(vectors: Tensor) -> Any:
        return lambda q: q @ vectors.T + slack * torch.randint(-1, 2, (len(q), len(vectors)), generator=chance)

    monkeypatch.setattr(exact.Lying, "__call__", lambda self, q: noisy(self.vectors)(q))
    for size in (5000, 700, 60):
        same(search(queries, rows, 10, size=size), by_numpy(queries, rows, 10))


@pytest.mark.parametrize("of", ["clusters", "one bunch"])
def test_8_bits_are_off_by_no_more_than_they_say(rows: Tensor, queries: Tensor, of: str) -> None:
    """And so little that few rows are looked at twice, unless all are nearly the same: then 8 bits are given up."""
    if of == "one bunch":
        rows = torch.nn.functional.normalize(rows[:1] + 0.02 * rows, dim=1)
        queries = torch.nn.functional.normalize(rows[:1] + 0.02 * queries, dim=1)
    rounded = Rounded(rows)
    off = (rounded(queries).double() - queries.double() @ rows.double().T).abs().amax(dim=1, keepdim=True)
    slack = _Found(queries, 10, rounded=True).slack(torch.arange(64), rounded)
    assert bool((off < slack).all())
    assert float(slack.max()) < 0.03
    asked: list[int] = []

    def vectors_of(at: np.ndarray) -> Tensor:
        asked.append(len(at))
        return rows[torch.from_numpy(at)]

    class Now(Copies):
        def products(self, blocks: Any, count: int) -> Any:
            return [Rounded(block.vectors) for block in blocks]

    same(exact_search(queries, blocks_of(rows, 1700), 10, vectors_of, Now()), by_numpy(queries, rows, 10))
    assert sum(asked) < 64 * len(rows) / 10


def test_rounding_is_an_upper_bound(rows: Tensor, queries: Tensor) -> None:
    off = (queries @ rows.T).double() - queries.double() @ rows.double().T
    assert float(off.abs().max()) < rounding(WIDTH) < 1e-5
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")  # products in bfloat16 are allowed
        assert rounding(WIDTH) > 2**-8
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.2, 0.8])
def test_only_rows_that_are_allowed(rows: Tensor, queries: Tensor, share: float) -> None:
    keep = np.random.default_rng(0).random(len(rows)) < share
    for k, size in ((10, 1500), (3000, 1500), (10, 20)):
        scores, found = search(queries, rows, k, size=size, keep=keep)
        wanted = by_numpy(queries, rows, k, keep)
        same(
            (scores[:, : int(keep.sum())], found[:, : int(keep.sum())]), tuple(w[:, : int(keep.sum())] for w in wanted)
        )  # type: ignore[arg-type]
        assert (found[:, int(keep.sum()) :] == -1).all()
    same(search(queries, rows[:20], 19, keep=keep[:20]), by_numpy(queries, rows[:20], 19, keep[:20]))


def test_more_than_there_is(rows: Tensor, queries: Tensor) -> None:
    _, found = search(queries, rows[:7], 10)
    assert np.array_equal(np.sort(found, axis=1)[:, -7:], np.tile(np.arange(7), (64, 1)))
    assert search(queries[:0], rows, 10)[1].shape == (0, 10)
    scores, found = exact_search(queries, [], 10, lambda at: rows, Copies())
    assert (found == -1).all()
    assert np.isneginf(scores).all()


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(rows: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FaissStore:
    """5000 rows in two parts of float16, which are worth a copy on every machine, in blocks of 1000."""
    monkeypatch.setattr(versions, "BLOCK", 1000)
    monkeypatch.setattr(exact, "LEAST", 100)
    monkeypatch.setattr(exact, "fastest", lambda *args: Packed)
    store = FaissStore.create(tmp_path / "s", WIDTH, origin=Origin(dtype="float16"))
    for start, stop in ((0, 3000), (3000, 5000)):
        store.add([str(i) for i in range(start, stop)], rows[start:stop])
    return store


def test_copies_are_made_when_they_pay_and_dropped_when_they_are_gone(store: FaissStore, queries: Tensor) -> None:
    copies, whole = store.snapshot().copies, 4 * 5000 * WIDTH
    first = store.search(queries, 5)
    assert copies.bytes == 0
    for _ in range(exact.PATIENCE):
        assert store.search(queries, 5) == first
    assert copies.bytes == whole
    store.delete([first[0][0].id])
    assert store.search(queries, 5)[0] == store.search(queries[:1], 6)[0][:5]
    assert (store.snapshot().copies, copies.bytes) == (copies, whole)  # what is gone is masked
    store.merge()
    assert copies.bytes == 0
    for _ in range(exact.PATIENCE + 1):
        merged = store.search(queries, 5)
    assert copies.bytes == 4 * 4999 * WIDTH
    assert merged[0][0].id == first[0][1].id
    store.optimize(kind="ivf-flat")
    assert copies.bytes == 0
    for _ in range(exact.PATIENCE + 1):
        store.search(queries, 5)
    assert copies.bytes == 0  # an index does the searching


def test_copies_keep_to_their_limits(store: FaissStore, queries: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    block = 4 * 1000 * WIDTH
    monkeypatch.setattr(exact, "AT_ONCE", 1)  # one block a search
    copies = store.snapshot().copies
    copies.most = 3 * block
    held = []
    for _ in range(exact.PATIENCE + 5):
        found = store.search(queries, 5)
        held.append(copies.bytes)
    assert held[exact.PATIENCE :] == [block, 2 * block, 3 * block, 3 * block, 3 * block]
    same_store = FaissStore(store.folder)
    assert same_store.search(queries, 5) == found


def test_a_search_may_ask_while_copies_are_forgotten(rows: Tensor) -> None:
    """A block that is asked for while the names are gone through, as another thread may."""
    copies = Copies()
    later = iter(range(100))

    class Name:
        def __hash__(self) -> int:
            copies._asked[True, next(later)] += 1
            return 7

    copies._asked[True, Name()] += 1
    copies._asked[True, "other"] += 1
    copies.forget([])
    assert (True, "other") not in copies._asked


def test_threads_search_while_copies_are_made(store: FaissStore, queries: Tensor) -> None:
    wanted = store.search(queries, 5)
    wrong: list[str] = []

    def look() -> None:
        for _ in range(10):
            if store.search(queries, 5) != wanted:
                wrong.append("another answer")

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.snapshot().copies.bytes == 4 * 5000 * WIDTH
