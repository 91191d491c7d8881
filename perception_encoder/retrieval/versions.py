"""One version of a store: parts that never change, an index over the first of them, and which rows are gone.

    store/manifest.json            the present version; replaced in one step, so there is no time between two versions
    store/parts/part-00000...      vectors and columns, as everywhere
    store/index-000003.faiss       over the first `indexed` rows; the rows after them are searched one by one
    store/deleted-000005.safetensors   rows that are gone

Rows are counted through the parts in their order. No file is ever written twice under one name.

Q queries  n rows  C width
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from perception.errors import IndexError_, PerceptionError
from perception.files import atomic_write
from perception.settings import read_settings
from perception_encoder.retrieval import blocks, filters
from perception_encoder.retrieval.choice import Choice
from perception_encoder.retrieval.columns import Column, Value, id_hashes
from perception_encoder.retrieval.exact import BLOCK, Block, Copies, exact_search, products
from perception_encoder.retrieval.parts import Part, PartError, read_part

MANIFEST = "manifest.json"
FORMAT = "perception-store-1"
PARTS = "parts"
FEW = 20_000  # rows left by a filter that are searched one by one rather than through the index
SHARE = 0.02  # the same as a share of all rows


@dataclass(frozen=True)
class PartRef:
    """A part of a version: its number, rows, and the sha256 of its file."""

    number: int
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds.

    indexed    rows the index covers, the first ones; 0 when there is none
    index      its file, with its size, and `choice`: which index it is
    deleted    the file of rows that are gone
    next_part  the number of the next part, never used before
    """

    format: str
    version: int
    width: int
    parts: tuple[PartRef, ...]
    next_part: int
    choice: Choice
    indexed: int = 0
    index: str | None = None
    index_bytes: int = 0
    deleted: str | None = None
    gone: int = 0

    @property
    def rows(self) -> int:
        return sum(part.rows for part in self.parts)


def read_manifest(folder: Path) -> Manifest:
    """Raises IndexError_ for one that is missing, damaged, or names files elsewhere."""
    path = folder / MANIFEST
    try:
        manifest = read_settings(Manifest, json.loads(path.read_text("utf-8")), str(path))
    except FileNotFoundError as error:
        raise IndexError_(f"{folder} is no store: it lacks {MANIFEST}; build one with pe.Index.build") from error
    except (OSError, ValueError) as error:
        raise IndexError_(f"{path} cannot be read: {error}") from error
    if manifest.format != FORMAT:
        raise IndexError_(f"{path} has format {manifest.format!r}; this release reads {FORMAT!r}")
    version = f"{manifest.version:06d}"
    for name, start, end in ((manifest.index, "index-", ".faiss"), (manifest.deleted, "deleted-", ".safetensors")):
        if name is not None and not (
            name.startswith(start) and name.endswith(end) and len(name) == len(start + end) + 6
        ):
            raise IndexError_(f"{path} of version {version} names {name!r}; expected a file of its own")
    if len({part.number for part in manifest.parts}) < len(manifest.parts):
        raise IndexError_(f"{path} names a part twice")
    if not 0 <= manifest.indexed <= manifest.rows or any(p.rows < 0 or p.number < 0 for p in manifest.parts):
        raise IndexError_(f"{path} does not fit together: {manifest.indexed} rows indexed of {manifest.rows}")
    return manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    with atomic_write(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(asdict(manifest), indent=1) + "\n", "utf-8")


@dataclass(frozen=True)
class _Ids:
    """Hashes of ids, sorted, with their rows."""

    hashes: np.ndarray
    rows: np.ndarray

    @classmethod
    def of(cls, hashes: np.ndarray, first: int = 0) -> "_Ids":
        order = np.argsort(hashes, kind="stable")
        return cls(hashes[order], order + first)

    def find(self, hashes: np.ndarray) -> list[np.ndarray]:
        left, right = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        return [self.rows[a:b] for a, b in zip(left, right, strict=True)]


@dataclass(frozen=True)
class Snapshot:
    """A version, opened. Nothing in it changes, so any number of threads may search it."""

    folder: Path
    manifest: Manifest
    parts: tuple[Part, ...]
    index: Any = None
    alive: np.ndarray | None = None  # n bool; None: all
    copies: Copies = field(default_factory=Copies, repr=False)  # shared with the versions before and after
    _base: list[tuple[int, _Ids]] = field(default_factory=list, repr=False)  # sorted ids of the first rows

    @classmethod
    def open(cls, folder: Path, *, before: "Snapshot | None" = None, verify: bool = False) -> "Snapshot":
        """The present version; what it shares with the one before is not opened again.

        Raises IndexError_ or PartError naming the file that is missing, damaged or does not fit.
        """
        manifest = read_manifest(folder)
        known = {part.sidecar.part: part for part in before.parts} if before else {}
        parts = []
        for ref in manifest.parts:
            part = known.get(ref.number)
            if part is None:
                part = _read(folder, ref, verify)
            if len(part.vectors) != ref.rows or part.sidecar.sha256 != ref.sha256:
                raise IndexError_(f"part {ref.number} of {folder} is not the one the store was built from")
            if ref.rows and part.vectors.shape[1] != manifest.width:
                raise IndexError_(
                    f"part {ref.number} of {folder} is {part.vectors.shape[1]} wide, not {manifest.width}"
                )
            parts.append(part)
        same = before is not None and before.manifest.index == manifest.index
        index = before.index if before is not None and same else _open_index(folder, manifest)
        base = (
            before._base if before is not None and manifest.parts[: len(before.parts)] == before.manifest.parts else []
        )
        copies = before.copies if before is not None else Copies()
        now = cls(folder, manifest, tuple(parts), index, _alive(folder, manifest), copies, list(base))
        copies.forget([block.name for block in now._blocks(None, 0)])
        copies.limit(manifest.choice.spare(manifest.rows, manifest.width))
        return now

    @cached_property
    def offsets(self) -> np.ndarray:
        """P + 1: the first row of each part, and the end."""
        return np.concatenate([[0], np.cumsum([len(part.vectors) for part in self.parts])]).astype(np.int64)

    @property
    def rows(self) -> int:
        return self.manifest.rows

    def __len__(self) -> int:
        return self.rows - self.manifest.gone

    # --- rows ---

    def locate(self, row: int) -> tuple[Part, int]:
        number = int(np.searchsorted(self.offsets, row, "right")) - 1
        return self.parts[number], row - int(self.offsets[number])

    def columns(self, row: int) -> dict[str, Value]:
        part, at = self.locate(row)
        return {name: one[at] for name, one in part.columns.items() if name != HASH}

    def vectors(self, rows: Sequence[int] | np.ndarray) -> Tensor:
        """N C float32"""
        rows = np.asarray(rows, np.int64)
        found = torch.empty(len(rows), self.manifest.width)
        numbers = np.searchsorted(self.offsets, rows, "right") - 1
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            at = torch.from_numpy(rows[here] - self.offsets[number])
            found[torch.from_numpy(here)] = self.parts[number].vectors[at].float()
        return found

    def find(self, ids: Sequence[str]) -> list[int | None]:
        """The row of each id, None where it is not there."""
        hashes = id_hashes(ids)
        tables = self._id_tables()
        found: list[int | None] = []
        for number, one in enumerate(ids):
            rows = [int(row) for table in tables for row in table.find(hashes[number : number + 1])[0]]
            live = [row for row in rows if self.alive is None or self.alive[row]]
            found.append(next((row for row in live if self.columns(row)["id"] == one), None))
        return found

    def _id_tables(self) -> list[_Ids]:
        """Sorted once for the rows there were, and again for the few that came since."""
        if not self._base or self.rows - self._base[0][0] > max(10_000, self._base[0][0] // 4):
            self._base[:] = [(self.rows, _Ids.of(self._hashes(0)))]
        first = self._base[0][0]
        return [self._base[0][1], *([_Ids.of(self._hashes(first), first)] if first < self.rows else [])]

    def _hashes(self, first: int) -> np.ndarray:
        wanted = [part for part, start in zip(self.parts, self.offsets, strict=False) if start >= first]
        return np.concatenate([np.zeros(0, np.int64), *(_part_hashes(part) for part in wanted)])

    # --- search ---

    def allowed(self, filter: filters.Filter | None) -> np.ndarray | None:
        """n bool: alive, and what the filter says; None for all."""
        conditions = filters.parse(filter)
        if not conditions:
            return self.alive
        if self.parts:
            filters.check_columns(conditions, {name for part in self.parts for name in _named(part.columns)})
        masks = [filters.mask(conditions, _named(part.columns), len(part.vectors)) for part in self.parts]
        met = np.concatenate(masks) if masks else np.zeros(0, bool)
        return met if self.alive is None else met & self.alive

    def search(
        self, queries: Tensor, k: int, allowed: np.ndarray | None = None, *, effort: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the k nearest, Q k each, best first; -inf and -1 where there are no more."""
        indexed, choice = self.manifest.indexed, self.manifest.choice
        count = self.rows if allowed is None else int(allowed.sum())
        if indexed and allowed is not None and count <= max(FEW, SHARE * self.rows):
            indexed = 0  # so few are left that looking at each is quicker, and exact
        found = [self.exact(queries, k, allowed, first=indexed)]
        if not indexed:
            return found[0]
        scores, rows = self._through_index(queries, k, allowed, choice.effort if effort is None else effort)
        there = min(k, indexed if allowed is None else int(allowed[:indexed].sum()))
        short = torch.from_numpy((rows >= 0).sum(axis=1) < there)
        found.append(self.rescore(queries, rows) if choice.rescore else (scores, rows))
        scores, rows = best(found, k)
        if bool(short.any()):  # a graph that a filter cuts into pieces
            scores[short], rows[short] = self.exact(queries[short], scores.shape[1], allowed)
        return scores, rows

    def _through_index(
        self, queries: Tensor, k: int, allowed: np.ndarray | None, effort: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores and rows of the index: Q k, more to score again. Lists that hold fewer than k rows are not the end."""
        choice, indexed = self.manifest.choice, self.manifest.indexed
        chosen = None if allowed is None else allowed[:indexed]
        wanted = min(k * max(1, choice.rescore), indexed)
        scores, rows = blocks.search(self.index, choice.kind, effort, queries.numpy(), wanted, chosen)
        there = min(k, indexed if chosen is None else int(chosen.sum()))
        short = (rows >= 0).sum(axis=1) < there
        if short.any() and effort < choice.lists:
            more = min(choice.lists, 4 * max(1, effort))
            scores[short], rows[short] = self._through_index(queries[torch.from_numpy(short)], k, allowed, more)
        return scores, rows

    def rescore(self, queries: Tensor, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The exact scores of candidates, from the stored vectors: what the codes rounded away comes back."""
        scores = np.full(rows.shape, -np.inf, np.float32)
        asked, places = np.nonzero(rows >= 0)
        scores[asked, places] = products(queries, asked, rows[asked, places], self.vectors)
        return scores, rows

    def exact(
        self, queries: Tensor, k: int, allowed: np.ndarray | None = None, *, first: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """The same by looking at every row from `first` on."""
        return exact_search(queries, self._blocks(allowed, first), k, self.vectors, self.copies)

    def _blocks(self, allowed: np.ndarray | None, first: int) -> list[Block]:
        """The rows from `first` on. Where an index does the searching no copies are made of what is left to look at."""
        found = []
        for part, start in zip(self.parts, self.offsets.tolist(), strict=False):
            for at in range(max(first - start, 0), len(part.vectors), BLOCK):
                vectors = part.vectors[at : at + BLOCK]
                keep = None if allowed is None else allowed[start + at : start + at + len(vectors)]
                if keep is None or keep.any():
                    name = (part.sidecar.part, at) if self.manifest.index is None else None
                    found.append(Block(name, start + at, vectors, keep))
        return found


HASH = "hash"


def _read(folder: Path, ref: PartRef, verify: bool) -> Part:
    try:
        return read_part(folder / PARTS, ref.number, verify=verify)
    except PartError as error:
        raise IndexError_(f"{error}; restore it from a copy, or build the index again in another folder") from error


def best(found: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several answers, Q k; of equal scores the earlier row first."""
    scores, rows = (np.concatenate(column, axis=1) for column in zip(*found, strict=True))
    scores = np.where(rows < 0, -np.inf, scores)
    order = np.lexsort((rows, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(rows, order, 1)


def _named(columns: Mapping[str, Column]) -> dict[str, Column]:
    return {name: one for name, one in columns.items() if name != HASH}


def _part_hashes(part: Part) -> np.ndarray:
    if HASH in part.columns:
        return part.columns[HASH].values
    return id_hashes([str(one) for one in part.columns["id"].to_list()])


def _open_index(folder: Path, manifest: Manifest) -> Any:
    if manifest.index is None:
        return None
    path = folder / manifest.index
    if not path.is_file() or path.stat().st_size != manifest.index_bytes:
        size = path.stat().st_size if path.is_file() else "no"
        raise IndexError_(f"{path} has {size} bytes, the store says {manifest.index_bytes}; build the index again")
    if manifest.choice.kind not in blocks.FOURCC:
        raise IndexError_(f"{folder / MANIFEST} has an index of kind {manifest.choice.kind!r}")
    return blocks.read(path, manifest.choice.kind, manifest.width, manifest.indexed)


def _alive(folder: Path, manifest: Manifest) -> np.ndarray | None:
    if manifest.deleted is None:
        return None
    path = folder / manifest.deleted
    try:
        rows = load_file(path)["rows"].numpy()
        alive = np.ones(manifest.rows, bool)
        if rows.dtype != np.int64 or len(rows) != manifest.gone or (len(rows) and rows.min() < 0):
            raise ValueError("its rows are not those the store says")
        alive[rows] = False
    except PerceptionError:
        raise
    except (SafetensorError, OSError, KeyError, ValueError, IndexError) as error:
        raise IndexError_(f"{path} cannot be read: {error}") from error
    return alive
