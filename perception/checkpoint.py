"""Weights on disk: opened without running anything, read when asked for, converted by tables, loaded strictly.

Opening a file maps it; a tensor costs memory when it is used. Two formats are read: safetensors (one file, or shards
with an index) and PyTorch's `.pt` through its restricted reader. One is written: safetensors.
"""

import hashlib
import json
import os
import re
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from perception.device import shapes_only
from perception.errors import CheckpointError, ConfigError
from perception.files import TEMPORARY, atomic_write, sweep_temporaries, sync_folder

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
WRAPPERS = ("state_dict", "weights", "model", "model_ema", "module")  # asked in this order
PREFIXES = ("module.", "_orig_mod.")  # what DistributedDataParallel and torch.compile put before every name
MAX_JSON = 64 * 2**20  # an index of a million tensors is smaller
MAX_CONFIG = 2**20
OLDEST_TORCH = (2, 10)  # its restricted reader is the one we trust with files from elsewhere
RELEASE_AFTER = 16 * 2**20  # bytes copied out of a mapping, at least, before its pages are handed back
FINITE_BUDGET = 16 * 2**20  # bytes the default look for NaN reads whole, smallest tensors first
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


class CheckpointWarning(UserWarning):
    """Weights that loaded, with something a person should know. `report` says what."""

    def __init__(self, message: str, report: "LoadReport | None" = None):
        super().__init__(message)
        self.report = report


# --- Reading ---------------------------------------------------------------------------------------------------------


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a file, or of several shards, by name; each is read when it is asked for.

    path           what was opened
    metadata       the text a safetensors header carries
    release_after  how many bytes a loader that copies should copy between two calls of `release`

    A tensor is a view of the mapped file where the format allows it: nothing is copied, and writing to it never
    reaches the file. Its pages stay in memory as long as any tensor of the same mapping lives; `release` lets go of
    the mapping, and the next tensor opens a new one.
    """

    def __init__(
        self,
        path: Path,
        sources: Sequence["_Source"],
        metadata: Mapping[str, str] | None = None,
        release_after: int = RELEASE_AFTER,
    ):
        self.path, self.release_after = path, release_after
        self.metadata = dict(metadata or {})
        self._sources = tuple(sources)
        self._where = {key: source for source in sources for key in source.keys()}  # noqa: SIM118

    def __getitem__(self, key: str) -> Tensor:
        return self._where[key].read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: object) -> bool:
        return key in self._where

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self)} tensors)"

    def release(self) -> None:
        for source in self._sources:
            source.release()


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a file of weights, a `*.index.json` of shards, or a folder that holds `model.safetensors` or its index.

    Raises CheckpointError for what is missing, damaged, hostile or no file of weights. Nothing in the file is run.
    """
    path = Path(path)
    if path.is_dir():
        found = next((name for name in (WEIGHTS, INDEX) if (path / name).exists()), None)
        if found is None:
            raise CheckpointError(f"folder {path} holds neither {WEIGHTS} nor {INDEX}")
        path = inside(path, found)
    if not path.is_file():
        raise CheckpointError(f"no file of weights at {path}")
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    suffix = path.suffix.lower()
    if suffix not in (".safetensors", *TORCH_SUFFIXES):
        known = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise CheckpointError(f"{path} ends in {suffix or 'nothing'!r}; weights are read from {known}")
    try:
        _check_head(path, suffix)
        size = path.stat().st_size
        if suffix != ".safetensors":
            # To open it again means to unpickle it again, so it is done less often.
            return Checkpoint(path, [_Torch(path)], release_after=max(RELEASE_AFTER, size // 16))
        source = _Safetensors(path)
        return Checkpoint(path, [source], source.metadata, max(RELEASE_AFTER, size // 64))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def read_folder(folder: str | Path) -> tuple[dict[str, Any], Checkpoint]:
    """The config and the weights `save_folder` wrote, as they belong together.

    Raises ConfigError for a folder without a readable `config.json`, and CheckpointError when its weights are missing,
    damaged, or not the ones the config was written with.
    """
    folder, before = Path(folder), None
    while True:
        config = read_config(folder)
        wanted = _fingerprint_in(config)
        if wanted is None:
            return config, open_checkpoint(folder)
        for name in (_pending(wanted), WEIGHTS):
            try:
                found = open_checkpoint(inside(folder, name))
            except CheckpointError:
                if (folder / name).is_file():
                    raise
                continue  # it has no such file, or just lost it to a rename
            if found.metadata.get("fingerprint") == wanted:
                return config, found
        if wanted == before:
            break  # nobody is saving here: they really do not belong together
        before = wanted
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"folder {folder} has no {WEIGHTS}")
    raise CheckpointError(
        f"{folder / WEIGHTS} is not the file {CONFIG} was saved with: its fingerprint is "
        f"{open_checkpoint(folder / WEIGHTS).metadata.get('fingerprint', 'missing')}, expected {wanted}; "
        f"save the model again, or remove 'weights' from {CONFIG} if the file was replaced on purpose"
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """`config.json` of a folder, parsed. Raises ConfigError when it is missing, damaged or no table."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}")
    if not (folder / CONFIG).exists():
        raise ConfigError(f"folder {folder} has no {CONFIG}: it is not a model that was saved by this library")
    return read_json(inside(folder, CONFIG), MAX_CONFIG, ConfigError)


def inside(folder: Path, name: str) -> Path:
    """The file `name` directly in `folder`; CheckpointError for names and links that lead out of it.

    Links of the hub's cache are the exception: a snapshot is made of links into the `blobs` folder beside it.
    """
    if not name or name in (".", "..") or any(c in name for c in "/\\\0:"):
        raise CheckpointError(f"{folder} names the file {name!r}; expected a plain file name in that folder")
    path, home = folder / name, folder.resolve()
    if path.is_symlink():
        target = path.resolve()
        blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
        if not target.is_relative_to(home) and not (blobs and target.is_relative_to(blobs)):
            raise CheckpointError(f"{path} is a link that leaves its folder; refused, copy the file there instead")
    return path


class _Source(Protocol):
    def keys(self) -> Iterable[str]: ...
    def read(self, key: str) -> Tensor: ...
    def release(self) -> None: ...


class _Safetensors:
    """One safetensors file. The library checks the header: sizes, offsets, no holes; nothing in it can run."""

    def __init__(self, path: Path):
        self.path, self._stamp = path, _stamp(path)
        try:
            self._file: safe_open | None = safe_open(path, framework="pt")
            self._keys = list(self._file.keys())
            self.metadata = self._file.metadata() or {}
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            size = path.stat().st_size
            raise CheckpointError(f"{path} ({size} bytes) is damaged or truncated safetensors: {error}") from error
        _check_duplicates(path)

    def keys(self) -> Iterable[str]:
        return self._keys

    def read(self, key: str) -> Tensor:
        if self._file is None:
            _check_stamp(self.path, self._stamp)
            self._file = safe_open(self.path, framework="pt")
        try:
            return self._file.get_tensor(key)
        except (SafetensorError, RuntimeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path}: tensor {key!r} cannot be read: {error}") from error

    def release(self) -> None:
        self._file = None


class _Torch:
    """One `.pt` file, through `torch.load(weights_only=True)` and nothing else."""

    def __init__(self, path: Path):
        self.path, self._stamp = path, _stamp(path)
        self._mapped = zipfile.is_zipfile(path)
        if self._mapped:
            _check_archive(path)
        self._state: dict[str, Tensor] | None = self._load()
        self._keys = list(self._state)

    def keys(self) -> Iterable[str]:
        return self._keys

    def read(self, key: str) -> Tensor:
        if self._state is None:
            _check_stamp(self.path, self._stamp)
            self._state = self._load()
        return self._state[key]

    def release(self) -> None:
        if self._mapped:  # the old format is not mapped: its tensors are in memory already
            self._state = None

    def _load(self) -> dict[str, Tensor]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickle protocols: what cannot be read is an error below
                loaded = torch.load(self.path, map_location="cpu", weights_only=True, mmap=self._mapped)
        except Exception as error:  # the restricted reader fails in as many ways as a file can be wrong
            raise CheckpointError(_explain_torch(self.path, error)) from error
        return _state_dict(loaded, self.path)


def _open_shards(index: Path) -> Checkpoint:
    """Every shard is checked to be there, and to hold what the index says, before a tensor is read."""
    folder = index.parent
    table = read_json(index, MAX_JSON, CheckpointError).get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise CheckpointError(f"{index} has no 'weight_map' from tensor names to file names")
    names = sorted(set(table.values()))
    if bad := [name for name in names if Path(name).suffix != ".safetensors"]:
        raise CheckpointError(f"{index} names {bad[:5]}; shards are .safetensors files")
    paths = {name: inside(folder, name) for name in names}  # all names, before any file is opened
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are missing: {', '.join(missing[:5])}")
    sources = {}
    for name, path in paths.items():
        _check_head(path, ".safetensors")
        sources[name] = _Safetensors(path)
    found = {key: name for name, source in sources.items() for key in source.keys()}  # noqa: SIM118
    if wrong := sorted(key for key in table.keys() | found.keys() if table.get(key) != found.get(key)):
        raise CheckpointError(f"{index}: the shards do not hold what it says; {_some(wrong, 'tensor')}")
    total = sum(path.stat().st_size for path in paths.values())
    return Checkpoint(index, list(sources.values()), release_after=max(RELEASE_AFTER, total // 64))


def _check_head(path: Path, suffix: str) -> None:
    """Recognise what people download by mistake, and files named after another format."""
    size = path.stat().st_size
    if not size:
        raise CheckpointError(f"{path} is empty (0 bytes): truncated; download it again")
    with path.open("rb") as file:
        head = file.read(512)
    text = head.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git-LFS pointer, not weights; run `git lfs pull` or download the file")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise CheckpointError(f"{path} is an HTML page, not weights; the link led to a page, not to the file")
    zipped, pickled = head.startswith(b"PK\x03\x04"), head.startswith(b"\x80")
    if suffix == ".safetensors":
        # A safetensors file starts with the length of its header, which is below 100 MB: the fourth byte is small.
        if zipped or (pickled and size > 8 and int.from_bytes(head[:8], "little") > size):
            raise CheckpointError(f"{path} is a pickle under a safetensors name; refused")
        return
    if zipped and not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path} ({size} bytes) is truncated: its archive has no end; download it again")
    if not zipped and not pickled:
        raise CheckpointError(f"{path} ({size} bytes) is no PyTorch file: it starts with {head[:8]!r}")
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise CheckpointError(
            f"{path}: torch {torch.__version__} cannot read pickled weights safely; use safetensors or upgrade to "
            f"torch {oldest}"
        )


def _check_archive(path: Path) -> None:
    """The zip layer of a `.pt` file: no program inside, nothing compressed, nothing past the end."""
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise CheckpointError(f"{path} ({size} bytes) is a damaged or truncated archive: {error}") from error
    parts = {part for entry in entries for part in entry.filename.split("/")[1:2]}
    if "code" in parts or "constants.pkl" in parts:
        raise CheckpointError(f"{path} is a TorchScript program, not weights; nothing was run; save its state_dict()")
    if "data.pkl" not in parts:
        raise CheckpointError(f"{path} is a zip archive without a state dict")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"{path} is a compressed archive; PyTorch stores tensors uncompressed")
    if any(entry.header_offset + entry.file_size > size for entry in entries):
        raise CheckpointError(f"{path} ({size} bytes) is truncated: entries reach past its end")


def _explain_torch(path: Path, error: Exception) -> str:
    text, size = str(error), path.stat().st_size
    if re.search("unsupported", text, re.IGNORECASE) and "truncated" not in text:
        culprit = re.search(r"(?:GLOBAL|class) ([\w.]+)", text)
        what = f" ({culprit[1]})" if culprit else ""
        return f"{path} holds more than tensors{what}: a state dict expected, save model.state_dict(); nothing was run"
    return f"{path} ({size} bytes) is damaged or truncated: {text.splitlines()[0] if text else type(error).__name__}"


def _state_dict(loaded: object, path: Path) -> dict[str, Tensor]:
    """The flat dictionary of tensors in what was loaded: unwrapped, prefixes of wrappers taken off."""
    for _ in WRAPPERS:  # as deep as there are wrappers
        inner = (loaded.get(name) for name in WRAPPERS) if isinstance(loaded, Mapping) else iter(())
        wrapped = next((value for value in inner if isinstance(value, Mapping) and value), None)
        if wrapped is None:
            break
        loaded = wrapped
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; a state dict expected")
    bad = [str(key) for key, value in loaded.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if bad or not loaded:
        entries = _some(bad, "entry", "entries")
        raise CheckpointError(f"{path}: a state dict expected; {entries} of {len(loaded)} hold no tensor")
    state = {str(key): value.detach() for key, value in loaded.items()}
    for key, value in state.items():
        # A tensor of more elements than its storage would be a small file that unfolds to any size.
        plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        if not plain or value.nbytes > value.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {key!r} is no plain dense tensor")
    while prefix := next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _check_duplicates(path: Path) -> None:
    """The library lets the last of two entries of one name win; a file with two meanings is refused."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = file.read(length)
    try:
        json.loads(header, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its safetensors header is not sound: {error}") from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} is there twice")
    return table


def read_json(path: Path, limit: int, error: type[ValueError]) -> dict[str, Any]:
    size = path.stat().st_size
    if size > limit:
        raise error(f"{path} is {size} bytes; at most {limit} are read")
    try:
        data = json.loads(path.read_bytes(), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path} is not sound JSON: {cause}") from cause
    if not isinstance(data, dict):
        raise error(f"{path} holds a {type(data).__name__}; expected a table")
    return data


def _stamp(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _check_stamp(path: Path, stamp: tuple[int, int, int]) -> None:
    if not path.exists() or _stamp(path) != stamp:
        raise CheckpointError(f"{path} changed while it was read; load it again")


# --- Converting ------------------------------------------------------------------------------------------------------


def keep(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Rule:
    """One line of a conversion table, usable in both directions.

    theirs, ours  a name, or several that are changed together; `*` stands for one dotted part, a final `**` for all
                  that follow, and both are carried over
    ours          None: known, and not wanted
    change, back  tensors of one side, in the order of the names, to those of the other; a plain rename needs neither.
                  A rule that changes values and has no `back` is read only.

        Rule("transformer.resblocks.*.ln_1.*", "blocks.*.norm1.*")
        Rule("proj", "project.weight", lambda t: t.T, lambda t: t.T)
        Rule(("q.weight", "kv.weight"), "qkv.weight", lambda q, kv: torch.cat([q, kv]), lambda t: t.split([D, 2 * D]))
    """

    theirs: str | tuple[str, ...]
    ours: str | tuple[str, ...] | None
    change: Callable[..., Tensor | Sequence[Tensor]] = keep
    back: Callable[..., Tensor | Sequence[Tensor]] | None = None

    def __post_init__(self) -> None:
        stars = {name.count("*") for name in (*_tuple(self.theirs), *_tuple(self.ours or self.theirs))}
        if self.ours is not None and len(stars) != 1:
            raise ValueError(f"the names of {self} differ in their wildcards")
        if self.change is keep and len(_tuple(self.theirs)) != len(_tuple(self.ours or self.theirs)):
            raise ValueError(f"{self} joins or splits tensors and does not say how")

    def prefixed(self, theirs: str = "", ours: str = "") -> "Rule":
        """The same rule one level down on either side."""
        names = tuple(theirs + name for name in _tuple(self.theirs))
        mine = None if self.ours is None else tuple(ours + name for name in _tuple(self.ours))
        return Rule(names, mine, self.change, self.back)


Table = Sequence[Rule]


def prefixed(table: Table, theirs: str = "", ours: str = "") -> tuple[Rule, ...]:
    return tuple(rule.prefixed(theirs, ours) for rule in table)


# Our name: the change, the names it takes, and which of its results to use where there are several.
Plan = dict[str, tuple[Callable[..., Any], list[str], int | None]]


class Converted(Mapping[str, Tensor]):
    """A state dict seen through a table. Tensors are read and changed when they are asked for.

    unknown  keys that no rule knows; always empty unless `convert` was told `strict=False`
    """

    def __init__(self, state: Mapping[str, Tensor], plan: "Plan", unknown: Sequence[str] = ()):
        self.state, self.unknown, self._plan = state, list(unknown), plan
        self.path = getattr(state, "path", None)
        self.release_after = getattr(state, "release_after", RELEASE_AFTER)

    def __getitem__(self, key: str) -> Tensor:
        change, sources, index = self._plan[key]
        try:
            result = change(*(self.state[source] for source in sources))
            return result if index is None else result[index]
        except (RuntimeError, IndexError, TypeError) as error:  # a shape the change was not made for
            shapes = ", ".join(f"{source} {tuple(self.state[source].shape)}" for source in sources)
            raise CheckpointError(f"{shapes} cannot become {key}: {error}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._plan)

    def __len__(self) -> int:
        return len(self._plan)

    def __contains__(self, key: object) -> bool:
        return key in self._plan

    def release(self) -> None:
        _release(self.state)


def convert(
    state: Mapping[str, Tensor], table: Table, *, back: bool = False, strict: bool = True, origin: object = None
) -> Converted:
    """A foreign state dict in our names, or with `back=True` ours in foreign names.

    Raises CheckpointError for a key that no rule knows, for one of several that belong together, and for two keys that
    become one. With `strict=False` the first two are listed in `unknown` instead.
    """
    where = f"{origin}: " if origin else ""
    rules = []
    for rule in table:
        theirs, ours = _tuple(rule.theirs), None if rule.ours is None else _tuple(rule.ours)
        if not back:
            rules.append((theirs, ours, rule.change))
        elif ours is not None:
            undo = keep if rule.change is keep else rule.back
            rules.append((ours, theirs, undo or _read_only(rule)))
    patterns = [[re.compile(_pattern(name)) for name in sources] for sources, _, _ in rules]

    groups: dict[tuple[int, tuple[str, ...]], dict[int, str]] = {}
    strange = []
    for key in state:
        for n, alternatives in enumerate(patterns):
            found = next(((i, m) for i, p in enumerate(alternatives) if (m := p.fullmatch(key))), None)
            if found:
                groups.setdefault((n, found[1].groups()), {})[found[0]] = key
                break
        else:
            strange.append(key)
    if strange and strict:
        raise CheckpointError(f"{where}{_some(strange, 'key')} of {len(state)} match no rule")

    plan: Plan = {}
    for (n, parts), keys in groups.items():
        sources, targets, change = rules[n]
        if targets is None:
            continue
        if missing := [_fill(name, parts) for i, name in enumerate(sources) if i not in keys]:
            if not strict:
                strange.extend(keys.values())
                continue
            raise CheckpointError(f"{where}{_some(missing, 'key')} missing, which go with {', '.join(keys.values())}")
        for i, target in enumerate(targets):
            name = _fill(target, parts)
            if name in plan:
                both = " and ".join([*keys.values(), *plan[name][1]])
                raise CheckpointError(f"{where}{both} become one: {name}")
            plan[name] = (change, [keys[i] for i in sorted(keys)], i if len(targets) > 1 else None)
    return Converted(state, plan, strange)


def _read_only(rule: Rule) -> Callable[..., Any]:
    def refuse(*_: Tensor) -> Tensor:
        raise CheckpointError(f"{rule.ours} cannot be written as {rule.theirs}: the rule is read only")

    return refuse


def _pattern(name: str) -> str:
    return re.escape(name).replace(r"\*\*", "(.+)").replace(r"\*", r"([^.]+)")


def _fill(name: str, parts: tuple[str, ...]) -> str:
    values = iter(parts)
    return re.sub(r"\*\*?", lambda _: next(values), name)


def _tuple(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _release(state: Mapping[str, Tensor]) -> None:
    if isinstance(state, Checkpoint | Converted):
        state.release()


# --- Loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadReport:
    """What a load found beside the tensors it used. All empty after a strict load of sound weights.

    missing      parameters the file has no tensor for; they keep their random start
    unexpected   tensors of the file that the model has no place for
    not_finite   parameters that hold NaN or infinity, as far as was looked
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    not_finite: list[str] = field(default_factory=list)


def load_into(
    build: Callable[[], nn.Module],
    state: Mapping[str, Tensor] | Callable[[list[str]], Mapping[str, Tensor]],
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    strict: bool = True,
    check_finite: bool = False,
    origin: object = None,
) -> tuple[nn.Module, LoadReport]:
    """The model that `build` makes, with the tensors of `state`.

    build         called on the meta device, so it allocates nothing
    state         a state dict in the model's names, or a function from those names to one
    dtype         of the floating-point parameters; None keeps what is stored
    strict        False: missing and unexpected names are warned about and reported; wrong shapes are refused even so
    check_finite  look at every element for NaN and infinity and refuse them; otherwise small tensors and a sample of
                  the large ones are looked at, with a warning
    origin        what to call the weights in messages

    Peak memory is 1x the weights in `dtype`: tensors are assigned one by one, cast one by one, and the mapped pages of
    what was copied are handed back. Raises CheckpointError before the first tensor is read when names or shapes differ.
    """
    with shapes_only():
        model = build()
    slots = _slots(model)
    if not isinstance(state, Mapping):
        state = state(list(model.state_dict()))
    where = origin or getattr(state, "path", None) or "the state dict"
    names = {name for aliases in slots for name in aliases}
    missing = [aliases[0] for aliases in slots if not any(name in state for name in aliases)]
    report = LoadReport(missing, [*getattr(state, "unknown", ()), *(key for key in state if key not in names)])
    if report.missing or report.unexpected:
        _mismatch(report, f"{where} does not fit {type(model).__name__}", strict)
    _check_shapes(model, state, slots, where)
    _fill_missing(model, build, report.missing, dtype, device)

    copied, budget = 0, getattr(state, "release_after", RELEASE_AFTER)
    for aliases in slots:
        present = [name for name in aliases if name in state]
        if not present:
            continue
        stored = state[present[0]]
        tensor = stored.to(device=device, dtype=dtype if stored.is_floating_point() else None).contiguous()
        if any(not torch.equal(stored, state[other]) for other in present[1:]):
            raise CheckpointError(f"{where}: {' and '.join(present)} are one parameter in the model and differ here")
        if tensor.data_ptr() != stored.data_ptr():
            copied += stored.nbytes
        _assign(model, aliases, tensor)
        del stored
        if copied >= budget:
            _release(state)
            copied = 0
    _release(state)
    report.not_finite.extend(not_finite(model, whole=check_finite))
    if report.not_finite:
        message = f"{where}: NaN or infinity in {_some(report.not_finite, 'tensor')}"
        if check_finite:
            raise CheckpointError(message)
        message += "; the file is damaged, or the training diverged"
        warnings.warn(CheckpointWarning(message, report), stacklevel=2)
    return model, report


@torch.no_grad()
def not_finite(model: nn.Module, *, whole: bool = True) -> list[str]:
    """Names of parameters that hold NaN or infinity.

    whole   look at every element. False: at every element of the smallest tensors up to a few megabytes, and at a few
            rows of the others: weights that went bad in training, or a file that was cut, are found; one bit is not.
    """
    left, bad = FINITE_BUDGET, []
    checkable = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    tensors = [(name, t) for name, t in model.named_parameters() if t.dtype in checkable and t.numel()]
    for name, tensor in sorted(tensors, key=lambda item: item[1].nbytes):
        left -= tensor.nbytes
        if not whole and left < 0:
            rows = tensor.flatten(0, -2) if tensor.ndim > 1 else tensor
            tensor = rows[:: max(1, len(rows) // 4)]
        # One pass: a sum is finite unless an element is not, or it overflows; only then is each element looked at.
        if not torch.isfinite(tensor.sum(dtype=torch.float32)) and not torch.isfinite(tensor).all():
            bad.append(name)
    return bad


def _slots(model: nn.Module) -> list[list[str]]:
    """The names of each parameter and persistent buffer; tied ones have several."""
    groups: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(tensor), []).append(name)
    return list(groups.values())


def _check_shapes(model: nn.Module, state: Mapping[str, Tensor], slots: list[list[str]], where: object) -> None:
    wanted, wrong = model.state_dict(keep_vars=True), []
    for aliases in slots:
        for name in aliases:
            if name in state and (given := state[name].shape) != wanted[name].shape:
                wrong.append(f"{name} is {tuple(given)}, expected {tuple(wanted[name].shape)}")
            elif name in state and state[name].is_floating_point() != wanted[name].is_floating_point():
                wrong.append(f"{name} is {state[name].dtype}, expected {wanted[name].dtype}")
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise CheckpointError(f"{where} has other shapes than {type(model).__name__}: {'; '.join(wrong[:5])}{more}")


def _mismatch(report: LoadReport, what: str, strict: bool) -> None:
    parts = []
    if report.missing:
        parts.append(f"missing {_some(report.missing, 'parameter')}")
    if report.unexpected:
        parts.append(f"not known {_some(report.unexpected, 'key')}")
    message = f"{what}: {'; '.join(parts)}"
    if strict:
        raise CheckpointError(message)
    warnings.warn(CheckpointWarning(f"{message}; loaded the rest (strict=False)", report), stacklevel=3)


def _fill_missing(
    model: nn.Module,
    build: Callable[[], nn.Module],
    missing: list[str],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> None:
    """Give real values to what the file cannot: missing parameters (strict=False) and buffers that are never saved."""
    saved = set(model.state_dict(keep_vars=True))
    computed = [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in saved]
    if not missing and not computed:
        return
    twin = build()
    real = {**dict(twin.named_parameters(remove_duplicate=False)), **dict(twin.named_buffers(remove_duplicate=False))}
    for name in missing:
        _assign(model, [name], real[name].detach().to(device, dtype if real[name].is_floating_point() else None))
    for name in computed:
        _assign(model, [name], real[name].to(device))


def _assign(model: nn.Module, aliases: list[str], tensor: Tensor) -> None:
    """Put one tensor in all the places that share it."""
    parameter: nn.Parameter | None = None
    for name in aliases:
        owner, leaf = _owner(model, name), name.rpartition(".")[2]
        if leaf in owner._parameters:
            old = owner._parameters[leaf]
            if parameter is None:
                parameter = nn.Parameter(tensor, requires_grad=old is None or old.requires_grad)
            owner._parameters[leaf] = parameter
        else:
            owner._buffers[leaf] = tensor


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _some(names: Sequence[str], one: str, many: str | None = None) -> str:
    """`7 keys (a, b, c, d, e, ...)`"""
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return f"{len(names)} {one if len(names) == 1 else many or one + 's'} ({shown})"


# --- Writing ---------------------------------------------------------------------------------------------------------


def write_safetensors(path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """Write one safetensors file, tensor by tensor, and return its fingerprint, which it also carries in its header.

    The fingerprint is the sha256 of the file with the fingerprint itself left out: the same tensors give the same
    file. The first tensor starts at a multiple of 64 bytes, so a mapped file is read aligned. Not atomic: see
    `save_folder` and `atomic_write`. Format: https://github.com/huggingface/safetensors#format
    """
    blank = "0" * 64
    header: dict[str, Any] = {"__metadata__": {"fingerprint": blank, **(metadata or {}), "format": "pt"}}
    keys = sorted(state, key=lambda key: (-state[key].element_size(), key))  # large elements first keeps all aligned
    offset = 0
    for key in keys:
        tensor = state[key]
        if tensor.dtype not in DTYPE_CODES or tensor.is_meta or tensor.layout != torch.strided:
            raise CheckpointError(f"cannot write {key!r}: a {tensor.dtype} tensor on {tensor.device}")
        header[key] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.numel() * tensor.element_size()],
        }
        offset += tensor.numel() * tensor.element_size()
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(len(text) + 8) % 64)
    head = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(head)
    with Path(path).open("wb") as file:
        file.write(head)
        for key in keys:
            plain = state[key].detach().to("cpu").contiguous().reshape(-1)
            data = memoryview(plain.view(torch.uint8).numpy()) if plain.numel() else memoryview(b"")
            digest.update(data)
            file.write(data)
        fingerprint = digest.hexdigest()
        file.seek(head.index(blank.encode()))
        file.write(fingerprint.encode())
    return fingerprint


def save_folder(
    folder: str | Path, state: Mapping[str, Tensor], config: Mapping[str, Any], *, replace: bool = True
) -> None:
    """Write `config.json` and `model.safetensors` so that at every instant the folder holds one whole checkpoint.

    Two files cannot be replaced at once, so the config decides: it names the fingerprint of its weights. The new
    weights are written under a name of their own, then the config is replaced (from here on the folder is the new
    checkpoint: `read_folder` finds those weights), then the weights take their usual name. A process killed anywhere
    leaves the old or the new checkpoint, and what else it left is removed by the next save. Saves of several processes
    into one folder wait for each other.

    replace  False: ConfigError where the folder holds anything but this very model
    """
    folder = Path(folder)
    if not replace:
        check_vacant(folder, CONFIG, config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _finish_last_save(folder)
            _save(folder, state, config, replace)
    except OSError as error:
        raise CheckpointError(f"cannot save to {folder}: {error}; what was there before is unharmed") from error


# What folders of any layout say of their model; and what in it is not the model's: how it is stored.
CONFIGS = (CONFIG, "open_clip_config.json", "params.json")
STORED = {"weights", "tokenizer", "name", "dtype", "torch_dtype", "model_dtype", "transformers_version"}


def check_folder(path: Path, what: str) -> None:
    """ConfigError when `path` is a file, or is called as a file of weights would be, and `what` is a folder."""
    suffixes = (".safetensors", *TORCH_SUFFIXES)
    if path.suffix in suffixes or (path.exists() and not path.is_dir()):
        why = f"a name without {path.suffix}" if path.suffix in suffixes else "another name, for this is a file"
        raise ConfigError(f"{path}: {what} is a folder; give {why}")


def check_vacant(folder: Path, name: str = "", config: Mapping[str, Any] | None = None) -> None:
    """ConfigError when `folder` holds a model, in any layout.

    name, config  what is about to be written: one of this shape may be there, for its weights will be compared
    """
    for there in CONFIGS:
        if (folder / there).exists() and not (there == name and config is not None and _is_of(folder, there, config)):
            raise _occupied(folder, there)


def _occupied(folder: Path, there: str) -> ConfigError:
    return ConfigError(
        f"{folder} holds a model already, as its {there} says; give another folder, or replace it with --force "
        "(in Python, replace=True)"
    )


def _is_of(folder: Path, name: str, config: Mapping[str, Any]) -> bool:
    try:
        found = read_json(inside(folder, name), MAX_CONFIG, ConfigError)
    except (ConfigError, CheckpointError):
        return False
    return _model_of(found) == _model_of(json.loads(json.dumps(config)))


def _model_of(config: Any) -> Any:
    """A config without what says how it is stored."""
    if not isinstance(config, dict):
        return config
    return {key: _model_of(value) for key, value in config.items() if key not in STORED}


def _save(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any], replace: bool) -> None:
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=".safetensors", dir=folder)
    os.close(handle)
    temporary = Path(name)
    try:
        fingerprint = write_safetensors(temporary, state)
        if not replace and (folder / CONFIG).exists() and _fingerprint_in(read_config(folder)) != fingerprint:
            raise _occupied(folder, CONFIG)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        with atomic_write(folder / CONFIG) as new:
            new.write_text(json.dumps({**config, "weights": {"fingerprint": fingerprint}}, indent=2) + "\n", "utf-8")
            temporary.replace(folder / _pending(fingerprint))
            sync_folder(folder)
        (folder / _pending(fingerprint)).chmod((folder / CONFIG).stat().st_mode & 0o777)
        (folder / _pending(fingerprint)).replace(folder / WEIGHTS)
        sync_folder(folder)
    finally:
        temporary.unlink(missing_ok=True)


def _finish_last_save(folder: Path) -> None:
    """Under the lock: give weights that a killed save left their usual name, and remove the rest of what it left."""
    try:
        wanted = _fingerprint_in(read_config(folder))
    except (ConfigError, CheckpointError):
        wanted = None
    if wanted and (folder / _pending(wanted)).is_file():
        (folder / _pending(wanted)).replace(folder / WEIGHTS)
    sweep_temporaries(folder)
    for path in folder.glob("model.*.safetensors"):
        if re.fullmatch(r"model\.[0-9a-f]{64}\.safetensors", path.name):
            path.unlink(missing_ok=True)


def _fingerprint_in(config: Mapping[str, Any]) -> str | None:
    weights = config.get("weights")
    if weights is None:
        return None
    value = weights.get("fingerprint") if isinstance(weights, dict) and len(weights) == 1 else None
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ConfigError(f"'weights' of {CONFIG} is {repr(weights)[:80]}; expected {{'fingerprint': 64 hex digits}}")
    return value


def _pending(fingerprint: str) -> str:
    return f"model.{fingerprint}.safetensors"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One save at a time in a folder. The lock is on the folder itself, so a killed process leaves none behind."""
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
