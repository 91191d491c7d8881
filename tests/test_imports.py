"""perception <- perception_encoder <- perception_lm, and never back; nothing heavy before it is used."""

import ast
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

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


def test_import_leaves_the_heavy_packages_out() -> None:
    code = "import sys, json, perception_encoder; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    assert "perception_encoder.clip" in loaded  # the names are really there, not put off
    assert not [name for name in HEAVY if name in loaded]


def test_import_costs_little_more_than_torch() -> None:
    """At most 0.15 s over torch. The least of seven runs of each, in turn: a busy machine only ever adds."""

    def seconds(code: str) -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - start

    seconds("import perception_encoder")  # fill the page cache and write the .pyc files
    pairs = [(seconds("import perception_encoder"), seconds("import torch")) for _ in range(7)]
    ours, torchs = (min(column) for column in zip(*pairs, strict=True))
    assert ours - torchs <= 0.15, f"import perception_encoder costs {ours - torchs:.3f} s over torch"
