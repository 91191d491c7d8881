"""A vector store in a folder of one machine: parts on disk, faiss over them, one manifest that says what is true now.

Writers take turns (a lock between threads, a locked file between processes) and make new files; then one rename makes
the new version the present one. Searches hold the version they began with.

Q queries  n rows  C width
"""

import contextlib
import itertools
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from perception.errors import ConfigError, IndexError_
from perception.files import atomic_write, sweep_temporaries
from perception_encoder.retrieval import blocks
from perception_encoder.retrieval.building import build_index
from perception_encoder.retrieval.choice import Choice
from perception_encoder.retrieval.columns import Column, Value, column, id_hashes
from perception_encoder.retrieval.filters import Filter
from perception_encoder.retrieval.parts import Part, Sidecar, part_name, read_part, write_part
from perception_encoder.retrieval.store import (
    Match,
    Metadata,
    OnDuplicate,
    Rows,
    check_ids,
    check_queries,
    check_vectors,
)
from perception_encoder.retrieval.versions import (
    FORMAT,
    HASH,
    MANIFEST,
    PARTS,
    Manifest,
    PartRef,
    Snapshot,
    read_manifest,
    write_manifest,
)

log = logging.getLogger(__name__)
PART_ROWS = 8192  # of parts that merging makes
REPORT = "report.json"
UNIT = 1e-3  # how far from 1 a stored vector's length may be


@dataclass(frozen=True)
class Origin:
    """Where added vectors come from, written into their parts."""

    model: str | None = None
    fingerprint: str = ""
    preprocess: str = ""
    dtype: str = "float32"
    file_format: str = "safetensors"


class FaissStore:
    """Vectors of width C in a folder, searched exactly or through a faiss index that `optimize` builds."""

    def __init__(self, folder: str | Path, *, origin: Origin | None = None, verify: bool = False):
        """Open the store in `folder`. `verify` hashes every part.

        Raises IndexError_ or PartError naming what is missing or damaged.
        """
        blocks.faiss_module()
        self.folder, self.origin = Path(folder).absolute(), origin or Origin()
        self._lock = threading.RLock()
        self._seen = _stamp(self.folder)
        self._snapshot = Snapshot.open(self.folder, verify=verify)
        self.width = self._snapshot.manifest.width

    @classmethod
    def create(cls, folder: str | Path, width: int, *, origin: Origin | None = None) -> Self:
        """A store of the parts that lie in `folder/parts` already, or an empty one.

        The parts are checked against their sidecars; vectors that are not of length 1 are written again at length 1.
        Raises ConfigError when there is a store already, PartError for a damaged part.
        """
        blocks.faiss_module()
        folder = Path(folder).absolute()
        if (folder / MANIFEST).exists():
            raise ConfigError(f"{folder} holds a store already")
        (folder / PARTS).mkdir(parents=True, exist_ok=True)
        found = sorted(int(path.stem.removeprefix("part-")) for path in (folder / PARTS).glob("part-*.json"))
        refs = []
        for number in found:
            sidecar = _unit_part(folder / PARTS, number)
            if sidecar.rows and sidecar.width != width:
                raise IndexError_(f"part {number} of {folder} is {sidecar.width} wide, not {width}")
            refs.append(PartRef(number, sidecar.rows, sidecar.sha256))
        write_manifest(folder, Manifest(FORMAT, 1, width, tuple(refs), max(found, default=-1) + 1, Choice("flat")))
        return cls(folder, origin=origin)

    def __len__(self) -> int:
        return len(self.snapshot())

    def snapshot(self) -> Snapshot:
        """The present version, also when another process wrote it."""
        seen = _stamp(self.folder)
        if seen != self._seen:
            with self._lock:
                if seen != self._seen:
                    self._reload()
        return self._snapshot

    def _reload(self) -> None:
        for attempt in range(5):
            seen = _stamp(self.folder)
            try:
                self._snapshot, self._seen = Snapshot.open(self.folder, before=self._snapshot), seen
                return
            except (IndexError_, ValueError):
                # A writer may have removed the files of the version that was being opened.
                if attempt == 4 or _stamp(self.folder) == seen:
                    raise

    # --- writing ---

    def add(
        self,
        ids: Sequence[str],
        vectors: Tensor,
        columns: Metadata | None = None,
        *,
        on_duplicate: OnDuplicate = "error",
    ) -> int:
        """New rows, found by the very next search. See `VectorStore.add`."""
        if on_duplicate not in ("error", "replace"):
            raise ConfigError(f"on_duplicate={on_duplicate!r}; choose 'error' or 'replace'")
        ids = check_ids(ids)
        vectors = check_vectors(vectors, len(ids), self.width)
        table = _table(ids, columns or {})
        if not ids:
            return 0
        with self._writing() as now:
            there = [row for row in now.find(ids) if row is not None]
            if there and on_duplicate == "error":
                names = [str(now.columns(row)["id"]) for row in there[:3]]
                raise ConfigError(
                    f"{len(there)} ids are in the store already, such as {names}; on_duplicate='replace'?"
                )
            manifest = now.manifest
            sidecar = write_part(self.folder / PARTS, manifest.next_part, vectors, table, self.origin, [])
            ref = PartRef(sidecar.part, sidecar.rows, sidecar.sha256)
            manifest = replace(manifest, parts=(*manifest.parts, ref), next_part=manifest.next_part + 1)
            self._commit(now, self._without(manifest, now, there))
        return len(ids)

    def delete(self, ids: Sequence[str]) -> int:
        with self._writing() as now:
            rows = sorted({row for row in now.find(list(ids)) if row is not None})
            if rows:
                self._commit(now, self._without(now.manifest, now, rows))
            return len(rows)

    def merge(self) -> None:
        """Fold what was added since into the index, and forget what is gone: small parts become full ones.

        Without deletions only the new rows are written; with them, all parts and the index are.
        """
        with self._writing() as now:
            manifest = now.manifest
            clean = now.alive is None
            full = [ref.rows for ref in itertools.takewhile(lambda ref: ref.rows >= PART_ROWS // 2, manifest.parts)]
            first = (manifest.indexed or sum(full)) if clean else 0
            kept = [ref for ref, start in zip(manifest.parts, now.offsets, strict=False) if start + ref.rows <= first]
            kept_rows = sum(ref.rows for ref in kept)
            refs, number = list(kept), manifest.next_part
            for ref in self._rewritten(now, kept_rows, number):
                refs.append(ref)
                number = ref.number + 1
            merged = replace(manifest, parts=tuple(refs), next_part=number, deleted=None, gone=0)
            merged = replace(merged, version=manifest.version + 1)
            if manifest.index is not None:
                merged = self._folded(now, merged, clean=clean)
            self._commit(now, merged)

    def _rewritten(self, now: Snapshot, first: int, number: int) -> Iterator[PartRef]:
        """Parts of PART_ROWS with the rows from `first` on that are alive."""
        for rows in _batches(now, first, PART_ROWS):
            stamp = now.locate(int(rows[0]))[0].sidecar
            origin = replace(self.origin, model=stamp.model, fingerprint=stamp.fingerprint, preprocess=stamp.preprocess)
            table = _merged_columns(now, rows)
            made = write_part(self.folder / PARTS, number, now.vectors(rows), table, origin, [])
            yield PartRef(number, made.rows, made.sha256)
            number += 1

    def _folded(self, now: Snapshot, merged: Manifest, *, clean: bool) -> Manifest:
        name = f"index-{merged.version:06d}.faiss"
        parts = [_open(self.folder, ref) for ref in merged.parts]
        old = self.folder / str(now.manifest.index)
        if clean and now.manifest.choice.kind != "hnsw":
            trained = self.folder / f"trained-{merged.version:06d}.faiss"
            block = self.folder / f"block-{merged.version:06d}.faiss"
            empty = blocks.read(old, merged.choice.kind, self.width, now.manifest.indexed, mapped=False)
            empty.reset()
            blocks.write(empty, trained)
            blocks.write(blocks.fill(empty, _rows_of(parts, now.manifest.indexed)), block)
            blocks.merge(trained, [old, block], self.folder / name)
            trained.unlink()
            block.unlink()
        else:
            index = blocks.read(old, merged.choice.kind, self.width, now.manifest.indexed, mapped=False)
            if not clean and merged.choice.kind == "hnsw":  # a graph does not forget
                index = blocks.train(merged.choice, np.zeros((0, self.width), np.float32), self.width)
            elif not clean:
                index.reset()
            blocks.write(blocks.fill(index, _rows_of(parts, now.manifest.indexed if clean else 0)), self.folder / name)
        rows = sum(ref.rows for ref in merged.parts)
        return replace(merged, index=name, indexed=rows, index_bytes=(self.folder / name).stat().st_size)

    def optimize(self, *, queries: Tensor | None = None, **budget: Any) -> dict[str, Any]:
        """Choose, build, tune and measure an index for the rows there are; the report, which is also in `report.json`.

        budget   kind="auto", max_memory=, max_latency=, target_recall=, as `pe.Index.build` takes them
        queries  Q C, such as texts: recall is measured on them too, and the poorer of the two counts
        """
        if self.snapshot().alive is not None:
            self.merge()
        with self._writing() as now:
            version = now.manifest.version + 1
            name = f"index-{version:06d}.faiss"
            choice, report = build_index(now, self.folder / name, queries=queries, **budget)
            built = choice.kind != "flat"
            manifest = replace(
                now.manifest,
                choice=choice,
                index=name if built else None,
                indexed=now.rows if built else 0,
                index_bytes=(self.folder / name).stat().st_size if built else 0,
            )
            with atomic_write(self.folder / REPORT) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
            self._commit(now, manifest)
        return report

    def report(self) -> dict[str, Any] | None:
        """What `optimize` measured, None when it never ran."""
        path = self.folder / REPORT
        try:
            return json.loads(path.read_text("utf-8")) if path.is_file() else None
        except ValueError as error:
            raise IndexError_(f"{path} cannot be read: {error}") from error

    def _without(self, manifest: Manifest, now: Snapshot, rows: Sequence[int]) -> Manifest:
        """The manifest with these rows gone too."""
        if not rows:
            return manifest
        before = np.flatnonzero(~now.alive) if now.alive is not None else np.zeros(0, np.int64)
        gone = np.union1d(before, np.asarray(rows, np.int64)).astype(np.int64)
        name = f"deleted-{manifest.version + 1:06d}.safetensors"
        with atomic_write(self.folder / name) as temporary:
            save_file({"rows": torch.from_numpy(gone)}, temporary)
        return replace(manifest, deleted=name, gone=len(gone))

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Snapshot]:
        """The present version, and nobody else writes."""
        with self._lock, _locked(self.folder / ".lock") as alone:
            # What a killed writer left behind; where nobody can tell whether it was killed, time has to.
            sweep_temporaries(self.folder, older_than=0 if alone else 3600)
            yield self.snapshot()

    def _commit(self, now: Snapshot, manifest: Manifest) -> None:
        manifest = replace(manifest, version=now.manifest.version + 1)
        write_manifest(self.folder, manifest)
        self._reload()
        self._clean(manifest)

    def _clean(self, manifest: Manifest) -> None:
        """Remove what no version names any more. Whoever has it open keeps it until they close it."""
        for pattern, wanted in (
            ("index-*.faiss", {manifest.index}),
            ("deleted-*.safetensors", {manifest.deleted}),
            ("block-*.faiss", set()),
            ("trained-*.faiss", set()),
        ):
            for path in self.folder.glob(pattern):
                if path.name not in wanted:
                    path.unlink(missing_ok=True)
        names = {part_name(ref.number) for ref in manifest.parts}
        for path in (self.folder / PARTS).glob("part-*"):
            if path.stem not in names:
                path.unlink(missing_ok=True)
        sweep_temporaries(self.folder / PARTS, older_than=3600)

    # --- reading ---

    def search(
        self, queries: Tensor, k: int, *, filter: Filter | None = None, effort: int | None = None
    ) -> list[list[Match]]:
        """See `VectorStore.search`; `effort` is how hard an index searches (nprobe, efSearch), as tuned by default."""
        queries = check_queries(queries, k, self.width, self.origin.model)
        now = self.snapshot()
        allowed = now.allowed(filter)
        scores, rows = now.search(queries, min(k, max(1, now.rows)), allowed, effort=effort)
        return [
            [_match(now, int(row), float(score)) for row, score in zip(r, s, strict=True) if row >= 0]
            for r, s in zip(rows, scores, strict=True)
        ]

    def get(self, ids: Sequence[str]) -> Rows:
        now = self.snapshot()
        rows = now.find(ids)
        if missing := [one for one, row in zip(ids, rows, strict=True) if row is None]:
            raise LookupError(f"{len(missing)} ids are not in the index, such as {missing[0]!r}")
        return _rows_at(now, np.array([row for row in rows if row is not None], np.int64))

    def scan(self, batch: int = 8192) -> Iterator[Rows]:
        now = self.snapshot()
        return (_rows_at(now, rows) for rows in _batches(now, 0, batch))

    def stats(self) -> dict[str, Any]:
        now = self.snapshot()
        manifest = now.manifest
        return {
            "store": "faiss",
            "rows": len(now),
            "width": self.width,
            "version": manifest.version,
            "parts": len(manifest.parts),
            "index": asdict(manifest.choice),
            "indexed": manifest.indexed,
            "searched one by one": now.rows - manifest.indexed,
            "deleted": manifest.gone,
            "memory": manifest.choice.bytes(now.rows, self.width),
        }


def _match(now: Snapshot, row: int, score: float) -> Match:
    known = now.columns(row)
    return Match(str(known.pop("id")), score, known)


def _rows_at(now: Snapshot, rows: np.ndarray) -> Rows:
    known = [now.columns(int(row)) for row in rows]
    names = dict.fromkeys(name for one in known for name in one if name != "id")
    return Rows(
        [str(one["id"]) for one in known], now.vectors(rows), {name: [one.get(name) for one in known] for name in names}
    )


def _batches(now: Snapshot, first: int, size: int) -> Iterator[np.ndarray]:
    """Rows that are alive, from `first` on, `size` at a time."""
    rows = np.arange(first, now.rows) if now.alive is None else np.flatnonzero(now.alive[first:]) + first
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _merged_columns(now: Snapshot, rows: np.ndarray) -> dict[str, Column]:
    found = _rows_at(now, rows)
    return _table(found.ids, found.columns)


def _table(ids: Sequence[str], columns: Mapping[str, Sequence[Value]]) -> dict[str, Column]:
    table = {"id": column(ids), HASH: Column(id_hashes(ids))}
    for name, values in columns.items():
        if name in table:
            raise ConfigError(f"a column may not be called {name!r}")
        if len(values) != len(ids):
            raise ConfigError(f"column {name!r} has {len(values)} values for {len(ids)} ids")
        table[name] = column(values)
    return table


def _unit_part(folder: Path, number: int) -> Sidecar:
    """The sidecar of a part that was checked, byte by byte, and whose vectors have length 1: written again if not."""
    part = read_part(folder, number, verify=True)
    if not part.sidecar.rows:
        return part.sidecar
    lengths = part.vectors.float().norm(dim=1)
    if not bool(lengths.isfinite().all()) or float(lengths.min()) == 0:
        raise IndexError_(f"{folder / part.sidecar.file} holds vectors that are zero, infinite or not numbers")
    unit = float((lengths - 1).abs().max()) < UNIT
    if unit and part.sidecar.file.endswith(".safetensors"):
        return part.sidecar
    facts = part.sidecar
    origin = Origin(facts.model, facts.fingerprint, facts.preprocess, facts.dtype)
    vectors = part.vectors if unit else F.normalize(part.vectors.float(), dim=1)
    table = {name: one for name, one in part.columns.items() if name != HASH}
    ids = [str(one) for one in table["id"].to_list()]
    made = write_part(folder, number, vectors, {**table, HASH: Column(id_hashes(ids))}, origin, list(facts.failures))
    if facts.file != made.file:
        (folder / facts.file).unlink()
    return made


def _open(folder: Path, ref: PartRef) -> Part:
    return read_part(folder / PARTS, ref.number)


def _rows_of(parts: Sequence[Part], first: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, vectors) from row `first` on, a part at a time."""
    start = 0
    for part in parts:
        lo = max(first - start, 0)
        if lo < len(part.vectors):
            rows = np.arange(start + lo, start + len(part.vectors))
            yield rows, part.vectors[lo:].float().numpy()
        start += len(part.vectors)


def _stamp(folder: Path) -> tuple[int, int, int]:
    """Changes whenever the manifest is replaced."""
    try:
        found = os.stat(folder / MANIFEST)  # noqa: PTH116 - the quickest way, at every search
    except FileNotFoundError:
        read_manifest(folder)  # says what is wrong
        raise
    return found.st_ino, found.st_mtime_ns, found.st_size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """One process at a time; the system lets go when a process ends, however it ends. False: there is no such lock."""
    with path.open("w") as file:
        try:
            import fcntl
        except ImportError:  # one process must do the writing
            yield False
            return
        fcntl.flock(file, fcntl.LOCK_EX)
        yield True
