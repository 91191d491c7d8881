"""Exact search: every row is looked at, and how it is looked at does not show in the answer.

Blocks of rows are multiplied with the queries where they lie or, once they were asked for a few times, from copies that
this machine multiplies faster (`Copies`): in another layout, or in 8 bits, of which memory delivers four times as many.
Such a product is off by its rounding; so it only proposes candidates, all rows that may be among the k best if it is
off by as much as it can be, and their products are taken again in float64. What comes out are the k largest products
as float32 has them, equal ones in the order of their rows: what faiss's IndexFlatIP finds, but for rows that differ by
less than its own rounding.

Q queries  n rows of a block  m candidates  C width
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

BLOCK = 8192  # rows multiplied at once
SPARE = 16  # candidates beyond k that a block may propose before its own k-th best is looked up
SCORES = 2**24  # products, and numbers of candidates' vectors, in memory at once
MANY = 16  # a block of which 8 bits propose more than one row in so many is looked at without rounding
PATIENCE = 2  # times a block is multiplied where it lies before it is copied: for a single search a copy never pays
LEAST = 1024  # rows of a block that is worth a copy
FEW = 16  # queries that wait for the rows more than for the arithmetic
MOST = 2**31  # bytes of all copies of a store
AT_ONCE = 2**25  # bytes of vectors that one search copies: it takes about twice as long

VectorsOf = Callable[[np.ndarray], Tensor]  # row numbers n -> n C


class Block(NamedTuple):
    """Rows that lie together.

    name     the same for the same rows for ever: what a copy is known by; None for rows that are never copied
    first    the number of the first
    vectors  n C, float32 or float16
    keep     n bool, the rows that may be found; None for all
    """

    name: Hashable
    first: int
    vectors: Tensor
    keep: np.ndarray | None


class Product(Protocol):
    """Rows that can be multiplied, perhaps only nearly.

    off      how far a row may be from the one that is multiplied in its place
    longest  the length of the longest of these where the query is rounded too, 0 where it is read as it is
    """

    off: float
    longest: float

    def __call__(self, queries: Tensor) -> Tensor:
        """Q C -> Q n float32"""
        ...


def exact_search(
    queries: Tensor, blocks: Sequence[Block], k: int, vectors_of: VectorsOf, copies: "Copies"
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows of the k nearest, Q k, best first; -inf and -1 where there are no more.

    queries  Q C float32 of length 1, as the rows are
    """
    ways = copies.products(blocks, len(queries))
    found = _Found(queries, k, rounded=any(product.longest for product in ways))
    for block, product in zip(blocks, ways, strict=True):
        for which in torch.arange(len(queries)).split(max(1, SCORES // len(block.vectors))):
            if len(which):
                _look(which, block, product, found)
    return found.decided(vectors_of)


def rounding(width: int) -> float:
    """The most a float32 product of two vectors of length 1 can be off, in any order of summing (Higham 2002, 3.1).

    Far more where the process allows products in half precision (`torch.set_float32_matmul_precision`).
    """
    if torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32"):
        return 2**-6
    return 1.01 * (width + 2) * 2**-24  # lengths are 1 to a thousandth, and the last rounding makes ties


def products(queries: Tensor, asked: np.ndarray, rows: np.ndarray, vectors_of: VectorsOf) -> np.ndarray:
    """The products of queries Q C and rows, taken in float64 and rounded once: m float32.

    asked, rows  m: which query and which row
    """
    scores, step = np.empty(len(rows), np.float32), max(1, SCORES // queries.shape[1])
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        exact = vectors_of(rows[some]).double().mul_(queries[torch.from_numpy(asked[some])]).sum(dim=1)
        scores[some] = exact.float().numpy()
    return scores


# --- candidates ------------------------------------------------------------------------------------------------------


class _Found:
    """Rows that may be among the k best of Q queries, each with the bounds its product lies between.

    floor  Q 1, what the k-th best has at the least: rows below it are out
    off    Q 1, how far a query is from the one that 8-bit products read
    """

    def __init__(self, queries: Tensor, k: int, *, rounded: bool):
        from perception.kernels.matvec import round_rows

        self.queries, self.k, self.floor = queries, k, torch.full((len(queries), 1), -torch.inf)
        self.off = 1.01 * (queries - (round_rows(queries) if rounded else queries)).norm(dim=1, keepdim=True)
        self.asked, self.rows = np.zeros(0, np.int64), np.zeros(0, np.int64)  # m: query and row
        self.high, self.low = np.zeros(0, np.float32), np.zeros(0, np.float32)  # m
        self._enough = 0

    def add(self, asked: Tensor, rows: Tensor, scores: Tensor, slack: Tensor) -> None:
        """m rows, with products that may be off by `slack`, m too."""
        self.asked, self.rows = np.append(self.asked, asked.numpy()), np.append(self.rows, rows.numpy())
        self.high = np.append(self.high, (scores + slack).numpy())
        self.low = np.append(self.low, (scores - slack).numpy())
        if len(self.rows) > self._enough:
            kth = self._kth(self.low)
            self.floor = torch.maximum(self.floor, torch.from_numpy(kth)[:, None])
            hopeful = self.high >= kth[self.asked]
            self.asked, self.rows = self.asked[hopeful], self.rows[hopeful]
            self.high, self.low = self.high[hopeful], self.low[hopeful]
            self._enough = 2 * len(self.rows) + self.k * len(kth)

    def slack(self, which: Tensor, product: Product) -> Tensor:
        """How far a product may be from the true one: |qv - q'v'| <= |q| |v - v'| + |q - q'| |v'|.  n -> n 1"""
        return rounding(self.queries.shape[1]) + 1.01 * product.off + self.off[which] * product.longest

    def decided(self, vectors_of: VectorsOf) -> tuple[np.ndarray, np.ndarray]:
        """Products of the most promising candidates first, then of those that may still be better than these."""
        first = self.low >= self._kth(self.low)[self.asked]
        scores = np.full(len(self.rows), -np.inf, np.float32)
        scores[first] = products(self.queries, self.asked[first], self.rows[first], vectors_of)
        rest = ~first & (self.high >= self._kth(scores)[self.asked])
        scores[rest] = products(self.queries, self.asked[rest], self.rows[rest], vectors_of)
        order = np.lexsort((self.rows, -scores, self.asked))  # of equal scores the earlier row first
        places = np.arange(len(order)) - np.searchsorted(self.asked[order], self.asked[order])
        order, places = order[places < self.k], places[places < self.k]
        shape = len(self.queries), self.k
        found = np.full(shape, -np.inf, np.float32), np.full(shape, -1, np.int64)
        found[0][self.asked[order], places] = scores[order]
        found[1][self.asked[order], places] = np.where(np.isneginf(scores[order]), -1, self.rows[order])
        return found

    def _kth(self, values: np.ndarray) -> np.ndarray:
        """The k-th largest value of each query, Q; -inf where there are fewer."""
        order = np.lexsort((-values, self.asked))
        ends = np.searchsorted(self.asked[order], np.arange(len(self.floor)), "right")
        starts = np.searchsorted(self.asked[order], np.arange(len(self.floor)))
        there = starts + self.k <= ends
        kth = np.full(len(self.floor), -np.inf, np.float32)
        kth[there] = values[order[starts[there] + self.k - 1]]
        return kth


def _look(which: Tensor, block: Block, product: Product, found: _Found) -> None:
    """Find candidates among the rows of a block for some of the queries.

    which  the numbers of these queries
    """
    numbers, keep = None, None if block.keep is None or block.keep.all() else torch.from_numpy(block.keep)
    if keep is not None and float(keep.float().mean()) < 0.5:
        numbers = keep.nonzero().flatten()
        product, keep = Lying(block.vectors[numbers]), None
    scores, slack, floor = product(found.queries[which]), found.slack(which, product), found.floor[which]  # q n, q 1
    if keep is not None:
        scores = scores.masked_fill(~keep, -torch.inf)
    hits = scores >= floor - slack
    if len(crowded := (hits.sum(dim=1) > found.k + SPARE).nonzero().flatten()):
        kth = scores[crowded].topk(found.k, dim=1).values[:, -1:] - slack[crowded]
        floor[crowded] = torch.maximum(floor[crowded], kth)
        found.floor[which] = floor
        hits[crowded] = scores[crowded] >= floor[crowded] - slack[crowded]
    if keep is not None:
        hits &= keep
    limit = max(found.k + SPARE, len(block.vectors) // MANY) if product.off else found.k + SPARE
    if len(crowded) and bool((crowd := hits.sum(dim=1) > limit).any()):
        if product.off:  # too rough for those with many rows of nearly the same score
            _look(which[crowd], block, Lying(block.vectors), found)
            hits[crowd] = False
        else:  # many rows alike: their order is decided here, so that no more than k of them are remembered
            rows = block.vectors if numbers is None else block.vectors[numbers]
            exact = (found.queries[which[crowd]].double() @ rows.double().T).float()
            if keep is not None:
                exact = exact.masked_fill(~keep, -torch.inf)
            first = exact.sort(dim=1, descending=True, stable=True).indices[:, : found.k]
            hits[crowd] &= torch.zeros_like(hits[crowd]).scatter_(1, first, True)
    asked, places = hits.nonzero(as_tuple=True)
    if len(asked):
        rows = (places if numbers is None else numbers[places]) + block.first
        found.add(which[asked], rows, scores[asked, places], slack[asked, 0])


# --- products --------------------------------------------------------------------------------------------------------


class Lying:
    """The rows as they lie; half precision becomes float32 at every call."""

    off = longest = 0.0

    def __init__(self, vectors: Tensor):
        self.vectors = vectors

    def __call__(self, queries: Tensor) -> Tensor:
        return queries @ self.vectors.float().T


class Packed:
    """The rows in float32, in the layout that is fastest here for many queries."""

    off = longest = 0.0

    def __init__(self, vectors: Tensor):
        from perception.kernels.linear import pack

        rows = vectors.float()
        self.layer = pack(rows, rows=64)
        self.bytes = 0 if self.layer.form == "plain" and vectors.dtype == torch.float32 else rows.nbytes

    def __call__(self, queries: Tensor) -> Tensor:
        return self.layer(queries)


class Rounded:
    """The rows in 8 bits: a quarter of the memory to be read, which is what a search of few queries waits for."""

    def __init__(self, vectors: Tensor):
        from perception.kernels.matvec import round8, stream, unround

        rows = vectors.float()
        self.product = stream(rows, "int8", build=False)
        self.bytes = self.product.nbytes
        self.off = self.longest = 0.0
        for some in rows.split(256):  # so few that they stay in the cache
            back = unround(*round8(some))
            self.off = max(self.off, float((some - back).norm(dim=1).max()))
            self.longest = max(self.longest, float(back.norm(dim=1).max()))

    def __call__(self, queries: Tensor) -> Tensor:
        return self.product(queries)


@functools.cache
@torch.inference_mode()
def fastest(width: int, queries: int, threads: int) -> type["Packed"] | type["Rounded"]:
    """How to hold rows for so many queries: measured here, once a process."""
    from perception.kernels.matvec import compiled
    from perception.kernels.probe import race

    if not compiled("int8", build=False):
        return Packed
    rows = torch.rand(BLOCK, width, generator=torch.Generator().manual_seed(0)).sub_(0.5)
    runs = ("packed", Packed(rows)), {"rounded": Rounded(rows)}
    asked = rows[:queries] + rows[queries : 2 * queries]
    return Rounded if race(*runs, asked, tolerance=0.05, budget=0.1) == "rounded" else Packed


class Copies:
    """Copies of blocks, made a little at a time by the searches that profit from them; shared by all threads.

    most  bytes of all together; blocks beyond are multiplied where they lie
    """

    def __init__(self, most: int = MOST):
        self.most, self.bytes = most, 0
        self._made: dict[tuple[bool, Hashable], Rounded | Packed] = {}  # (for few queries, name of the block)
        self._asked: Counter[tuple[bool, Hashable]] = Counter()
        self._lock = threading.Lock()

    def products(self, blocks: Sequence[Block], queries: int) -> list[Product]:
        """How to multiply each block with so many queries now. What is worth it is copied first, AT_ONCE bytes."""
        few = queries <= FEW
        wanted = [b for b in blocks if b.name is not None and (few, b.name) not in self._made]
        wanted = [b for b in wanted if len(b.vectors) >= LEAST]
        self._asked.update((few, b.name) for b in wanted)
        ripe = [b for b in wanted if self._asked[few, b.name] > PATIENCE]
        if ripe and self._lock.acquire(blocking=False):  # another thread is at it already: not twice
            try:
                self._copy(ripe, few)
            finally:
                self._lock.release()
        return [self._made.get((few, b.name)) or Lying(b.vectors) for b in blocks]

    def _copy(self, blocks: Sequence[Block], few: bool) -> None:
        read = 0
        for block in blocks:
            if (few, block.name) in self._made:
                continue
            kind = fastest(block.vectors.shape[1], 1 if few else 64, torch.get_num_threads())
            other = self._made.get((not few, block.name))
            if isinstance(other, kind):
                self._made[few, block.name] = other
                continue
            size = 4 * block.vectors.numel()
            if kind is Rounded:
                size = block.vectors.numel() + 4 * len(block.vectors)  # and the scale of each row
            if self.bytes + size > self.most or read >= AT_ONCE:
                return
            made = self._made[few, block.name] = kind(block.vectors)
            self.bytes += made.bytes
            read += 4 * block.vectors.numel()

    def limit(self, most: int | None) -> None:
        """Take no more than so many bytes from now on, and never more than MOST. What is there goes if it is more."""
        with self._lock:
            self.most = MOST if most is None else min(MOST, most)
            if self.bytes > self.most:
                self._made.clear()
                self.bytes = 0

    def forget(self, kept: Collection[Hashable]) -> None:
        """Drop the copies of blocks that are no more."""
        with self._lock:
            kept = set(kept)
            # A list first: searches of other threads add to what was asked for, and do not wait for the lock.
            for key in [key for key in list(self._asked) if key[1] not in kept]:
                del self._asked[key]
            for key in [key for key in self._made if key[1] not in kept]:
                made = self._made.pop(key)
                if made not in self._made.values():  # one copy may do for few and for many
                    self.bytes -= made.bytes
