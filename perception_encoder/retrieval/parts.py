"""Embeddings as parts: files of so many rows, each whole or not there, each with a sidecar that vouches for it.

    out/plan.json                  what is embedded, by which model, in how many parts
    out/chunks-<hash>.jsonl        line p: the inputs of part p
    out/part-00000.safetensors     vectors N C, and columns: id, source, inside, width, height, start, end, text, ...
    out/part-00000.json            rows, sha256, fingerprints, what failed and why

A part depends on its chunk and the plan alone, never on who makes it or when, so any number of processes may make
parts of one plan, in any order, be killed and started again: the finished bytes are the same (on one kind of machine,
with one number of threads: other kernels round in other ways). A part is finished when its sidecar is there.

N rows  C embedding width
"""

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from perception.checkpoint import CONFIG
from perception.errors import CheckpointError, ConfigError, PerceptionError, missing_extra
from perception.files import TEMPORARY, atomic_write, sha256_of, sync_folder
from perception.settings import read_settings
from perception_encoder.retrieval.columns import Column, column, from_tensors, to_tensors

PLAN = "plan.json"
PLAN_FORMAT = "perception-plan-1"
PART_FORMAT = "perception-part-1"
SUFFIXES = {"safetensors": ".safetensors", "parquet": ".parquet"}
DTYPES = {"float32": torch.float32, "float16": torch.float16}
MAX_ROWS = 10_000_000  # of one part; a larger number in a file is damage or malice


class PartError(CheckpointError):
    """A part that is missing, damaged, or not of this plan."""


@dataclass(frozen=True)
class PartFailure:
    """An input that was left out: its position in the chunk, what it is called, and why."""

    position: int
    source: str
    reason: str


@dataclass(frozen=True)
class Sidecar:
    """What `part-00000.json` says of the file beside it."""

    format: str
    part: int
    file: str
    bytes: int
    sha256: str
    rows: int
    width: int
    dtype: str
    model: str | None
    fingerprint: str
    preprocess: str
    failures: tuple[PartFailure, ...]


@dataclass(frozen=True)
class Plan:
    """What is embedded and how. Two plans with equal settings make equal parts.

    kind         "image", "text" or "clip": what the model is shown
    source       how the chunks are read, as `Source.settings` gives it
    parts, rows  how many; rows are None where only reading tells (videos)
    model        what `load_clip` was given, None for a model built by hand
    fingerprint  of the model and its preprocessing together; `preprocess` of that alone
    chunks       the file of chunks, named by its own hash
    """

    format: str
    kind: str
    source: dict
    parts: int
    rows: int | None
    part_rows: int
    batch_size: int
    normalize: bool
    dtype: str
    file_format: str
    model: str | None
    fingerprint: str
    preprocess: str
    chunks: str

    def __post_init__(self) -> None:
        if self.format != PLAN_FORMAT:
            raise ConfigError(f"the plan has format {self.format!r}; this release reads {PLAN_FORMAT!r}")
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r}; vectors are stored as {' or '.join(DTYPES)}")
        if self.file_format not in SUFFIXES:
            raise ConfigError(f"file_format={self.file_format!r}; parts are {' or '.join(SUFFIXES)}")
        if self.batch_size < 1 or not 1 <= self.part_rows <= MAX_ROWS:
            raise ConfigError(
                f"batch_size={self.batch_size}, part_rows={self.part_rows}; 1 or more, {MAX_ROWS} at most"
            )
        if Path(self.chunks).name != self.chunks or not self.chunks.startswith("chunks-"):
            raise ConfigError(f"the plan names {self.chunks!r} as its chunks; expected a file beside it")

    def settings(self) -> dict[str, Any]:
        """What must be equal for parts of two runs to belong together: everything but the list of inputs."""
        return {key: value for key, value in asdict(self).items() if key not in ("parts", "rows", "chunks")}


class Stamp(Protocol):
    """What a part says of how it was made; a `Plan` says it."""

    @property
    def dtype(self) -> str: ...
    @property
    def file_format(self) -> str: ...
    @property
    def model(self) -> str | None: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def preprocess(self) -> str: ...


class Part(NamedTuple):
    """One part, mapped into memory.

    vectors  N C
    columns  by name, N each: id, source, inside, width, height, start, end, text, and whatever else was known
    """

    vectors: Tensor
    columns: dict[str, Column]
    sidecar: Sidecar


def part_name(number: int) -> str:
    return f"part-{number:05d}"


# --- a plan ----------------------------------------------------------------------------------------------------------


def refuse_a_model(folder: Path) -> None:
    """ConfigError for a folder with a config.json, which is a model's, or at any rate none of ours."""
    if (folder / CONFIG).exists():
        raise ConfigError(f"{folder} holds something else ({CONFIG}); use a folder of its own")


def write_plan(folder: Path, plan: Plan, chunks: Callable[[], Iterable[dict[str, Any]]]) -> Plan:
    """Store the plan unless there is one: of processes that start together, one writes and all follow it.

    plan    its parts, rows and chunks are filled in here
    chunks  lists the inputs; not called when there is a plan already

    Raises ConfigError when the plan that is there has other settings, or there is nothing to embed, or the folder is a
    model's.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{folder} is a file; parts need a folder of their own") from error
    if not (folder / PLAN).exists():
        refuse_a_model(folder)
        listed = list(chunks())
        if not listed:
            raise ConfigError("there is nothing to embed: the source is empty")
        text = "".join(map(chunk_line, listed))
        name = f"chunks-{hashlib.sha256(text.encode()).hexdigest()[:16]}.jsonl"
        rows = [chunk["rows"] for chunk in listed]
        plan = replace(plan, chunks=name, parts=len(listed), rows=None if None in rows else sum(rows))
        with atomic_write(folder / name) as temporary:
            temporary.write_text(text, "utf-8")
        _write_once(folder / PLAN, json.dumps(asdict(plan), indent=2, sort_keys=True) + "\n")
    stored = read_plan(folder)
    check_same(stored, plan, folder)
    for other in folder.glob("chunks-*.jsonl"):  # of a listing by another process, or one killed before its plan
        if other.name != stored.chunks:
            other.unlink(missing_ok=True)
    return stored


def chunk_line(chunk: dict[str, Any]) -> str:
    return json.dumps(chunk, sort_keys=True) + "\n"


def check_same(stored: Plan, asked: Plan, folder: Path) -> None:
    """ConfigError naming every setting in which the two differ."""
    before, now = stored.settings(), asked.settings()
    if different := [f"{key}: {before[key]!r} there, {now[key]!r} asked" for key in before if before[key] != now[key]]:
        raise ConfigError(
            f"{folder} holds parts made in another way ({'; '.join(different)}); use another folder, or remove this one"
        )


def _write_once(path: Path, text: str) -> None:
    """Like `atomic_write`, but what is there already stays."""
    if path.exists():
        return
    mine = path.with_name(f"{TEMPORARY}{secrets.token_hex(4)}{path.suffix}")
    try:
        with mine.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(mine, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            mine.replace(path)
        sync_folder(path.parent)
    finally:
        mine.unlink(missing_ok=True)


def read_plan(folder: str | Path) -> Plan:
    """Raises PartError when there is none, ConfigError when it cannot be read."""
    path = Path(folder) / PLAN
    if not path.is_file():
        raise PartError(f"{folder} holds no {PLAN}; write parts with `perception embed`")
    try:
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise PartError(f"{path} cannot be read: {error}") from error
    return read_settings(Plan, data, str(path))


def read_chunks(folder: str | Path, plan: Plan, wanted: Iterator[int] | range | list[int]) -> Iterator[tuple[int, Any]]:
    """(part, its chunk) of the parts wanted, which rise. Raises PartError when the file is not the plan's."""
    path = Path(folder) / plan.chunks
    if not path.is_file() or sha256_of(path)[:16] != path.stem.removeprefix("chunks-"):
        raise PartError(f"{path} is missing or was changed; remove {PLAN} to plan again")
    remaining = iter(wanted)
    next_one = next(remaining, None)
    with path.open("r", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            if number == next_one:
                yield number, json.loads(line)
                next_one = next(remaining, None)


# --- one part --------------------------------------------------------------------------------------------------------


def write_part(
    folder: Path, number: int, vectors: Tensor, columns: Mapping[str, Column], plan: Stamp, failures: list[PartFailure]
) -> Sidecar:
    """The file, then its sidecar: both whole or not there."""
    path = folder / f"{part_name(number)}{SUFFIXES[plan.file_format]}"
    vectors = vectors.to(DTYPES[plan.dtype]).contiguous()
    with atomic_write(path) as temporary:
        if plan.file_format == "parquet":
            _write_parquet(temporary, vectors, columns)
        else:
            # One key: safetensors writes several in an order that changes from run to run.
            header = {"perception": json.dumps({"format": PART_FORMAT, "fingerprint": plan.fingerprint})}
            save_file({"vectors": vectors, **to_tensors(columns)}, temporary, metadata=header)
        sidecar = Sidecar(
            PART_FORMAT,
            number,
            path.name,
            temporary.stat().st_size,
            sha256_of(temporary),
            len(vectors),
            vectors.shape[1],
            plan.dtype,
            plan.model,
            plan.fingerprint,
            plan.preprocess,
            tuple(failures),
        )
    with atomic_write(sidecar_path(folder, number)) as temporary:
        temporary.write_text(json.dumps(asdict(sidecar), indent=2) + "\n", "utf-8")
    return sidecar


def sidecar_path(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"{part_name(number)}.json"


def read_sidecar(folder: str | Path, number: int) -> Sidecar:
    """Raises PartError for one that is missing, damaged, or names a file elsewhere."""
    path = sidecar_path(folder, number)
    try:
        sidecar = read_settings(Sidecar, json.loads(path.read_text("utf-8")), str(path))
    except FileNotFoundError as error:
        raise PartError(f"part {number} of {folder} is not finished: {path.name} is not there") from error
    except (OSError, ValueError) as error:
        raise PartError(f"{path} cannot be read: {error}") from error
    if sidecar.format != PART_FORMAT or sidecar.part != number:
        raise PartError(
            f"{path} is of part {sidecar.part}, format {sidecar.format!r}; expected {number}, {PART_FORMAT!r}"
        )
    if sidecar.file not in {part_name(number) + suffix for suffix in SUFFIXES.values()}:
        raise PartError(f"{path} names {sidecar.file!r}; expected the part beside it")
    if not (0 <= sidecar.rows <= MAX_ROWS and 0 <= sidecar.width <= 2**20):
        raise PartError(f"{path} says {sidecar.rows} rows of {sidecar.width}, which cannot be")
    return sidecar


def read_part(folder: str | Path, number: int, *, verify: bool = False) -> Part:
    """Map a part into memory. Its size and rows are compared with the sidecar; `verify` hashes every byte.

    Raises PartError naming the file when they do not agree.
    """
    sidecar = read_sidecar(folder, number)
    path = Path(folder) / sidecar.file
    check_part(path, sidecar, verify=verify)
    try:
        vectors, columns = _read_parquet(path) if path.suffix == ".parquet" else _read_safetensors(path)
    except PerceptionError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise PartError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    if vectors.shape != (sidecar.rows, sidecar.width):
        raise PartError(f"{path} holds {tuple(vectors.shape)} vectors, its sidecar says {sidecar.rows, sidecar.width}")
    if any(len(one) != sidecar.rows for one in columns.values()):
        raise PartError(f"{path}: its columns and its vectors have different numbers of rows")
    return Part(vectors, columns, sidecar)


def check_part(path: Path, sidecar: Sidecar, *, verify: bool) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise PartError(f"{path} is gone, though its sidecar is there") from error
    if size != sidecar.bytes:
        raise PartError(f"{path} has {size} bytes, its sidecar says {sidecar.bytes}")
    if verify and sha256_of(path) != sidecar.sha256:
        raise PartError(f"{path} is damaged: its bytes are not those the sidecar vouches for")


def is_finished(folder: Path, number: int, *, verify: bool) -> bool:
    """Whether the part is there and as its sidecar says. One that is not will be made again."""
    try:
        sidecar = read_sidecar(folder, number)
        check_part(folder / sidecar.file, sidecar, verify=verify)
    except PartError:
        return False
    return True


def _read_safetensors(path: Path) -> tuple[Tensor, dict[str, Column]]:
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("perception", "{}"))
        if header.get("format") != PART_FORMAT:
            raise PartError(f"{path} is no part of embeddings")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    vectors = tensors.pop("vectors")
    if vectors.ndim != 2 or vectors.dtype not in DTYPES.values():
        raise PartError(f"{path} holds {vectors.dtype} {tuple(vectors.shape)} as vectors")
    return vectors, from_tensors(tensors, len(vectors), str(path))


def _write_parquet(path: Path, vectors: Tensor, columns: Mapping[str, Column]) -> None:
    pa, pq = _arrow()
    flat = pa.array(vectors.flatten().numpy())
    table = {"vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])}
    table |= {name: one.arrow() for name, one in columns.items()}
    pq.write_table(pa.table(table), path, compression="zstd")


def _read_parquet(path: Path) -> tuple[Tensor, dict[str, Column]]:
    pa, pq = _arrow()
    try:
        table = pq.read_table(path).combine_chunks()
        lists = table["vector"].combine_chunks()
        width = lists.type.list_size
        vectors = np.array(lists.flatten().to_numpy(zero_copy_only=False)).reshape(len(lists), width)
    except (pa.ArrowException, AttributeError) as error:
        raise PartError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    columns = {name: column(table[name].to_pylist()) for name in table.column_names if name != "vector"}
    return torch.from_numpy(vectors), columns


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "retrieval", str(error)) from error
    return pyarrow, pyarrow.parquet


# --- all parts -------------------------------------------------------------------------------------------------------


class Parts:
    """A folder of parts, finished or not."""

    def __init__(self, folder: str | Path):
        self.folder, self.plan = Path(folder), read_plan(folder)

    def __iter__(self) -> Iterator[Part]:
        """The parts in order, each mapped. Raises PartError for one that is not finished or is damaged."""
        return (read_part(self.folder, number) for number in range(self.plan.parts))

    def __len__(self) -> int:
        """Rows of the finished parts."""
        return sum(read_sidecar(self.folder, number).rows for number in self.finished())

    def finished(self) -> list[int]:
        return [n for n in range(self.plan.parts) if sidecar_path(self.folder, n).is_file()]

    def missing(self, *, verify: bool = False) -> list[int]:
        """Parts that are not there, or not as their sidecars say."""
        return [n for n in range(self.plan.parts) if not is_finished(self.folder, n, verify=verify)]

    def failures(self) -> list[PartFailure]:
        return [failure for n in self.finished() for failure in read_sidecar(self.folder, n).failures]

    def vectors(self) -> Tensor:
        """All of them, in memory: N C"""
        return torch.cat([part.vectors for part in self if len(part.vectors)] or [torch.empty(0, 0)])

    def column(self, name: str) -> list[Any]:
        """One column of all rows, None where a part does not know it."""
        return [v for part in self for v in _column_or_none(part, name)]


def _column_or_none(part: Part, name: str) -> list[Any]:
    return part.columns[name].to_list() if name in part.columns else [None] * len(part.vectors)
