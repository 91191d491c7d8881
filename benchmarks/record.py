"""One way to write a result down: what was run, on what, with which versions, and the spread."""

import json
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from perception.files import atomic_write

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "pillow", "safetensors")


def record(name: str, result: dict[str, Any], packages: tuple[str, ...] = PACKAGES) -> Path:
    """Write `results/NAME.json` and return its path."""
    path = RESULTS / f"{name}.json"
    facts = {
        "command": " ".join(["python", *(os.path.relpath(a, ROOT) if a.endswith(".py") else a for a in sys.argv)]),
        "commit": git("rev-parse", "HEAD"),
        "clean": clean(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **versions(packages)},
    }
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps({**facts, **result}, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path


def spread(values: list[float], digits: int = 4) -> dict[str, float | int]:
    """Median, least and most of some runs."""
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
        "runs": len(values),
    }


def clean() -> bool:
    """Whether the code is the commit's; what benchmarks themselves write does not count."""
    written = (":!benchmarks/results", ":!benchmarks/scale.md", ":!README.md")
    return not git("status", "--porcelain", "--untracked-files=no", "--", ".", *written)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    return {package: _version(package) for package in packages}


def machine() -> str:
    """Processor, cores and memory, as Linux tells them."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
