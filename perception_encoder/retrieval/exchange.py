"""Vectors from other tools and for them: clip-retrieval's folders, and `.npy` beside Parquet.

clip-retrieval (https://github.com/rom1504/clip-retrieval, "Clip inference"): `img_emb/img_emb_0.npy`,
`text_emb/text_emb_0.npy` and `metadata/metadata_0.parquet` with the same rows; autofaiss and embedding-reader read the
same. Arrays are read without pickle: a file with objects in it is refused.

N rows  C width
"""

import itertools
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from perception.errors import CheckpointError, ConfigError
from perception.files import atomic_write
from perception_encoder.retrieval.columns import Column, column, id_hashes
from perception_encoder.retrieval.embed import embedding_width, fingerprint
from perception_encoder.retrieval.index import UNKNOWN
from perception_encoder.retrieval.parts import (
    PLAN_FORMAT,
    PartFailure,
    Parts,
    Plan,
    _arrow,
    is_finished,
    write_part,
    write_plan,
)
from perception_encoder.retrieval.store import VectorStore

log = logging.getLogger(__name__)
Which = Literal["image", "text"]
EMBEDDINGS = {"image": ("img_emb", "img_emb_"), "text": ("text_emb", "text_emb_")}
PATHS = ("image_path", "path", "file", "file_name", "url")
CAPTIONS = ("caption", "text")
OWN = ("inside", "width", "height", "start", "end")  # columns every part may have
AT_ONCE = 65536


class Pair(NamedTuple):
    """An array of vectors and the table that says what its rows are; no table: numbers alone."""

    vectors: Path
    table: Path | None


def import_vectors(
    source: str | Path,
    out: str | Path,
    *,
    model: Any = None,
    which: Which = "image",
    roots: tuple[str, ...] = (),
    part_rows: int = 8192,
    dtype: str = "float32",
) -> Parts:
    """Parts of vectors another tool made; `pe.Index.build(out, model=..., out=...)` indexes them.

    source  a folder of clip-retrieval's, a `.npy` with a `.parquet` of the same name, or a folder of such pairs
    model   the model that made them: you vouch for it. Without one the index answers vectors alone
    which   "image" or "text", for clip-retrieval's folders
    roots   folders whose pictures may be opened to show results

    Raises CheckpointError when an array cannot be read without pickle or its table has another number of rows,
    ConfigError for a model whose embeddings are of another width.
    """
    pairs = find_pairs(Path(source), which)
    shapes = [(pair, _open(pair.vectors).shape) for pair in pairs]
    for pair, shape in shapes:
        if model is not None and (theirs := embedding_width(model)) and theirs != shape[1]:
            raise ConfigError(
                f"{pair.vectors} holds vectors of {shape[1]}; the model given makes {theirs}; "
                "give the one that made them, or none"
            )
    chunks = [
        {"array": str(pair.vectors), "table": str(pair.table) if pair.table else None, "start": start, "rows": rows}
        for pair, shape in shapes
        for start in range(0, shape[0], part_rows)
        for rows in [min(part_rows, shape[0] - start)]
    ]
    plan = Plan(
        format=PLAN_FORMAT,
        kind=which,
        source={"type": "imported", "roots": list(roots)},
        parts=0,
        rows=None,
        part_rows=part_rows,
        batch_size=1,
        normalize=True,
        dtype=dtype,
        file_format="safetensors",
        model=getattr(model, "source", None),
        fingerprint=UNKNOWN if model is None else fingerprint(model),
        preprocess=UNKNOWN if model is None else str(model.preprocess.fingerprint()),
        chunks="chunks-.jsonl",
    )
    for pair, shape in shapes:
        _check_rows(pair, shape)
    folder = Path(out)
    plan = write_plan(folder, plan, lambda: iter(chunks))
    for number, chunk in enumerate(chunks):
        if not is_finished(folder, number, verify=True):
            _import_chunk(folder, number, chunk, plan)
    return Parts(folder)


def find_pairs(source: Path, which: Which) -> list[Pair]:
    """Arrays and their tables, in the order of their numbers."""
    folder, start = EMBEDDINGS[which]
    if (source / folder).is_dir():
        found = sorted((source / folder).glob(f"{start}*.npy"), key=_number)
        tables = [source / "metadata" / f"metadata_{path.stem.removeprefix(start)}.parquet" for path in found]
    elif source.is_dir():
        found = sorted(source.glob("*.npy"), key=_number)
        tables = [path.with_suffix(".parquet") for path in found]
    else:
        found, tables = [source], [source.with_suffix(".parquet")]
    if not found or not found[0].is_file():
        raise ConfigError(f"{source} holds no vectors: expected {folder}/{start}0.npy, or .npy files")
    return [Pair(path, table if table.is_file() else None) for path, table in zip(found, tables, strict=True)]


def _number(path: Path) -> tuple[int, str]:
    found = re.search(r"(\d+)$", path.stem)
    return int(found[1]) if found else -1, path.name


def _open(path: Path) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        why = str(error).splitlines()[0]
        raise CheckpointError(f"{path} cannot be read as an array of numbers: {why}") from error
    if array.ndim != 2 or array.dtype.kind != "f":
        raise CheckpointError(f"{path} holds {array.dtype} {array.shape}; expected floats, rows by width")
    return array


def _check_rows(pair: Pair, shape: tuple[int, ...]) -> None:
    if pair.table is None:
        return
    _, pq = _arrow()
    rows = pq.ParquetFile(pair.table).metadata.num_rows
    if rows != shape[0]:
        raise CheckpointError(
            f"{pair.vectors} has {shape[0]} rows, {pair.table} has {rows}; they do not belong together"
        )


def _import_chunk(folder: Path, number: int, chunk: dict[str, Any], plan: Plan) -> None:
    start, stop = chunk["start"], chunk["start"] + chunk["rows"]
    vectors = torch.from_numpy(np.array(_open(Path(chunk["array"]))[start:stop], np.float32))
    good = (vectors.isfinite().all(dim=1) & (vectors != 0).any(dim=1)).tolist()
    columns = _table_columns(chunk, start, stop)
    kept = [row for row, ok in enumerate(good) if ok]
    if len(kept) < len(good):
        columns = {name: one.take(kept) for name, one in columns.items()}
    failures = [
        PartFailure(row, f"{chunk['array']}#{start + row}", "the vector is zero, infinite or not a number")
        for row, ok in enumerate(good)
        if not ok
    ]
    columns["hash"] = Column(id_hashes([str(one) for one in columns["id"].to_list()]))
    write_part(folder, number, F.normalize(vectors[kept], dim=1), columns, plan, failures)


def _table_columns(chunk: dict[str, Any], start: int, stop: int) -> dict[str, Column]:
    names = [f"{Path(chunk['array']).stem}#{row}" for row in range(start, stop)]
    if chunk["table"] is None:
        return {"id": column(names), "source": column(names), "inside": column([""] * len(names))}
    _, pq = _arrow()
    table = pq.read_table(chunk["table"]).slice(start, stop - start)
    data = {name: table[name].to_pylist() for name in table.column_names}
    caption = next((name for name in CAPTIONS if name in data), None)
    path = next((name for name in PATHS if name in data), None)
    sources = [str(one) if one else name for one, name in zip(data[path], names, strict=True)] if path else names
    ids = [str(one) for one in data["id"]] if "id" in data else names if path is None else sources
    found = {"id": column(ids), "source": column(sources), "inside": column([""] * len(names))}
    if caption:
        found["text"] = column(None if one is None else str(one) for one in data[caption])
    rest = [name for name in data if name not in (caption, path, "id", "hash")]
    return found | {name if name in OWN else f"meta.{name}": column(data[name]) for name in rest}


# --- out -------------------------------------------------------------------------------------------------------------


def export_vectors(
    store: VectorStore,
    out: str | Path,
    *,
    layout: Literal["clip-retrieval", "npy"] = "clip-retrieval",
    which: Which = "image",
    rows: int = 10**6,
) -> dict[str, int]:
    """Write a store's vectors for other tools: float16 `.npy` and Parquet, `rows` a file. How many files and rows.

    layout  "clip-retrieval": img_emb/img_emb_0.npy and metadata/metadata_0.parquet; "npy": vectors_0.npy beside
            vectors_0.parquet, float32
    which   what the vectors are of: of "text" clip-retrieval's names are text_emb/text_emb_0.npy

    Raises ConfigError for a folder that holds an export already.
    """
    if layout not in ("clip-retrieval", "npy"):
        raise ConfigError(f"layout={layout!r}; choose clip-retrieval or npy")
    out, total, files = Path(out), 0, 0
    if old := next(itertools.chain(out.glob("vectors_*.npy"), out.glob("*_emb/*.npy")), None):
        raise ConfigError(f"{out} holds an export already ({old.name}); use another folder")
    for number, (vectors, columns) in enumerate(_files(store, rows)):
        if layout == "clip-retrieval":
            name, start = EMBEDDINGS[which]
            array, table = out / name / f"{start}{number}.npy", out / "metadata" / f"metadata_{number}.parquet"
            renamed = {"image_path": columns.pop("source", columns["id"]), "caption": columns.pop("text", None)}
            columns = {name: values for name, values in renamed.items() if values is not None} | columns
            vectors = vectors.astype(np.float16)
        else:
            array, table = out / f"vectors_{number}.npy", out / f"vectors_{number}.parquet"
            columns = {"path": columns.pop("source", columns["id"]), **columns}
        with atomic_write(array) as temporary, temporary.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        pa, pq = _arrow()
        with atomic_write(table) as temporary:
            pq.write_table(pa.table({name: pa.array(values) for name, values in columns.items()}), temporary)
        total, files = total + len(vectors), files + 1
    return {"files": files, "rows": total}


def _files(store: VectorStore, rows: int) -> Iterator[tuple[np.ndarray, dict[str, list[Any]]]]:
    """All of a store, `rows` at a time."""
    ids: list[str] = []
    vectors: list[np.ndarray] = []
    columns: dict[str, list[Any]] = {}
    for some in store.scan(min(rows, AT_ONCE)):
        for name in {**columns, **some.columns}:
            before = columns.setdefault(name, [None] * len(ids))
            before += some.columns.get(name, [None] * len(some.ids))
        ids += some.ids
        vectors.append(some.vectors.numpy())
        if len(ids) >= rows:
            yield np.concatenate(vectors), {"id": ids, **_bare(columns)}
            ids, vectors, columns = [], [], {}
    if ids:
        yield np.concatenate(vectors), {"id": ids, **_bare(columns)}


def _bare(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Names as they came in."""
    found = {name.removeprefix("meta."): values for name, values in columns.items()}
    return {name: values for name, values in found.items() if any(not _empty(value) for value in values)}


def _empty(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))
