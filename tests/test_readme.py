"""The README says what is true: its first program runs as pasted, its tables are the models'."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

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
    assert "Prediction(label='a castle'" in done.stdout


COMMANDS = re.findall(r"^perception (?:generate|ground|estimate|export|chat) .*$", README, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[1:6:4]))
def test_language_model_commands_run_as_written(command: str, golden: Path, tmp_path: Path) -> None:
    """On the tiny golden checkpoint in the place of the published ones, which cannot be downloaded here."""
    picture = golden / "plm" / "A" / "image1.png"
    for name in ("chart.png", "street.jpg"):
        with Image.open(picture) as image:
            image.convert("RGB").save(tmp_path / name)
    shutil.copy(ROOT / "perception_encoder" / "samples" / "clips" / "bunny.mp4", tmp_path / "clip.mp4")
    words = shlex.split(command)
    words = [str(golden / "plm" / "A" / "original") if word.startswith("facebook/") else word for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "perception.cli", *words[1:]],
        input="/image chart.png\nWhat is this?\n/exit\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    if "--out" in words:
        assert (tmp_path / words[words.index("--out") + 1]).is_file()
    if words[1] == "export":
        assert (tmp_path / "out" / "model.safetensors").is_file()


def test_there_are_commands_of_every_verb() -> None:
    assert {command.split()[1] for command in COMMANDS} == {"generate", "ground", "estimate", "export", "chat"}


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
