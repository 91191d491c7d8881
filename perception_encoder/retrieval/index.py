"""A folder of pictures that answers sentences and pictures: exact search on one machine.

N pictures  C embedding width
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from perception.errors import ConfigError, IndexError_, missing_extra
from perception.files import atomic_write
from perception.settings import read_settings
from perception_encoder.images import Failure, as_list
from perception_encoder.retrieval.embed import embed, fingerprint

FILES = ("index.faiss", "index.json")
FORMAT = "perception-index-1"


class Hit(NamedTuple):
    path: str
    score: float  # cosine


@dataclass(frozen=True)
class IndexFacts:
    """What `index.json` holds.

    model  what `load_clip` was given, None for a model that was built by hand
    """

    format: str
    fingerprint: str
    model: str | None
    width: int
    paths: tuple[str, ...]


class Index:
    """Vectors of pictures in a faiss index, with their paths and the fingerprint of the model that made them."""

    def __init__(self, store: Any, facts: IndexFacts, model: Any = None):
        self._store, self.facts, self._model = store, facts, model

    def __len__(self) -> int:
        return len(self.facts.paths)

    @classmethod
    def build(
        cls,
        source: Any,
        model: Any,
        out: str | Path,
        *,
        batch_size: int = 64,
        on_error: str = "log",
        progress: bool = False,
    ) -> Self:
        """Embed the pictures of a folder or a list of paths, and write the index to the folder `out`.

        Raises ImportError naming the extra when faiss is not installed, before any work is done.
        """
        faiss = _faiss()
        files = [str(item) for item in as_list(source)]
        failures: list[Failure] = []
        vectors = embed(model, files, batch_size=batch_size, progress=progress, on_error=on_error, failures=failures)
        lost = {failure.row for failure in failures}
        paths = tuple(path for row, path in enumerate(files) if row not in lost)
        if not paths:
            raise ConfigError(f"no picture of {source!s} could be read; an index needs at least one")
        store = faiss.IndexFlatIP(vectors.shape[1])
        store.add(vectors.numpy())
        facts = IndexFacts(FORMAT, fingerprint(model), getattr(model, "source", None), vectors.shape[1], paths)
        out = Path(out)
        with atomic_write(out / FILES[0]) as temporary:
            faiss.write_index(store, str(temporary))
        with atomic_write(out / FILES[1]) as temporary:
            temporary.write_text(json.dumps(asdict(facts)), "utf-8")
        return cls(store, facts, model)

    @classmethod
    def open(cls, folder: str | Path, *, model: Any = None) -> Self:
        """Raises IndexError_ for a folder that holds no whole index of ours, ConfigError for another model's."""
        faiss, folder = _faiss(), Path(folder)
        if missing := [name for name in FILES if not (folder / name).is_file()]:
            raise IndexError_(f"{folder} is no index: it lacks {missing}; build one with pe.Index.build")
        try:
            facts = read_settings(IndexFacts, json.loads((folder / FILES[1]).read_text("utf-8")), FILES[1])
            store = faiss.read_index(str(folder / FILES[0]))
        except (ValueError, RuntimeError, OSError) as error:
            raise IndexError_(f"{folder} cannot be read as an index: {str(error).splitlines()[0]}") from error
        if facts.format != FORMAT:
            raise IndexError_(f"{folder / FILES[1]} has format {facts.format!r}; this release reads {FORMAT!r}")
        if store.ntotal != len(facts.paths) or store.d != facts.width:
            raise IndexError_(f"{folder} does not fit together: {store.ntotal} vectors, {len(facts.paths)} paths")
        index = cls(store, facts)
        if model is not None:
            index._use(model)
        return index

    @torch.inference_mode()
    def search(self, query: Any, k: int = 10) -> list[Hit]:
        """The k pictures nearest to a sentence, a picture (a path that exists, bytes, PIL) or a vector of C numbers.

        Raises ValueError for k below 1 or a vector of another width.
        """
        if k < 1:
            raise ValueError(f"k={k}; ask for at least one picture")
        vector = self._vector(query)
        if vector.shape != (self.facts.width,):
            raise IndexError_(
                f"the query has {tuple(vector.shape)} numbers, the index {self.facts.width} "
                f"(model {self.facts.model}); was it made by another model?"
            )
        if not bool(vector.isfinite().all()):
            raise ValueError("the query has NaN or infinity in it")
        vector = torch.nn.functional.normalize(vector, dim=0)
        scores, rows = self._store.search(vector[None].numpy(), min(k, len(self)))
        return [Hit(self.facts.paths[row], float(score)) for row, score in zip(rows[0], scores[0], strict=True)]

    def _vector(self, query: Any) -> Tensor:
        if isinstance(query, Tensor) and query.is_floating_point():
            return query.detach().float().cpu()
        if isinstance(query, str) and not Path(query).is_file():
            model = self._loaded()
            return model.encode_text(model.tokenize([query]))[0].float().cpu()
        return embed(self._loaded(), [query])[0]

    def _loaded(self) -> Any:
        if self._model is None:
            if self.facts.model is None:
                raise ConfigError("this index does not say which model made it; give it: Index.open(folder, model=...)")
            from perception_encoder.zoo import load_clip

            self._use(load_clip(self.facts.model))
        return self._model

    def _use(self, model: Any) -> None:
        if fingerprint(model) != self.facts.fingerprint:
            raise ConfigError(
                f"this index was made by another model or preprocessing ({self.facts.model}, fingerprint "
                f"{self.facts.fingerprint}); vectors of the given one ({fingerprint(model)}) do not compare"
            )
        self._model = model


def _faiss() -> ModuleType:
    try:
        import faiss
    except ImportError as error:
        raise missing_extra("faiss", "retrieval", str(error)) from error
    return faiss
