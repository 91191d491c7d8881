"""perception <- perception_encoder <- perception_lm, and never back; nothing heavy before it is used."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from perception import doctor

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "perception": set(),
    "perception_encoder": {"perception"},
    "perception_lm": {"perception", "perception_encoder"},
}
FILES = sorted(path for package in MAY_IMPORT for path in (ROOT / package).rglob("*.py"))
HEAVY = [
    "timm",
    "open_clip",
    "torchvision",
    "transformers",
    "faiss",
    "torchcodec",
    "av",
    "huggingface_hub",
    "typer",
    "ftfy",
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    assert not (names & MAY_IMPORT.keys()) - MAY_IMPORT[package] - {package}


def test_the_doctor_knows_every_extra() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    everything = extras.pop("all")[0].partition("[")[2].rstrip("]").split(",")
    del extras["dev"]
    assert set(extras) == set(doctor.EXTRAS) == set(everything)


def test_import_leaves_the_heavy_packages_out() -> None:
    code = "import sys, json, perception_encoder; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert "perception_encoder.clip" in loaded  # the names are really there, not put off
    assert not [name for name in HEAVY if name in loaded]


def test_import_costs_little_more_than_torch() -> None:
    """Hardly more than torch, in seconds of the processor: what else runs on the machine adds little to those.

    On an idle machine it is to be 0.15 s, which `benchmarks/import_time.py` judges; a busy one shares its caches, so
    there is room here. The least of seven runs of each, in turn.
    """

    def seconds(code: str) -> float:
        before = os.times()
        subprocess.run([sys.executable, "-c", code], check=True)
        after = os.times()
        return after.children_user - before.children_user + after.children_system - before.children_system

    seconds("import perception_encoder")  # fill the page cache and write the .pyc files
    pairs = [(seconds("import perception_encoder"), seconds("import torch")) for _ in range(7)]
    ours, torchs = (min(column) for column in zip(*pairs, strict=True))
    # A processor shared by two threads or throttled is slower for both: the room grows with torch's own time.
    room = 0.25 * max(1.0, torchs / 1.4)
    assert ours - torchs <= room, f"import perception_encoder costs {ours - torchs:.3f} s over torch's {torchs:.3f} s"
