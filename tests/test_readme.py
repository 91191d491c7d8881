"""The README says what is true: its first program runs as pasted, its tables are the models'."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import perception_encoder as pe
from perception_encoder.zoo import describe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def test_five_lines_run_as_pasted(tmp_path: Path) -> None:
    program = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    refuse = "def refuse(*a): raise AssertionError('the network was touched')"
    guard = f"import socket\n{refuse}\nsocket.socket.connect = refuse\n"
    done = subprocess.run(
        [sys.executable, "-c", guard + program], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Prediction(label='a pizza'" in done.stdout


def test_shapes_are_the_models() -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from shapes import shapes
    finally:
        sys.path.pop(0)
    table = dict(re.findall(r"^\| ([^|]+?) \| `[^|]+` \| (.+?) \|$", README, re.MULTILINE))
    for step, shape in shapes("PE-Core-L14-336"):
        assert shape.replace("patches ", "").replace("prefix ", "") in (
            table[step].replace("`", "").replace("patches ", "").replace("prefix ", "").replace("cos, sin: ", "")
        ), step


@pytest.mark.parametrize("name", [n for n in pe.list_models("PE-*") if "nano" not in n])
def test_model_table(name: str) -> None:
    facts = describe(name)
    short = name.removesuffix("-Tiling")
    (row,) = [line for line in README.splitlines() if re.match(rf"\| {short}[, |]", line)]
    vision = facts["vision"]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2:5] == [
        str(vision["image_size"]),
        str(vision["patch_size"]),
        f"{vision['width']} x {vision['depth']}",
    ]
    assert cells[5] == str(vision["output_width"] or "-")
    assert cells[6] == f"{facts['parameters'] / 1e6:.1f} M"
    if name == short:
        assert f"`facebook/{name}`" in cells[1]


def test_every_file_named_is_there() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(links) >= 4
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_the_test_command_is_what_ci_runs() -> None:
    assert "\nmake test " in README
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
