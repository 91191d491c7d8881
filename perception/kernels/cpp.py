"""The compiled CPU kernels: built on demand, from source, on the machine that runs them. Nothing here is required."""

import functools
import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent / "cpu"
FLAGS = ["-O3", "-march=native", "-fopenmp", "-std=c++20", "-ffp-contract=fast"]
STALE = 3600.0  # seconds after which what a build left behind is taken for rubbish


def kernels(build: bool = True) -> Any | None:
    """`torch.ops.perception` with the compiled operators, or None where they are not to be had.

    build  compile them if they were not compiled before (once a machine); False takes them only
           when they are there

    The library lies in torch's extension cache under a name that carries a hash of the sources, the flags, torch's
    version and the processor's instructions, so an old one is never loaded. Each build has a directory of its own, and
    what it made is moved to its place whole: no build waits for another one, dead or alive. A failure, also that of a
    cache which cannot be written or read, is logged once and remembered.
    """
    if (loaded := _load()) is not None or not build:
        return loaded
    return _build()


def has_compiler() -> bool:
    """Whether a C++ compiler and ninja are here."""
    return bool(shutil.which(os.environ.get("CXX", "c++")) and shutil.which("ninja"))


@functools.cache
def library() -> Path:
    """Where the shared library is, or would be."""
    digest = hashlib.sha256(f"{torch.__version__} {sys.version_info[:2]} {FLAGS} {_processor()}".encode())
    for path in sorted(SOURCES.glob("*")):
        digest.update(path.name.encode() + path.read_bytes())
    name = f"perception_cpu_{digest.hexdigest()[:16]}"
    home = os.path.expanduser("~")  # noqa: PTH111 -- Path.home() raises where nobody has a home
    if not os.path.isabs(home):  # noqa: PTH117 -- nobody's home: never below the directory we happen to stand in
        home = os.devnull
    cache = os.environ.get("XDG_CACHE_HOME") or Path(home) / ".cache"
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path(cache) / "torch_extensions"
    return Path(root) / name / f"{name}.so"


_loaded: dict[Path, Any] = {}
_failed: set[Path] = set()


def _load() -> Any | None:
    path = library()
    if path not in _loaded and path not in _failed:
        try:
            if path.is_file():
                torch.ops.load_library(str(path))
                _loaded[path] = torch.ops.perception
        except OSError as error:  # no library, or a directory that may not be read
            _fail(path, error)
    return _loaded.get(path)


def _build() -> Any | None:
    path = library()
    if path in _failed:
        return None
    sources = sorted(SOURCES.glob("*.cpp"))
    if not sources or not has_compiler():
        _fail(path, "no C++ compiler and ninja here" if sources else "no sources")
        return None
    try:
        from torch.utils.cpp_extension import load

        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-", ignore_cleanup_errors=True) as build:
            load(
                path.stem,
                [str(source) for source in sources],
                extra_cflags=FLAGS,
                extra_ldflags=["-fopenmp"],
                build_directory=build,
                is_python_module=False,
            )
            (Path(build) / path.name).replace(path)
    except Exception as error:  # compilers fail in their own ways
        _fail(path, error)
        return None
    _loaded[path] = torch.ops.perception
    return _loaded[path]


def _fail(path: Path, why: object) -> None:
    _failed.add(path)
    log.warning("compiled CPU kernels are not available, plain operators are used: %s", str(why).strip()[-400:])


def _sweep(directory: Path) -> None:
    """Remove what killed builds left."""
    for left in directory.glob("build-*"):
        try:
            if time.time() - left.stat().st_mtime > STALE:
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # another process was quicker
            pass


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}"
