"""A folder of pictures that answers sentences, pictures and vectors.

    index.json   which model made the vectors, and how
    store/       the vectors: `retrieval.faiss_store`, or `retrieval.lance_store`

N pictures  Q queries  C embedding width
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError, IndexError_, MediaError
from perception.files import atomic_write
from perception.media import PICTURE_SUFFIXES, describe
from perception.settings import read_settings
from perception_encoder.retrieval.embed import embed, embed_texts, fingerprint

INDEX = "index.json"
STORE = "store"
FORMAT = "perception-index-2"
UNKNOWN = "unknown"  # the fingerprint of vectors nobody vouches for
EXAMPLES = (list, tuple)


class Hit(NamedTuple):
    """A picture that was found.

    path     the file it is in
    score    cosine with the query
    id       its name in the index; for a picture in a file of its own, the path
    inside   which of the things in that file, "" for all of it
    text     a caption that came with it
    size     width and height, (0, 0) where they are not known
    span     seconds, for a piece of a video
    metadata what else came with it
    """

    path: str
    score: float
    id: str
    inside: str = ""
    text: str | None = None
    size: tuple[int, int] = (0, 0)
    span: tuple[float, float] | None = None
    metadata: dict[str, Any] = {}  # noqa: RUF012 - a named tuple's default is never changed here


@dataclass(frozen=True)
class IndexFacts:
    """What `index.json` holds.

    model   what `load_clip` was given, None for a model that was built by hand
    kind    what the model was shown: "image", "text" or "clip"
    roots   the folders the pictures lie in; nothing outside them is opened to show a result
    """

    format: str
    fingerprint: str
    preprocess: str
    model: str | None
    width: int
    kind: str
    store: Literal["faiss", "lance"]
    roots: tuple[str, ...]


class Index:
    """Vectors of pictures in a store, with the fingerprint of the model that made them."""

    def __init__(self, store: Any, facts: IndexFacts, folder: Path, model: Any = None):
        self.store, self.facts, self.folder, self._model = store, facts, folder, model

    def __len__(self) -> int:
        return len(self.store)

    # --- building ---

    @classmethod
    def build(
        cls,
        source: Any,
        model: Any,
        out: str | Path,
        *,
        store: Literal["faiss", "lance"] = "faiss",
        kind: str = "auto",
        max_memory: str | int | None = None,
        max_latency: float | None = None,
        target_recall: float = 0.95,
        queries: Sequence[str] | Tensor | None = None,
        **settings: Any,
    ) -> Self:
        """Embed pictures and write an index of them to the folder `out`.

        source         a folder, paths, tars, Parquet, videos or texts (`retrieval.sources.as_source`), or a folder of
                       parts that `pe.embed(..., out=)` wrote
        model          a CLIP model or an encoder, or the name, hub id or folder of one
        store          "faiss" (a folder on this machine) or "lance" (LanceDB)
        max_memory     bytes, or "8GB": what a search may keep in memory
        max_latency    seconds of one query
        target_recall  share of the 10 nearest that must be found
        kind           "auto", or one of flat, ivf-flat, ivf-sq8, ivf-pq, hnsw
        queries        texts or Q C vectors to measure recall with, beside rows held out
        settings       batch_size=64, part_rows=8192, dtype="float32", on_error="log", progress=False, workers=

        The kind of index is chosen by the number of rows and the budgets, tuned, and measured against exact search;
        `report()` has the figures. A build that was killed goes on where it was; one that is finished is opened.

        Raises ImportError naming the extra when the store is not installed, before any work is done; ConfigError when
        no picture can be read, no index fits the memory, or `out` holds another index.
        """
        kinds = _store_kinds()
        if store not in kinds:
            raise ConfigError(f"store={store!r}; choose from {', '.join(kinds)}")
        kinds[store].check()
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ConfigError(
                "under torchrun, embed into parts first (pe.embed(..., out=)); one process builds the index"
            )
        from perception_encoder.retrieval.making import make_index

        kinds[store].check_budget(
            kind=kind, max_memory=max_memory, max_latency=max_latency, target_recall=target_recall, queries=queries
        )
        model = as_model(model)
        budget = {
            "kind": kind,
            "max_memory": max_memory,
            "max_latency": max_latency,
            "target_recall": target_recall,
            "queries": _query_vectors(model, queries),
        }
        facts = make_index(source, model, Path(out), store, budget, settings)
        return cls(kinds[store].open(Path(out) / STORE, facts), facts, Path(out), model)

    @classmethod
    def open(cls, folder: str | Path, *, model: Any = None, verify: bool = False) -> Self:
        """Raises IndexError_ for a folder that holds no whole index of ours, ConfigError for another model's.

        model   as `build` takes it, in place of the one the index names
        verify  every part is hashed and compared with its sidecar
        """
        folder = Path(folder)
        facts = read_facts(folder)
        kinds = _store_kinds()
        kinds[facts.store].check()
        store = kinds[facts.store].open(folder / STORE, facts, verify=verify)
        if store.width != facts.width:
            raise IndexError_(f"{folder} does not fit together: vectors of {store.width}, not {facts.width}")
        index = cls(store, facts, folder)
        if model is not None:
            index._use(as_model(model))
        return index

    def add(self, source: Any, *, on_duplicate: Literal["error", "replace", "skip"] = "error", **settings: Any) -> int:
        """Embed more pictures and add them; searches find them at once. How many were added.

        on_duplicate  what to do with ids that are in the index: "error", "replace" them, or "skip" what is there

        Kept out of the trained index, and looked at one by one, until `merge` folds them in.
        """
        from perception_encoder.retrieval.making import add_source

        return add_source(self, source, on_duplicate, settings)

    def delete(self, ids: str | Sequence[str]) -> int:
        """Forget pictures by id; how many there were."""
        return int(self.store.delete([ids] if isinstance(ids, str) else list(ids)))

    def merge(self) -> None:
        """Fold what was added and deleted since the build into the index."""
        getattr(self.store, "merge", self.store.optimize)()

    def optimize(self, **budget: Any) -> dict[str, Any]:
        """Choose and tune the index again, for the rows there are now; budgets as in `build`. Returns the report."""
        if "queries" in budget:
            budget["queries"] = _query_vectors(self._loaded(), budget["queries"])
        return dict(self.store.optimize(**budget))

    def report(self) -> dict[str, Any]:
        """What the index is, what was asked for, what was measured, and what was added since."""
        measured = self.store.report() if hasattr(self.store, "report") else None
        return {"facts": asdict(self.facts), "now": self.store.stats(), "built": measured}

    # --- searching ---

    @torch.inference_mode()
    def search(
        self, query: Any, k: int = 10, *, minus: Any = None, weight: float = 0.5, filter: Any = None, **settings: Any
    ) -> list[Hit]:
        """The k pictures nearest to a query, best first; fewer when there are no more.

        query   a sentence, a picture (a path that exists, bytes, PIL, uint8 array), a vector of C numbers, a `Hit`; a
                list of these is several examples: the mean of their directions
        minus   the same, for what the pictures should not look like; `weight` says how much
        filter  conditions on metadata, as `retrieval.filters` has them: {"label": "cat", "width": {">=": 512}}

        Raises ValueError for k below 1 or a query that does not fit, ConfigError when the model is not the index's.
        """
        if k < 1:
            raise ValueError(f"k={k}; ask for at least one picture")
        vector = self.direction(query)
        if minus is not None:
            vector = vector - weight * self.direction(minus)
        return self.search_many(vector[None], k, filter=filter, **settings)[0]

    @torch.inference_mode()
    def search_many(self, queries: Any, k: int = 10, *, filter: Any = None, **settings: Any) -> list[list[Hit]]:
        """`search` for each of Q queries together: a list of them, or vectors Q C."""
        vectors = queries if _is_vector(queries) else torch.stack([self.direction(query) for query in queries])
        if vectors.ndim != 2 or vectors.shape[1] != self.facts.width:
            self._refuse(vectors[0] if vectors.ndim == 2 else vectors)
        return [[_hit(match) for match in row] for row in self.store.search(vectors, k, filter=filter, **settings)]

    def direction(self, query: Any) -> Tensor:
        """The vector of a query, of length 1: C"""
        examples = list(query) if isinstance(query, EXAMPLES) and not isinstance(query, Hit) else [query]
        if not examples:
            raise ValueError("no examples given; give at least one")
        vectors = [self._vector(one) for one in examples]
        for vector in vectors:
            if vector.shape != (self.facts.width,):
                self._refuse(vector)
            if not bool(vector.isfinite().all()):
                raise ValueError("the query has NaN or infinity in it")
        return F.normalize(F.normalize(torch.stack(vectors), dim=1).mean(dim=0), dim=0)

    def _vector(self, query: Any) -> Tensor:
        if isinstance(query, Hit):
            return self.vector(query.id)
        if _is_vector(query):
            return torch.as_tensor(query).detach().float().cpu()
        if isinstance(query, str) and not _is_file(query):
            if not query.strip():
                raise ValueError("the query is an empty sentence; say what to look for")
            if Path(query).suffix.lower() in PICTURE_SUFFIXES:
                raise MediaError(f"there is no picture {describe(query)}; a sentence has no such ending")
            return embed_texts(self._loaded(), [query])[0].detach().float().cpu()
        return embed(self._loaded(), [query])[0]

    def vector(self, id: str) -> Tensor:
        """The stored vector of a picture: C. Raises LookupError for an id that is not there."""
        return self.store.get([id]).vectors[0]

    def _refuse(self, vector: Tensor) -> None:
        raise IndexError_(
            f"the query has {tuple(vector.shape)} numbers, the index {self.facts.width} "
            f"(model {self.facts.model}); was it made by another model?"
        )

    def ids(self) -> list[str]:
        """The names of all pictures, in the order of the store."""
        return [one for rows in self.store.scan() for one in rows.ids]

    def thumbnail(self, hit: Hit, size: int = 256) -> Any:
        """A small RGB picture of a hit, a PIL image of at most `size` pixels a side.

        Raises MediaError when the file is gone, is a text, or lies outside the folders the index was built from.
        """
        from perception.media import read_image, to_rgb
        from perception_encoder.retrieval.sources import picture_of

        path = Path(hit.path).resolve()
        if not any(path.is_relative_to(Path(root).resolve()) for root in self.facts.roots):
            raise MediaError(f"{hit.path} lies outside {', '.join(self.facts.roots) or 'every folder of this index'}")
        picture = read_image(picture_of(hit.path, hit.inside, hit.span[0] if hit.span else None))
        picture = to_rgb(picture)
        picture.thumbnail((size, size))
        return picture

    # --- what comes free with it ---

    def duplicates(self, threshold: float = 0.95, **settings: Any) -> list[list[str]]:
        """Groups of pictures whose neighbours have a cosine of at least `threshold`; see `retrieval.groups`."""
        from perception_encoder.retrieval.groups import duplicates

        return duplicates(self.store, threshold, **settings)

    def clusters(self, k: int, **settings: Any) -> Any:
        """The pictures in k groups, each with the one nearest its middle; see `retrieval.groups`."""
        from perception_encoder.retrieval.groups import clusters

        return clusters(self.store, k, **settings)

    # --- the model ---

    def _loaded(self) -> Any:
        if self._model is None:
            if self.facts.model is None:
                raise ConfigError(f"this index does not say which model made it; {self._how_to_say()}")
            self._use(load_named(self.facts.model))
        return self._model

    def _how_to_say(self) -> str:
        if self.facts.fingerprint == UNKNOWN:
            return "vouch for one: Index.build(PARTS, model, OUT), or `perception index PARTS -o OUT --model MODEL`"
        return "give it: Index.open(folder, model=...), or --model"

    def _use(self, model: Any) -> None:
        if self.facts.fingerprint == UNKNOWN:
            raise ConfigError(f"nobody said which model made the vectors of this index; {self._how_to_say()}")
        if fingerprint(model) != self.facts.fingerprint:
            raise ConfigError(
                f"this index was made by another model or preprocessing ({self.facts.model}, fingerprint "
                f"{self.facts.fingerprint}); vectors of the given one ({fingerprint(model)}) do not compare"
            )
        self._model = model


def _is_file(query: str) -> bool:
    try:
        return Path(query).is_file()
    except OSError:  # far too long for a path
        return False


def load_named(name: str) -> Any:
    """The model an index names: a CLIP model, or an encoder."""
    from perception_encoder.inspection import kind_of
    from perception_encoder.zoo import load_clip, load_encoder

    return load_clip(name) if kind_of(name) == "clip" else load_encoder(name)


def as_model(given: Any) -> Any:
    """A model, loaded where it is given by its name; None stays None. Raises ConfigError for what is neither."""
    if isinstance(given, str | Path):
        return load_named(str(given))
    if given is not None and not hasattr(given, "preprocess"):
        raise ConfigError(
            f"{type(given).__name__} is no model; give one that load_clip or load_encoder made, or its name"
        )
    return given


def read_facts(folder: Path) -> IndexFacts:
    """Raises IndexError_ for a folder without a whole index of this format."""
    path = folder / INDEX
    if not path.is_file():
        raise IndexError_(f"{folder} is no index: it lacks {INDEX}; build one: pe.Index.build, or `perception index`")
    try:
        data = json.loads(path.read_text("utf-8"))
        if isinstance(data, dict) and data.get("format") != FORMAT:
            raise IndexError_(f"{path} has format {data.get('format')!r}; this release reads {FORMAT!r}")
        return read_settings(IndexFacts, data, INDEX)
    except (ValueError, OSError) as error:
        if isinstance(error, IndexError_):
            raise
        raise IndexError_(f"{folder} cannot be read as an index: {str(error).splitlines()[0]}") from error


def write_facts(folder: Path, facts: IndexFacts) -> None:
    with atomic_write(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(asdict(facts), indent=2) + "\n", "utf-8")


class _Faiss:
    @staticmethod
    def check() -> None:
        from perception_encoder.retrieval.blocks import faiss_module

        faiss_module()

    @staticmethod
    def check_budget(**budget: Any) -> None:
        from perception_encoder.retrieval.choice import check_budget

        check_budget(**budget)

    @staticmethod
    def open(folder: Path, facts: IndexFacts, *, verify: bool = False) -> Any:
        from perception_encoder.retrieval.faiss_store import FaissStore, Origin

        return FaissStore(folder, origin=Origin(facts.model, facts.fingerprint, facts.preprocess), verify=verify)


class _Lance:
    @staticmethod
    def check() -> None:
        from perception_encoder.retrieval.lance_store import _lancedb

        _lancedb()

    @staticmethod
    def check_budget(**budget: Any) -> None:
        from perception_encoder.retrieval.lance_store import check_budget

        check_budget(**budget)

    @staticmethod
    def open(folder: Path, facts: IndexFacts, *, verify: bool = False) -> Any:
        from perception_encoder.retrieval.lance_store import LanceStore

        return LanceStore(folder)


def _store_kinds() -> dict[str, Any]:
    return {"faiss": _Faiss, "lance": _Lance}


def _is_vector(query: Any) -> bool:
    """Floating numbers; uint8 arrays are pictures."""
    if isinstance(query, Tensor):
        return query.is_floating_point()
    return hasattr(query, "dtype") and hasattr(query, "shape") and str(query.dtype).startswith("float")


def _query_vectors(model: Any, queries: Any) -> Tensor | None:
    if queries is None or _is_vector(queries):
        return None if queries is None else torch.as_tensor(queries)
    if model is None:
        raise ConfigError("texts to measure recall with need the model that made the vectors; give it, or vectors")
    with torch.inference_mode():
        return embed_texts(model, list(queries)).float().cpu()


_OWN = ("source", "inside", "width", "height", "start", "end", "text")


def _hit(match: Any) -> Hit:
    known = match.columns
    start, end = known.get("start"), known.get("end")
    metadata = {name.removeprefix("meta."): value for name, value in known.items() if name not in _OWN}
    return Hit(
        path=str(known.get("source") or match.id),
        score=match.score,
        id=match.id,
        inside=str(known.get("inside") or ""),
        text=known.get("text"),
        size=(int(known.get("width") or 0), int(known.get("height") or 0)),
        span=None if start is None or end is None else (start, end),
        metadata=metadata,
    )


def remove_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
