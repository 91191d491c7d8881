"""From a version of a store to its index: choose, train, fill block by block, measure on held-out rows, tune, report.

The held-out rows are neither trained with nor added while recall is measured; they join afterwards. A block that was
filled is not filled again after a kill.

Q queries  n rows  C width  L lists
"""

import hashlib
import logging
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perception_encoder.retrieval import blocks
from perception_encoder.retrieval.choice import (
    TARGET_RECALL,
    TRAINING_ROWS,
    Choice,
    Trial,
    check_budget,
    choose,
    parse_bytes,
    recall,
    show_bytes,
    time_of,
    tune,
)
from perception_encoder.retrieval.exact import PATIENCE
from perception_encoder.retrieval.store import check_queries
from perception_encoder.retrieval.versions import Snapshot, best

log = logging.getLogger(__name__)
HELD_OUT = 256  # queries, at most a tenth of the rows
K = 10  # of recall
BLOCK_BYTES = 2**30  # of codes filled in memory at once
SEED = 20260101
COPYING = 20.0  # seconds for copies of rows before an exact search is timed


def build_index(
    now: Snapshot,
    out: Path,
    *,
    kind: str = "auto",
    max_memory: str | int | None = None,
    max_latency: float | None = None,
    target_recall: float = TARGET_RECALL,
    queries: Tensor | None = None,
) -> tuple[Choice, dict[str, Any]]:
    """Write the index of a version to `out` (nothing for an exact search); what was chosen, and the report.

    Raises ConfigError when no index fits into max_memory.
    """
    check_budget(kind=kind, max_memory=max_memory, max_latency=max_latency, target_recall=target_recall)
    memory, width = parse_bytes(max_memory), now.manifest.width
    choice = choose(now.rows, width, kind=kind, max_memory=memory, max_latency=max_latency)
    choice = replace(choice, limit=memory)
    now.copies.limit(choice.spare(now.rows, width))
    test = _Test(now, None if queries is None else check_queries(queries, 1, width))
    budget = {"max_memory": memory, "max_latency": max_latency, "target_recall": target_recall}
    started = time.perf_counter()
    if choice.kind == "flat":
        trials = test.exact_trials()
    else:
        choice, trials = _build(now, choice, out, test, target_recall, max_latency)
    report = _report(now, choice, trials, test, budget)
    log.info("%s over %d rows in %.1f s: %s", choice.kind, now.rows, time.perf_counter() - started, choice.why)
    return choice, report


class _Test:
    """The queries of a measurement, and the rows an exact search finds for them among those that are not held out."""

    def __init__(self, now: Snapshot, given: Tensor | None):
        self.now = now
        count = min(HELD_OUT, now.rows // 10)
        self.held = np.sort(np.random.default_rng(SEED).choice(now.rows, count, replace=False))
        self.added = np.ones(now.rows, bool)
        self.added[self.held] = False
        self.sets = {"held-out rows": now.vectors(self.held)}
        if given is not None:
            self.sets["given queries"] = given
        self.queries = torch.cat(list(self.sets.values()))
        self.k = min(K, int(self.added.sum()))
        self.wanted = (
            now.exact(self.queries, self.k, self.added)[1] if len(self.queries) else np.empty((0, self.k), int)
        )

    def shares(self, found: np.ndarray) -> dict[str, float]:
        """Recall of each set of queries."""
        ends = np.cumsum([len(some) for some in self.sets.values()])[:-1]
        pairs = zip(np.split(found, ends), np.split(self.wanted, ends), strict=True)
        return {name: recall(f, w) for name, (f, w) in zip(self.sets, pairs, strict=True) if len(f)}

    def exact_trials(self) -> list[Trial]:
        """The exact search against the products of numpy: what there is to lose is rounding."""
        if not len(self.queries):
            return []
        some = self.queries[: max(1, min(len(self.queries), 2**31 // max(1, self.now.rows * self.now.manifest.width)))]
        found = _numpy_search(self.now, some.numpy(), self.k, self.added)
        share = round(recall(self.wanted[: len(some)], found), 4)
        end, before = time.perf_counter() + COPYING, -1
        for _ in range(PATIENCE):
            self.now.exact(self.queries[:1], self.k)
        while self.now.copies.bytes > before and time.perf_counter() < end:  # until all is copied that searches copy
            before = self.now.copies.bytes
            self.now.exact(self.queries[:1], self.k)
        seconds = time_of(lambda: self.now.exact(self.queries[:1], self.k))
        return [Trial(0, share, seconds, {"all": share})]


def _numpy_search(now: Snapshot, queries: np.ndarray, k: int, added: np.ndarray) -> np.ndarray:
    """Brute force that shares no code with the search it judges. Q k rows"""
    scores = np.concatenate(
        [queries @ part.vectors.float().numpy().T for part in now.parts if len(part.vectors)], axis=1
    )
    scores[:, ~added] = -np.inf
    return np.argsort(-scores, axis=1, kind="stable")[:, :k]


def _build(
    now: Snapshot, choice: Choice, out: Path, test: _Test, target_recall: float, max_latency: float | None
) -> tuple[Choice, list[Trial]]:
    trained, files = fill_blocks(now, choice, out, test.held)
    trials: list[Trial] = []
    if len(test.queries):
        filled = _Filled(now, choice, files, test.k)
        choice, trials = tune(
            choice,
            lambda effort: test.shares(filled.search(effort, test.queries)),
            lambda effort: filled.search(effort, test.queries[:1]),
            target_recall=target_recall,
            max_latency=max_latency,
        )
    held = (test.held, now.vectors(test.held).numpy())
    if choice.kind == "hnsw":
        index = blocks.read(files[0], "hnsw", now.manifest.width, blocks.rows_in(files[0]), mapped=False)
        blocks.write(blocks.fill(index, iter([held])), out)
    else:
        rest = out.with_name(f"block-{out.stem}-held.faiss")
        index = blocks.faiss_module().read_index(str(trained))
        blocks.write(blocks.fill(index, iter([held])), rest)
        blocks.merge(trained, [*files, rest], out)
    return choice, trials


class _Filled:
    """Blocks that are searched together, before they are merged."""

    def __init__(self, now: Snapshot, choice: Choice, files: list[Path], k: int):
        self.now, self.choice, self.k = now, choice, k
        self.opened = [blocks.read(file, choice.kind, now.manifest.width, blocks.rows_in(file)) for file in files]

    def search(self, effort: int, queries: Tensor) -> np.ndarray:
        """Q k rows"""
        wanted = self.k * max(1, self.choice.rescore)
        found = []
        for index in self.opened:
            scores, rows = blocks.search(index, self.choice.kind, effort, queries.numpy(), wanted)
            found.append(self.now.rescore(queries, rows) if self.choice.rescore else (scores, rows))
        return best(found, self.k)[1]


def fill_blocks(now: Snapshot, choice: Choice, out: Path, held: np.ndarray) -> tuple[Path, list[Path]]:
    """The trained index and the blocks filled from it, without the rows held out. What is there is taken as it is.

    A block depends on the trained index and its rows alone, so other processes may fill others (`fill_block`).
    """
    width = now.manifest.width
    trained = out.with_name(f"trained-{out.stem}-{_tag(now, choice)}.faiss")
    if not trained.is_file():
        blocks.write(blocks.train(choice, _sample(now, choice, held), width), trained)
    if choice.kind == "hnsw":
        spans = [(0, now.rows)]
    else:
        each = max(1, BLOCK_BYTES // ((choice.code or 4 * width) + 8))
        spans = [(start, min(start + each, now.rows)) for start in range(0, now.rows, each)]
    files = [out.with_name(f"block-{trained.stem}-{number:05d}.faiss") for number in range(len(spans))]
    for file, span in zip(files, spans, strict=True):
        if not file.is_file():
            fill_block(now, trained, file, span, held)
    return trained, files


def fill_block(now: Snapshot, trained: Path, out: Path, span: tuple[int, int], held: np.ndarray) -> None:
    """One block: rows start to stop, without those held out."""
    index = blocks.faiss_module().read_index(str(trained))
    blocks.write(blocks.fill(index, _span(now, span, held)), out)


def _span(now: Snapshot, span: tuple[int, int], held: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for part, start in zip(now.parts, now.offsets.tolist(), strict=False):
        lo, hi = max(span[0], start), min(span[1], start + len(part.vectors))
        if lo < hi:
            rows = np.setdiff1d(np.arange(lo, hi), held, assume_unique=True)
            yield rows, part.vectors[torch.from_numpy(rows - start)].float().numpy()


def _sample(now: Snapshot, choice: Choice, held: np.ndarray) -> np.ndarray:
    """Rows to train with, spread over all, never one that is held out."""
    if choice.kind == "hnsw":
        return np.zeros((0, now.manifest.width), np.float32)
    rows = np.setdiff1d(np.arange(now.rows), held, assume_unique=True)
    wanted = max(TRAINING_ROWS[1] * choice.lists, 64 * 256 if choice.code else 0)
    if len(rows) > wanted:
        rows = np.sort(np.random.default_rng(SEED + 1).choice(rows, wanted, replace=False))
    return now.vectors(rows).numpy()


def _tag(now: Snapshot, choice: Choice) -> str:
    """Half-built files of another version or another choice are not taken for this one's."""
    what = f"{choice.kind} {choice.lists} {choice.code} {[part.sha256 for part in now.manifest.parts]}"
    return hashlib.sha256(what.encode()).hexdigest()[:12]


def _report(now: Snapshot, choice: Choice, trials: list[Trial], test: _Test, budget: dict[str, Any]) -> dict[str, Any]:
    chosen = next((trial for trial in trials if trial.effort == choice.effort), None)
    memory = choice.bytes(now.rows, now.manifest.width)
    latency, limit = chosen.seconds if chosen else None, budget["max_latency"]
    return {
        "rows": now.rows,
        "width": now.manifest.width,
        "index": {**asdict(choice), "memory": memory, "in words": show_bytes(memory)},
        "asked": budget,
        "measured": {
            "recall": chosen.recall if chosen else None,
            "recall of each": dict(chosen.sets) if chosen else {},
            "k": test.k,
            "queries": {name: len(some) for name, some in test.sets.items()},
            "against": "an exact search over the rows that were not held out",
            "held out": "the queries of 'held-out rows' were neither trained with nor added when this was measured",
            "seconds a query": latency,
        },
        "met": {
            "max_memory": budget["max_memory"] is None or memory <= budget["max_memory"],
            "max_latency": limit is None or latency is None or latency <= limit,
            "target_recall": chosen is None or chosen.recall >= budget["target_recall"],
        },
        "trials": [asdict(trial) for trial in trials],
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
    }
