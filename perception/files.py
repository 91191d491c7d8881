"""Files that are whole or not there: temporary name, fsync, rename."""

import hashlib
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY = ".perception-tmp-"
_UMASK = threading.Lock()


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=TEMPORARY, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut. Systems that cannot open a folder do without."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sweep_temporaries(folder: str | Path, older_than: float = 0.0) -> list[Path]:
    """Remove what a killed `atomic_write` left in `folder`, if last touched `older_than` seconds ago or earlier."""
    removed = []
    for path in Path(folder).glob(f"{TEMPORARY}*"):
        if path.is_file() and time.time() - path.stat().st_mtime >= older_than:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def sha256_of(path: str | Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _umask() -> int:
    # The only way to read it is to set it. It is the whole process's: of two threads in between, one would read and
    # put back what the other has set.
    with _UMASK:
        mask = os.umask(0o022)
        os.umask(mask)
    return mask
