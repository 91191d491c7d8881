"""Build the wheel, see that every data file is in it, install it in a clean environment and use it there, offline."""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("perception", "perception_encoder", "perception_lm")
USE = """
import socket

def refuse(*args, **kwargs):
    raise AssertionError("the network was touched")

socket.socket.connect = refuse
import perception, perception_encoder as pe
from perception_encoder import samples

assert "site-packages" in perception.__file__, perception.__file__
clip = pe.load_clip("PE-Core-nano", device="cpu")
drawing = next(iter(sorted(samples.drawings().values())))
print(drawing.name, pe.ZeroShotClassifier(clip, ["a dog", "an apple", "a car"]).predict(drawing)[0][0])
"""


def run(*command: str | Path, **settings: object) -> str:
    print("$", *command, flush=True)  # noqa: T201
    return subprocess.run(
        [str(part) for part in command], check=True, text=True, stdout=subprocess.PIPE, **settings
    ).stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        constraints = ROOT / ".ci" / "constraints.txt"
        env = {**os.environ, "PIP_CONSTRAINT": str(constraints)}
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT, env=env)
        (wheel,) = folder.glob("*.whl")
        packed = set(zipfile.ZipFile(wheel).namelist())
        tracked = run("git", "-C", ROOT, "ls-files", "--", *PACKAGES).split("\n")
        if missing := sorted(path for path in tracked if path and path not in packed):
            raise SystemExit(f"the wheel lacks {missing}")
        loose = [path for path in packed if not path.startswith(PACKAGES) and ".dist-info/" not in path]
        if loose:
            raise SystemExit(f"the wheel holds files outside the three packages: {loose}")
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, {len(packed)} files")  # noqa: T201

        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / "bin" / "python"
        run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", constraints, wheel)
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        print(run(python, "-c", USE, cwd=folder, env=offline))  # noqa: T201
        print(run(folder / "env" / "bin" / "perception", "doctor", cwd=folder, env=offline))  # noqa: T201


if __name__ == "__main__":
    main()
