"""Checkpoints of a run: sharded tensors and a page of facts in a fresh folder, which counts once its marker is there.

    checkpoints/step-00000500/   *.distcp, .metadata    the tensors, by torch's distributed checkpoint
                                 run.json               numbers, seeds, fingerprints
                                 COMPLETE               written last: the sizes of all files

A save that is cut leaves a folder without a marker, which nobody reads and the next save removes. Any number of
processes can load what any number saved.
"""

import json
import logging
import os
import pickle
import re
import shutil
import stat
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perception.errors import CheckpointError
from perception.files import atomic_write, sync_folder
from perception.settings import check_range
from perception.training.distributed import World

log = logging.getLogger(__name__)
MARKER, FACTS = "COMPLETE", "run.json"
MAX_FACTS = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class KeepConfig:
    """When checkpoints are written, and which of them stay.

    steps    between two of them; 0: none by steps
    minutes  between two of them; 0: none by the clock
    keep     the newest that stay
    mark     every so many steps one stays for good; 0: none
    """

    steps: int = 500
    minutes: float = 0.0
    keep: int = 2
    mark: int = 0

    def __post_init__(self) -> None:
        check_range("keep.steps", self.steps, 0, 10**12)
        check_range("keep.minutes", self.minutes, 0, 10**6)
        check_range("keep.keep", self.keep, 1, 10**6)
        check_range("keep.mark", self.mark, 0, 10**12)


class Checkpoints:
    """The checkpoints under a folder."""

    def __init__(self, folder: str | Path, keep: KeepConfig | None = None, world: World | None = None):
        self.folder, self.keep, self.world = Path(folder), keep or KeepConfig(), world or World()

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08}"

    def steps(self) -> list[int]:
        """Those that are whole, oldest first."""
        found = []
        for path in self.folder.glob("step-*") if self.folder.is_dir() else ():
            if (name := re.fullmatch(r"step-(\d{8,})", path.name)) and is_whole(path):
                found.append(int(name[1]))
        return sorted(found)

    def latest(self) -> Path | None:
        """The newest whole one, the same for every process."""
        steps = self.world.same(self.steps() if self.world.first else None)
        return self.path(steps[-1]) if steps else None

    def save(self, step: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
        """Write one, then remove what the rule does not keep. All processes call it together.

        Raises CheckpointError when the disk refuses; what was there before still is.
        """
        path, failed = self.path(step), ""
        if self.world.first:
            shutil.rmtree(path, ignore_errors=True)
            try:
                path.mkdir(parents=True)
            except OSError as error:
                failed = f"{path}: {error.strerror}"
        self._agree(failed)
        try:
            self._write(path, tensors)
        except Exception as error:
            failed = f"{path}: {_last_line(error)}"
        if self.world.any(bool(failed)):
            self._give_up(path, failed)
        if self.world.first:
            try:
                with atomic_write(path / FACTS) as temporary:
                    temporary.write_text(json.dumps(facts), encoding="utf-8")
                mark(path)
            except OSError as error:
                failed = f"{path}: {error.strerror}"
        if self.world.any(bool(failed)):
            self._give_up(path, failed)
        self._purge(step)
        return path

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed import checkpoint as dcp

        try:
            with _one_process_is_fine():
                dcp.save(
                    dict(tensors),
                    storage_writer=dcp.FileSystemWriter(path, single_file_per_rank=True),
                    no_dist=not self.world.grouped,
                )
        except dcp.CheckpointException as error:  # a BaseException: who catches errors would not see it
            raise OSError(_last_line(error)) from error

    def _agree(self, failed: str) -> None:
        if self.world.any(bool(failed)):
            raise CheckpointError(f"no checkpoint was written; {failed or 'another process could not'}")

    def _give_up(self, path: Path, failed: str) -> None:
        if self.world.first:
            shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError(
            f"no checkpoint was written ({failed or 'another process could not'}); free space. Earlier ones are intact"
        )

    def _purge(self, newest: int) -> None:
        if not self.world.first:
            return
        steps = self.steps()
        stay = set(steps[-max(1, self.keep.keep) :]) | {newest}
        if self.keep.mark:
            stay |= {step for step in steps if step % self.keep.mark == 0}
        for path in self.folder.glob("step-*"):
            name = re.fullmatch(r"step-(\d{8,})", path.name)
            if name and int(name[1]) not in stay and (int(name[1]) in steps or not is_whole(path)):
                (path / MARKER).unlink(missing_ok=True)  # first: half a removal must not look whole
                shutil.rmtree(path, ignore_errors=True)


def mark(path: Path) -> None:
    """Say that a folder is whole, once all it holds has reached the disk."""
    sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.name != MARKER}
    sync_folder(path)
    with atomic_write(path / MARKER) as temporary:
        temporary.write_text(json.dumps({"version": 1, "files": sizes}), encoding="utf-8")


def is_whole(path: str | Path) -> bool:
    """Whether a folder is a checkpoint that was finished and has not lost a file since."""
    path = Path(path)
    try:
        files = json.loads((path / MARKER).read_text(encoding="utf-8"))["files"]
        return all((path / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def find_checkpoint(path: str | Path) -> Path | None:
    """A checkpoint, by its own folder or its run's (the newest whole one); None for a folder that is neither."""
    path = Path(path)
    if is_whole(path):
        return path
    for folder in (path, path / "checkpoints"):
        if steps := Checkpoints(folder).steps():
            return Checkpoints(folder).path(steps[-1])
    return None


def read_facts(path: Path) -> dict[str, Any]:
    """The page of facts of a checkpoint. Raises CheckpointError for one that is damaged."""
    try:
        if (path / FACTS).stat().st_size > MAX_FACTS:
            raise CheckpointError(f"{path / FACTS} is too large")
        facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / FACTS} cannot be read: {error}") from error
    if not isinstance(facts, dict):
        raise CheckpointError(f"{path / FACTS} holds no table")
    return facts


def tensor_shapes(path: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name to shape and dtype of all tensors of a checkpoint. Raises CheckpointError for what is no checkpoint."""
    entries = _read_metadata(path).state_dict_metadata
    return {name: (entry.size, entry.properties.dtype) for name, entry in entries.items()}


def load_tensors(path: Path, tensors: dict[str, Tensor], world: World | None = None) -> None:
    """Fill tensors, plain or sharded, from a checkpoint of any number of processes.

    Nothing is ever executed: torch keeps the index of the files as a pickle, which is read here with a reader that
    knows the few classes of such an index and nothing else (F-122). Raises CheckpointError for a checkpoint that lacks
    a tensor or holds it in another shape.
    """
    known = tensor_shapes(path)
    for name, tensor in tensors.items():
        if name not in known:
            raise CheckpointError(f"{path} has no {name!r}; it is of another model or optimizer")
        if known[name][0] != tensor.shape:
            raise CheckpointError(f"{path}: {name!r} is {tuple(known[name][0])}, expected {tuple(tensor.shape)}")
    from torch.distributed import checkpoint as dcp

    try:
        with _one_process_is_fine():
            dcp.load(tensors, storage_reader=_reader(path), no_dist=world is None or not world.grouped)
    except (dcp.CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {_last_line(error)}") from error


# --- reading torch's index without running what it says --------------------------------------------------------------

_PLAIN = {
    "torch": {"Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "TensorStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "ChunkStorageMetadata",
        "MetadataIndex", "StorageMeta",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path"},
    "collections": {"OrderedDict"},
}  # fmt: skip


class _Plain(pickle.Unpickler):
    """A pickle of the classes above; anything else is refused before it is looked up."""

    def find_class(self, module: str, name: str) -> Any:
        for known, names in _PLAIN.items():
            # Some classes are nested: "TensorProperties" may come by its module, or by its owner.
            if module == known and name.split(".")[0] in names:
                return super().find_class(module, name)
        raise CheckpointError(f"the index of the checkpoint names {module}.{name}, which no index needs; refused")


def _read_metadata(path: Path) -> Any:
    _check_owner(path)
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _Plain(file).load()
        entries, places = metadata.state_dict_metadata, metadata.storage_data.values()
    except CheckpointError:
        raise
    except Exception as error:  # whatever a damaged pickle raises
        raise CheckpointError(f"{path} is no checkpoint: its index cannot be read ({_last_line(error)})") from error
    if strange := [name for name, entry in entries.items() if type(entry).__name__ != "TensorStorageMetadata"]:
        raise CheckpointError(f"{path} holds more than tensors, such as {strange[0]!r}; refused")
    if strange := [place for place in places if not re.fullmatch(r"__\d+_\d+\.distcp", place.relative_path)]:
        raise CheckpointError(f"{path} names the file {strange[0].relative_path!r}; refused")
    return metadata


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    class Reader(FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return _read_metadata(path)

    return Reader(path)


def _check_owner(path: Path) -> None:
    """Warn about a folder that others can change: a checkpoint is a run's own, not something to be handed around."""
    try:
        found = path.stat()
    except OSError:
        return
    if found.st_mode & stat.S_IWOTH:
        log.warning("%s can be written by everybody; a checkpoint of a run should be its owner's alone", path)
    # What the administrator wrote is as safe as the system itself. Windows knows no such numbers.
    if hasattr(os, "geteuid") and found.st_uid not in (0, os.geteuid()):
        log.warning(
            "%s is another user's (number %d), who can change it; go on with runs of your own", path, found.st_uid
        )


@contextmanager
def _one_process_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _last_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"
