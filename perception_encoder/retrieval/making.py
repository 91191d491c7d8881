"""The steps from a source to an index on disk, each of which a kill may end and the next run takes up.

1. parts of embeddings in `out/store/parts` (or `out/parts`, for stores that keep vectors themselves)
2. the store over them, tuned and measured
3. `index.json`, last: an index without it is not finished
"""

import hashlib
import itertools
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from perception.errors import ConfigError
from perception_encoder.retrieval.columns import Value
from perception_encoder.retrieval.embed import fingerprint
from perception_encoder.retrieval.faiss_store import FaissStore, Origin
from perception_encoder.retrieval.index import (
    FORMAT,
    INDEX,
    STORE,
    Index,
    IndexFacts,
    read_facts,
    remove_folder,
    write_facts,
)
from perception_encoder.retrieval.parts import (
    PLAN,
    Part,
    Parts,
    Plan,
    check_same,
    chunk_line,
    part_name,
    read_chunks,
    read_part,
    read_plan,
)
from perception_encoder.retrieval.pipeline import embed_parts, plan_of
from perception_encoder.retrieval.sources import Pictures, as_source, folders
from perception_encoder.retrieval.versions import HASH, MANIFEST, PARTS, Snapshot

log = logging.getLogger(__name__)
UNKNOWN = "unknown"  # the fingerprint of vectors nobody vouches for


def make_index(
    source: Any, model: Any, out: Path, store: str, budget: dict[str, Any], settings: dict[str, Any]
) -> IndexFacts:
    """The files of an index, and what is true of it."""
    folder = out / STORE / PARTS if store == "faiss" else out / PARTS
    if is_parts(source):
        plan, roots = adopt(Path(source), folder, model)
    else:
        found = as_source(source)
        settings = {"batch_size": 64, "part_rows": 8192, "normalize": True, **settings}
        if (out / INDEX).is_file():
            return _same_index(out, found, model, settings, folder)
        plan = embed_parts(model, found, folder, **settings).plan
        roots = found.roots()
    parts = Parts(folder)
    width = next((part.vectors.shape[1] for part in parts if len(part.vectors)), 0)
    if not width:
        raise ConfigError(f"no picture of {_named(source)} could be read; an index needs at least one")
    facts = IndexFacts(
        format=FORMAT,
        fingerprint=plan.fingerprint,
        preprocess=plan.preprocess,
        model=plan.model,
        width=width,
        kind=plan.kind,
        store=cast(Literal["faiss", "lance"], store),
        roots=tuple(os.path.abspath(root) for root in roots),  # noqa: PTH100 - links stay as they were given
    )
    (_make_faiss if store == "faiss" else _make_lance)(out, parts, width, budget)
    write_facts(out, facts)
    return facts


def _same_index(out: Path, found: Any, model: Any, settings: dict[str, Any], folder: Path) -> IndexFacts:
    """A finished index of the very same pictures is opened; of others it is not touched."""
    facts, stored = read_facts(out), read_plan(folder)
    asked = make_asked(found, model, settings)
    check_same(stored, asked, out)
    listed = "".join(chunk_line(chunk) for chunk in found.chunks(stored.part_rows))
    if stored.chunks != f"chunks-{hashlib.sha256(listed.encode()).hexdigest()[:16]}.jsonl":
        raise ConfigError(f"{out} holds an index of other pictures; add to it with Index.open(...).add, or use another")
    log.info("%s is finished already", out)
    return facts


def make_asked(found: Any, model: Any, settings: dict[str, Any]) -> Plan:
    """The plan these settings would make, without its list of inputs."""
    known = ("batch_size", "part_rows", "normalize", "dtype", "file_format")
    return plan_of(model, found, **{key: settings[key] for key in known if key in settings})


def _named(source: Any) -> str:
    text = str(source)
    return text if len(text) < 200 else f"{text[:200]}..."


def is_parts(source: Any) -> bool:
    return isinstance(source, str | Path) and (Path(source) / PLAN).is_file()


def adopt(source: Path, folder: Path, model: Any) -> tuple[Plan, list[str]]:
    """Take finished parts over, as links where the disk allows it: nothing is embedded again."""
    parts = Parts(source)
    plan = parts.plan
    if model is not None and plan.fingerprint == UNKNOWN:
        # Nobody could say which model made them; who gives one now vouches for it.
        plan = replace(plan, fingerprint=fingerprint(model), model=getattr(model, "source", None))
    elif model is not None and fingerprint(model) != plan.fingerprint:
        raise ConfigError(
            f"{source} was made by another model or preprocessing ({plan.model}, {plan.fingerprint}); "
            f"vectors of the given one ({fingerprint(model)}) do not compare"
        )
    if missing := parts.missing(verify=True):
        raise ConfigError(
            f"{len(missing)} of {plan.parts} parts of {source} are missing or damaged, such as {missing[:5]}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(plan.parts):
        sidecar = read_part(source, number).sidecar
        for name in (sidecar.file, f"{part_name(number)}.json"):  # the sidecar last: it says the part is whole
            if not (folder / name).is_file():
                _link(source / name, folder / name)
    for name in (plan.chunks, PLAN):
        if (source / name).is_file() and not (folder / name).is_file():
            _link(source / name, folder / name)
    return plan, _roots(source, plan)


def _roots(folder: Path, plan: Plan) -> list[str]:
    """The folders the inputs of a plan lie in."""
    for named in ("folders", "roots"):
        if named in plan.source:
            return list(plan.source[named])
    chunks = (chunk for _, chunk in read_chunks(folder, plan, range(plan.parts)))
    return folders(file for chunk in chunks for file in (chunk.get("files") or [chunk["file"]]))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _make_faiss(out: Path, parts: Parts, width: int, budget: dict[str, Any]) -> None:
    folder = out / STORE
    (folder / MANIFEST).unlink(missing_ok=True)  # of a build that did not come to its end
    store = FaissStore.create(folder, width, origin=_origin(parts.plan))
    _refuse_twins(store.snapshot())
    store.optimize(**budget)


def _refuse_twins(now: Snapshot) -> None:
    hashes = now._hashes(0)
    order = np.argsort(hashes, kind="stable")
    same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    for at in same.tolist():
        first, second = (now.columns(int(order[at + i]))["id"] for i in (0, 1))
        if first == second:
            raise ConfigError(f"the id {first!r} comes twice; give each picture once")


def _make_lance(out: Path, parts: Parts, width: int, budget: dict[str, Any]) -> None:
    from perception_encoder.retrieval.lance_store import LanceStore

    remove_folder(out / STORE)  # of a build that did not come to its end
    store = LanceStore.create(out / STORE, width)
    for part in parts:
        if len(part.vectors):
            store.add(*rows_of(part))
    store.optimize(**budget)


def rows_of(part: Part) -> tuple[list[str], torch.Tensor, dict[str, list[Value]]]:
    """Ids, vectors and columns of a part, as a store's `add` takes them."""
    columns = {name: one.to_list() for name, one in part.columns.items() if name not in ("id", HASH)}
    return [str(one) for one in part.columns["id"].to_list()], part.vectors.float(), columns


def _origin(plan: Plan) -> Origin:
    return Origin(plan.model, plan.fingerprint, plan.preprocess, plan.dtype)


def add_source(index: Index, source: Any, on_duplicate: str, settings: dict[str, Any]) -> int:
    """Embed into parts beside the index, add each part, and remove them: a kill costs no embedding."""
    if on_duplicate not in ("error", "replace", "skip"):
        raise ConfigError(f"on_duplicate={on_duplicate!r}; choose 'error', 'replace' or 'skip'")
    found = as_source(source)
    if on_duplicate == "skip" and isinstance(found, Pictures):
        known = set(index.ids())
        found = replace(found, files=tuple(file for file in found.files if file not in known))
        if not found.files:
            return 0
    model = index._loaded()
    settings = {"batch_size": 64, "part_rows": 8192, **settings, "normalize": True}
    name = hashlib.sha256(
        repr((found.settings(), [chunk_line(c) for c in found.chunks(settings["part_rows"])])).encode()
    )
    folder = index.folder / f"adding-{name.hexdigest()[:12]}"
    parts = embed_parts(model, found, folder, **settings)
    added = 0
    for part in parts:
        ids, vectors, columns = rows_of(part)
        if on_duplicate == "skip":
            new = _unknown(index, ids)
            ids, vectors = [ids[row] for row in new], vectors[new]
            columns = {name: [values[row] for row in new] for name, values in columns.items()}
        if ids:
            policy = "replace" if on_duplicate == "replace" else "error"
            added += index.store.add(ids, vectors, columns, on_duplicate=policy)
    remove_folder(folder)
    roots = tuple(dict.fromkeys((*index.facts.roots, *(os.path.abspath(r) for r in found.roots()))))  # noqa: PTH100
    if roots != index.facts.roots:
        index.facts = replace(index.facts, roots=roots)
        write_facts(index.folder, index.facts)
    return added


def _unknown(index: Index, ids: list[str]) -> list[int]:
    """Positions of the ids that are not in the index."""
    if isinstance(index.store, FaissStore):
        return [row for row, there in enumerate(index.store.snapshot().find(ids)) if there is None]
    known = set(itertools.chain.from_iterable(rows.ids for rows in index.store.scan()))
    return [row for row, one in enumerate(ids) if one not in known]
