"""The steps from a source to an index on disk, each of which a kill may end and the next run takes up.

1. parts of embeddings in `out/store/parts` (or `out/parts`, for stores that keep vectors themselves)
2. the store over them, tuned and measured
3. `index.json`, last: an index without it is not finished
"""

import hashlib
import itertools
import json
import logging
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from perception.errors import ConfigError
from perception.files import atomic_write, sweep_temporaries
from perception_encoder.retrieval.choice import TARGET_RECALL, parse_bytes
from perception_encoder.retrieval.columns import Value
from perception_encoder.retrieval.embed import embedding_width, fingerprint
from perception_encoder.retrieval.faiss_store import REPORT, FaissStore, Origin
from perception_encoder.retrieval.index import (
    FORMAT,
    INDEX,
    STORE,
    UNKNOWN,
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
    is_finished,
    part_name,
    read_chunks,
    read_part,
    read_plan,
    refuse_a_model,
)
from perception_encoder.retrieval.pipeline import embed_parts, plan_of
from perception_encoder.retrieval.sources import Pictures, as_source, folders
from perception_encoder.retrieval.versions import HASH, MANIFEST, PARTS, Snapshot

log = logging.getLogger(__name__)
OTHERS = "{} holds an index of other pictures; add to it (Index.add, `perception index add`), or use another folder"


def make_index(
    source: Any, model: Any, out: Path, store: str, budget: dict[str, Any], settings: dict[str, Any]
) -> IndexFacts:
    """The files of an index, and what is true of it."""
    folder = out / STORE / PARTS if store == "faiss" else out / PARTS
    finished = (out / INDEX).is_file()
    if finished and (theirs := read_facts(out).store) != store:
        raise ConfigError(f"{out} holds an index in {theirs}; store={store!r} needs another folder")
    if not finished:
        refuse_a_model(out)
    if is_parts(source):
        if finished:
            return _same_parts(out, Path(source), model, folder, budget)
        plan, roots = adopt(Path(source), folder, model)
    else:
        found = as_source(source)
        settings = {"batch_size": 64, "part_rows": 8192, "normalize": True, **settings}
        if finished:
            return _same_index(out, found, model, settings, folder, budget)
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
    sweep_temporaries(out)
    write_facts(out, facts)
    return facts


def _same_index(
    out: Path, found: Any, model: Any, settings: dict[str, Any], folder: Path, budget: dict[str, Any]
) -> IndexFacts:
    """A finished index of the very same pictures is opened; of others it is not touched."""
    facts, stored = read_facts(out), read_plan(folder)
    asked = make_asked(found, model, settings)
    if facts.fingerprint != asked.fingerprint:
        raise ConfigError(f"{out} holds an index by another model or preprocessing ({facts.model}); use another folder")
    if stored.source != asked.source:
        raise ConfigError(OTHERS.format(out))
    check_same(stored, asked, out)
    listed = "".join(chunk_line(chunk) for chunk in found.chunks(stored.part_rows))
    if stored.chunks != f"chunks-{hashlib.sha256(listed.encode()).hexdigest()[:16]}.jsonl":
        raise ConfigError(OTHERS.format(out))
    _say_finished(out, budget)
    return facts


def _same_parts(out: Path, source: Path, model: Any, folder: Path, budget: dict[str, Any]) -> IndexFacts:
    """A finished index of the very same parts is opened, and learns of a model that somebody now vouches for."""
    facts = read_facts(out)
    if not (folder / PLAN).is_file() or read_plan(folder) != read_plan(source):
        raise ConfigError(OTHERS.format(out))
    if known := vouched(str(out), facts.fingerprint, facts.model, facts.width, model):
        facts = replace(facts, **known)
        write_facts(out, facts)
    _say_finished(out, budget)
    return facts


def _say_finished(out: Path, budget: dict[str, Any]) -> None:
    """Nothing is built again. Says so louder when something is asked for that the index was not built with."""
    log.info("%s is finished already", out)
    try:
        built = json.loads((out / STORE / REPORT).read_text("utf-8"))
        kind, asked = built["index"]["kind"], {"target_recall": TARGET_RECALL, **built["asked"]}
        measured = "given queries" in built["measured"]["queries"]
    except (OSError, ValueError, KeyError, TypeError):  # a store that measures nothing, and takes no budgets
        kind, asked, measured = "auto", {"target_recall": TARGET_RECALL}, False
    memory, latency, recall = parse_bytes(budget["max_memory"]), budget["max_latency"], budget["target_recall"]
    other = {
        "kind": budget["kind"] not in ("auto", kind),
        "max_memory": memory is not None and memory != asked.get("max_memory"),
        "max_latency": latency is not None and latency != asked.get("max_latency"),
        "target_recall": recall not in (TARGET_RECALL, asked["target_recall"]),
        "queries": budget["queries"] is not None and not measured,
    }
    if names := [name for name, differs in other.items() if differs]:
        log.warning(
            "%s is finished already, not looked at: %s; Index.open(%r).optimize(...) chooses again",
            out,
            ", ".join(names),
            str(out),
        )


def make_asked(found: Any, model: Any, settings: dict[str, Any]) -> Plan:
    """The plan these settings would make, without its list of inputs."""
    known = ("batch_size", "part_rows", "normalize", "dtype", "file_format")
    return plan_of(model, found, **{key: settings[key] for key in known if key in settings})


def _named(source: Any) -> str:
    files = getattr(source, "files", None) or (source if isinstance(source, list | tuple) else [source])
    return f"{files[0]}{f' and {len(files) - 1} more' if len(files) > 1 else ''}"


def is_parts(source: Any) -> bool:
    return isinstance(source, str | Path) and (Path(source) / PLAN).is_file()


def adopt(source: Path, folder: Path, model: Any) -> tuple[Plan, list[str]]:
    """Take finished parts over, as links where the disk allows it: nothing is embedded again.

    Raises ConfigError, before anything is written, for parts that are not whole or that the model cannot have made.
    """
    parts = Parts(source)
    plan = parts.plan
    if (folder / PLAN).is_file() and read_plan(folder) != plan:
        raise ConfigError(f"{folder} holds parts of something else; use another folder, or remove this one")
    if missing := parts.missing(verify=True):
        raise ConfigError(
            f"{len(missing)} of {plan.parts} parts of {source} are missing or damaged, such as {missing[:5]}"
        )
    sidecars = [read_part(source, number).sidecar for number in range(plan.parts)]
    width = next((sidecar.width for sidecar in sidecars if sidecar.width), 0)
    known = vouched(str(source), plan.fingerprint, plan.model, width, model)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (plan.chunks, PLAN):  # first: they say whose the parts are
        if (source / name).is_file() and not (folder / name).is_file():
            _link(source / name, folder / name)
    for number, sidecar in enumerate(sidecars):
        if is_finished(folder, number, verify=True):
            continue
        names = (sidecar.file, f"{part_name(number)}.json")  # the sidecar last: it says the part is whole
        for name in reversed(names):  # of a run that did not come to its end
            (folder / name).unlink(missing_ok=True)
        for name in names:
            _link(source / name, folder / name)
    return replace(plan, **known), _roots(source, plan)


def vouched(where: str, known: str, named: str | None, width: int, model: Any) -> dict[str, Any]:
    """Model and fingerprints of vectors, where a model is given that made them.

    known, named  their fingerprint and model so far. Where nobody could say which model made them, who gives one now
                  vouches for it

    Raises ConfigError for a model that cannot have made them.
    """
    if model is None:
        return {}
    if known != UNKNOWN and fingerprint(model) != known:
        raise ConfigError(
            f"{where} was made by another model or preprocessing ({named}, {known}); "
            f"vectors of the given one ({fingerprint(model)}) do not compare"
        )
    if (theirs := embedding_width(model)) and width and theirs != width:
        raise ConfigError(f"{where} holds vectors of {width}; the model given makes {theirs}")
    if known != UNKNOWN:
        return {}
    return {
        "fingerprint": fingerprint(model),
        "preprocess": str(model.preprocess.fingerprint()),
        "model": getattr(model, "source", None),
    }


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
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)


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
    if (found.kind == "text") != (index.facts.kind == "text"):
        raise ConfigError(
            f"{index.folder} is an index of {index.facts.kind}s; {found.kind}s belong into one of their own"
        )
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
