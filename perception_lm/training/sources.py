"""Where samples come from: files of rows, or anything with a length that is asked by number."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from perception.errors import ConfigError
from perception.registry import Registry
from perception_lm.chat import Conversation
from perception_lm.training.rows import read_row

MAX_LINE = 8 * 2**20  # bytes of one row; a longer one is no row but a mistake


@runtime_checkable
class Source(Protocol):
    """Samples by number, each a row (`perception_lm.training.rows`) with media as paths, bytes or pictures.

    The same number gives the same sample, whoever asks and when: that is what makes a run repeatable. A source may also
    have `where(index)`, what to call a sample in messages, and `fingerprint()`, a text that changes with its samples.
    """

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


# A source that a run file can ask for by name: its name -> a function of the run file's keys that makes it.
SOURCES: Registry[Any] = Registry("source of samples")


class Jsonl:
    """The rows of one JSONL file, or of all `*.jsonl` of a folder in the order of their names.

    root  the folder that media paths start from and stay in; the file's own by default

    Blank lines do not count. Raises ConfigError for a path without rows.
    """

    def __init__(self, path: str | Path, root: str | Path | None = None):
        self.path = Path(path)
        files = sorted(self.path.glob("*.jsonl"), key=_natural) if self.path.is_dir() else [self.path]
        if not files or not all(file.is_file() for file in files):
            raise ConfigError(f"no rows at {path}: expected a JSONL file, or a folder with *.jsonl")
        self.root = Path(root) if root is not None else (self.path if self.path.is_dir() else self.path.parent)
        if not self.root.is_dir():
            raise ConfigError(f"the root {self.root} of {path} is no folder")
        self.files = [_Lines(file) for file in files]
        self._ends = np.cumsum([len(file.starts) for file in self.files])
        if not len(self):
            raise ConfigError(f"{path} has no rows")

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Conversation:
        file, at = self._find(index)
        return read_row(file.row(at), self.root)

    def where(self, index: int) -> str:
        file, at = self._find(index)
        return f"{file.path}:{file.numbers[at]}"

    def fingerprint(self) -> str:
        """Changes with any byte of the files; what they name, the media, is not read."""
        return hashlib.sha256("".join(file.digest for file in self.files).encode()).hexdigest()[:16]

    def _find(self, index: int) -> "tuple[_Lines, int]":
        if not 0 <= index < len(self):
            raise IndexError(index)
        file = int(np.searchsorted(self._ends, index, side="right"))
        return self.files[file], index - int(self._ends[file - 1] if file else 0)


class _Lines:
    """Where the lines of a file start: read once, then any of them at any time."""

    def __init__(self, path: Path):
        self.path = path
        digest, starts, numbers = hashlib.blake2b(digest_size=16), [], []
        at = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    starts.append((at, len(line)))
                    numbers.append(number)
                at += len(line)
        self.starts = np.array(starts, dtype=np.int64).reshape(-1, 2)
        self.numbers, self.digest = np.array(numbers, dtype=np.int64), digest.hexdigest()

    def row(self, at: int) -> Any:
        start, length = map(int, self.starts[at])
        if length > MAX_LINE:
            raise ValueError(f"the line has {length} bytes; the limit is MAX_LINE={MAX_LINE}")
        with self.path.open("rb") as file:
            file.seek(start)
            return json.loads(file.read(length).decode("utf-8-sig"))


def _natural(path: Path) -> tuple[Any, ...]:
    """chunk.2 before chunk.10"""
    parts = path.name.split(".")
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


class Samples:
    """A source made of another with rows turned into conversations; what is given as rows in memory."""

    def __init__(self, rows: Source | Sequence[Any], root: str | Path | None = None):
        self.rows, self.root = rows, None if root is None else Path(root)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Conversation:
        row = self.rows[index]
        return row if isinstance(row, Conversation) else read_row(row, self.root)

    def where(self, index: int) -> str:
        where = getattr(self.rows, "where", None)
        return where(index) if where else f"{type(self.rows).__name__}[{index}]"

    def fingerprint(self) -> str | None:
        found = getattr(self.rows, "fingerprint", None)
        return None if found is None else str(found())


# --- what a run file says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of a datasets table.

    rows     a JSONL file, or a folder of them; a path in a run file is taken from where the command runs, one in a
             datasets file from where that file is
    root     the folder of its media; the rows' own by default
    weight   its share of the samples; its number of samples by default
    source   in place of rows: a name of `SOURCES`
    options  what that source is told
    """

    rows: str | None = None
    root: str | None = None
    weight: float | None = None
    source: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.source is None):
            raise ConfigError(f"a source has `rows` or `source`, one of them; given {self.rows!r} and {self.source!r}")


def open_source(config: SourceConfig, base: Path) -> Source:
    """Raises ConfigError and LookupError for what is not there."""
    if config.rows is not None:
        return Jsonl(base / config.rows, None if config.root is None else base / config.root)
    assert config.source is not None
    if config.source.startswith("nano/"):
        from perception_lm.training import nano  # noqa: F401  registers its sources

    try:
        return SOURCES.get(config.source)(**config.options)
    except TypeError as error:
        raise ConfigError(f"source {config.source!r} with {sorted(config.options)}: {error}") from error


def as_source(given: Any) -> Source:
    """What Python code hands in: rows in a list, an object that is asked by number, or a source already."""
    return given if isinstance(given, Jsonl | Samples) else Samples(given)


def fingerprints(sources: Mapping[str, Source]) -> dict[str, Any]:
    """Of each source its number of samples, and its fingerprint where it has one."""
    found = {}
    for name, source in sources.items():
        mark = getattr(source, "fingerprint", None)
        found[name] = {"samples": len(source), "fingerprint": mark() if mark else None}
    return found
