"""A vector store in LanceDB: for collections beyond one machine's disk, on object storage, with its own versions.

Columns keep their names in a form Lance takes; the search is exact until `optimize` builds an index there.

Q queries  N rows  C width
"""

import re
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from perception.errors import ConfigError, IndexError_, missing_extra
from perception_encoder.retrieval import filters
from perception_encoder.retrieval.choice import TARGET_RECALL
from perception_encoder.retrieval.columns import Value, column
from perception_encoder.retrieval.filters import Filter
from perception_encoder.retrieval.store import (
    Match,
    Metadata,
    OnDuplicate,
    Rows,
    check_ids,
    check_queries,
    check_vectors,
)

TABLE = "rows"
AT_ONCE = 500  # ids in one condition


class LanceStore:
    """Vectors of width C in a LanceDB table; `address` is a folder or what `lancedb.connect` takes, such as s3://..."""

    def __init__(self, address: str | Path):
        lancedb = _lancedb()
        try:
            self._table = lancedb.connect(str(address), read_consistency_interval=timedelta(0)).open_table(TABLE)
            self.width = int(self._table.schema.field("vector").type.list_size)
        except (ValueError, OSError, RuntimeError, KeyError, AttributeError) as error:
            raise IndexError_(f"{address} is no store of LanceDB: {str(error).splitlines()[0][:200]}") from error
        self.address, self._lock = str(address), threading.Lock()

    @classmethod
    def create(cls, address: str | Path, width: int) -> Self:
        """An empty store. Raises ConfigError when there is one already."""
        import pyarrow as pa

        database = _lancedb().connect(str(address))
        if TABLE in _tables(database):
            raise ConfigError(f"{address} holds a store already")
        schema = pa.schema([("id", pa.string()), ("vector", pa.list_(pa.float32(), width))])
        database.create_table(TABLE, schema=schema)
        return cls(address)

    def __len__(self) -> int:
        return int(self._table.count_rows())

    def add(
        self,
        ids: Sequence[str],
        vectors: Tensor,
        columns: Metadata | None = None,
        *,
        on_duplicate: OnDuplicate = "error",
    ) -> int:
        import pyarrow as pa

        if on_duplicate not in ("error", "replace"):
            raise ConfigError(f"on_duplicate={on_duplicate!r}; choose 'error' or 'replace'")
        ids = check_ids(ids)
        vectors = check_vectors(vectors, len(ids), self.width)
        if any(len(values) != len(ids) for values in (columns or {}).values()):
            raise ConfigError(f"every column needs {len(ids)} values, one an id")
        if not ids:
            return 0
        flat = pa.array(vectors.flatten().numpy())
        data = {"id": pa.array(ids), "vector": pa.FixedSizeListArray.from_arrays(flat, self.width)}
        data |= {_theirs(name): _array(column(values)) for name, values in (columns or {}).items()}
        with self._lock:
            there = self._present(ids)
            if there and on_duplicate == "error":
                raise ConfigError(
                    f"{len(there)} ids are in the store already, such as {there[:3]}; on_duplicate='replace'?"
                )
            known = {field.name: field.type for field in self._table.schema}
            if new := [pa.field(name, array.type) for name, array in data.items() if name not in known]:
                self._table.add_columns(pa.schema(new))
            table = pa.table(data)
            for name in known.keys() - data.keys():
                table = table.append_column(name, pa.nulls(len(ids), known[name]))
            try:
                table = table.select(self._table.schema.names).cast(self._table.schema)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise ConfigError(f"a column has another type than before: {error}") from error
            self._table.merge_insert("id").when_matched_update_all().when_not_matched_insert_all().execute(table)
        return len(ids)

    def delete(self, ids: Sequence[str]) -> int:
        with self._lock:
            return sum(int(self._table.delete(where).num_deleted_rows) for where in _among(ids))

    def search(self, queries: Tensor, k: int, *, filter: Filter | None = None) -> list[list[Match]]:
        queries = check_queries(queries, k, self.width)
        conditions, names = filters.parse(filter), self._names()
        if not (rows := len(self)):
            return [[] for _ in queries]
        filters.check_columns(conditions, names)
        where = filters.sql(conditions, names)
        # Rows past 2^31 are no answer to any question, and Lance would reserve room for them.
        return [self._search(query.numpy(), min(k, rows), where) for query in queries]

    def _search(self, query: np.ndarray, k: int, where: str) -> list[Match]:
        asked = self._table.search(query).distance_type("cosine").limit(k)
        if where:
            asked = asked.where(where, prefilter=True)
        return [_match(row) for row in asked.to_arrow().drop_columns("vector").to_pylist()]

    def get(self, ids: Sequence[str]) -> Rows:
        found: dict[str, Any] = {}
        for where in _among(ids):
            rows = _rows(self._table.search().where(where).limit(AT_ONCE).to_arrow())
            found |= {one: (rows, at) for at, one in enumerate(rows.ids)}
        if missing := [one for one in ids if one not in found]:
            raise LookupError(f"{len(missing)} ids are not in the index, such as {missing[0]!r}")
        names = dict.fromkeys(name for rows, _ in found.values() for name in rows.columns)
        vectors = (
            torch.stack([found[one][0].vectors[found[one][1]] for one in ids]) if ids else torch.empty(0, self.width)
        )
        return Rows(
            list(ids),
            vectors,
            {name: [found[one][0].columns.get(name, [None])[found[one][1]] for one in ids] for name in names},
        )

    def scan(self, batch: int = 8192) -> Iterator[Rows]:
        import pyarrow as pa

        for some in self._table.search().limit(max(1, len(self))).to_batches(batch):
            yield _rows(pa.table(some))

    def optimize(self, **budget: Any) -> dict[str, Any]:
        """Let Lance put its files in order, and build its IVF-PQ index where there are enough rows for one.

        Raises ConfigError for budgets: Lance chooses its own index.
        """
        check_budget(**budget)
        self._table.optimize()
        indexed = len(self) >= 100_000
        if indexed:
            self._table.create_index(metric="cosine", vector_column_name="vector")
        return {"rows": len(self), "width": self.width, "index": {"kind": "lance ivf-pq" if indexed else "flat"}}

    def stats(self) -> dict[str, Any]:
        return {"store": "lance", "rows": len(self), "width": self.width, "version": self._table.version}

    def _present(self, ids: Sequence[str]) -> list[str]:
        found: list[str] = []
        for where in _among(ids):
            found += self._table.search().where(where).select(["id"]).limit(AT_ONCE).to_arrow()["id"].to_pylist()
        return found

    def _names(self) -> dict[str, str]:
        return {_ours(name): name for name in self._table.schema.names if name != "vector"}


def check_budget(
    *,
    kind: str = "auto",
    max_memory: Any = None,
    max_latency: Any = None,
    target_recall: float = TARGET_RECALL,
    queries: Any = None,
) -> None:
    """Raises ConfigError for anything but the defaults: nothing that was asked for is left out in silence."""
    budgets = (max_memory, max_latency, queries)
    if kind != "auto" or target_recall != TARGET_RECALL or any(budget is not None for budget in budgets):
        raise ConfigError("LanceDB chooses its own index: kind, budgets, recall and queries are for store='faiss'")


def _lancedb() -> Any:
    try:
        import lancedb
    except ImportError as error:
        raise missing_extra("lancedb", "lance", str(error)) from error
    return lancedb


def _tables(database: Any) -> list[str]:
    found = database.list_tables()
    return list(getattr(found, "tables", found))


def _theirs(name: str) -> str:
    """A name of letters, digits and escapes: Lance reads dots as nesting."""
    return re.sub(r"[^A-Za-z0-9]", lambda found: f"_{ord(found[0]):x}_", name)


def _ours(name: str) -> str:
    return re.sub(r"_([0-9a-f]+)_", lambda found: chr(int(found[1], 16)), name)


def _array(one: Any) -> Any:
    import pyarrow as pa

    array = one.arrow()
    return array.cast(pa.string()) if one.offsets is not None else array


def _among(ids: Sequence[str]) -> Iterator[str]:
    for start in range(0, len(ids), AT_ONCE):
        listed = ", ".join("'" + one.replace("'", "''") + "'" for one in ids[start : start + AT_ONCE])
        yield f"id IN ({listed})"


def _match(row: dict[str, Any]) -> Match:
    score = 1.0 - row.pop("_distance")
    return Match(
        row.pop("id"), score, {_ours(name): value for name, value in row.items() if not name.startswith("_row")}
    )


def _rows(table: Any) -> Rows:
    lists = table["vector"].combine_chunks()
    vectors = torch.from_numpy(np.array(lists.flatten())).view(len(table), -1)
    columns: dict[str, list[Value]] = {
        _ours(name): table[name].to_pylist() for name in table.column_names if name not in ("id", "vector", "_rowid")
    }
    return Rows(table["id"].to_pylist(), vectors, columns)
