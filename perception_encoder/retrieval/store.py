"""The seam for places that keep vectors and find the nearest: faiss on one machine, LanceDB beyond it, or yours.

Vectors are kept at length 1, so a dot product is a cosine.

Q queries  N rows  C width
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError, IndexError_
from perception_encoder.retrieval.columns import Value
from perception_encoder.retrieval.filters import Filter

OnDuplicate = Literal["error", "replace"]
Metadata = Mapping[str, Sequence[Value]]


class Match(NamedTuple):
    """A row that was found: its id, its cosine, and what is known of it."""

    id: str
    score: float
    columns: dict[str, Value]


class Rows(NamedTuple):
    """Some rows: N ids, N C vectors, and columns of N values."""

    ids: list[str]
    vectors: Tensor
    columns: dict[str, list[Value]]


@runtime_checkable
class VectorStore(Protocol):
    """What `Index` needs of a store. A class that fits this shape is one; it inherits nothing from us.

    Writers exclude each other; every search sees one whole version, with all of an `add` or none of it.
    """

    width: int  # C

    def __len__(self) -> int: ...

    def add(
        self,
        ids: Sequence[str],
        vectors: Tensor,
        columns: Metadata | None = None,
        *,
        on_duplicate: OnDuplicate = "error",
    ) -> int:
        """Raises ConfigError for ids that are there already or come twice, unless they are to be replaced."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """How many there were; ids that are not there are no error."""
        ...

    def search(self, queries: Tensor, k: int, *, filter: Filter | None = None) -> list[list[Match]]:
        """The k nearest rows of each of the queries Q C, best first; fewer when there are no more."""
        ...

    def get(self, ids: Sequence[str]) -> Rows:
        """Raises LookupError naming an id that is not there."""
        ...

    def scan(self, batch: int = 8192) -> Iterator[Rows]:
        """All rows, a few at a time."""
        ...

    def stats(self) -> dict[str, Any]: ...


def check_vectors(vectors: Tensor, rows: int, width: int) -> Tensor:
    """N C float32 of length 1.

    Raises IndexError_ for another shape, ConfigError for vectors without a direction: zero, infinite, not a number.
    """
    if vectors.ndim != 2 or vectors.shape != (rows, width):
        raise IndexError_(f"vectors are {tuple(vectors.shape)}; expected {rows} rows of {width}, one an id")
    vectors = vectors.detach().float().cpu()
    good = vectors.isfinite().all(dim=1) & (vectors != 0).any(dim=1)
    if not bool(good.all()):
        bad = (~good).nonzero().flatten().tolist()
        raise ConfigError(f"{len(bad)} vectors are zero, infinite or not numbers, such as row {bad[0]}; leave them out")
    return F.normalize(vectors, dim=1)


def check_queries(queries: Tensor, k: int, width: int, model: str | None = None) -> Tensor:
    """Q C float32 of length 1. Raises ValueError for k below 1, IndexError_ for queries that do not fit."""
    if k < 1:
        raise ValueError(f"k={k}; ask for at least one picture")
    if queries.ndim != 2 or queries.shape[1] != width:
        given = tuple(queries.shape[1:]) if queries.ndim == 2 else tuple(queries.shape)
        raise IndexError_(
            f"the query has {given} numbers, the index {width} (model {model}); was it made by another model?"
        )
    queries = queries.detach().float().cpu()
    if not bool(queries.isfinite().all()):
        raise ValueError("the query has NaN or infinity in it")
    if bool((queries == 0).all(dim=1).any()):
        raise ValueError("the query is zero: it has no direction to look in")
    return F.normalize(queries, dim=1)


def check_ids(ids: Sequence[str]) -> list[str]:
    """Raises ConfigError for ids that are no text or come twice."""
    listed = list(ids)
    if bad := [one for one in listed if not isinstance(one, str) or not one]:
        raise ConfigError(f"ids are texts; given {bad[0]!r}")
    if len(set(listed)) < len(listed):
        seen: set[str] = set()
        twice = next(one for one in listed if one in seen or seen.add(one))  # type: ignore[func-returns-value]
        raise ConfigError(f"the id {twice!r} comes twice")
    return listed
