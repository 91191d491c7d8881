"""The command: what it prints, what it writes, how it ends. Each run is a real process, offline."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from golden_models import clip_config, tower_config
from PIL import Image
from safetensors.torch import load_file

import perception_encoder as pe
from perception_encoder import cli, inspection
from perception_encoder.protocol import Features
from perception_encoder.retrieval.embed import load_embeddings

ROOT = Path(__file__).parents[1]
# Any connection that is not to this machine is a failure of its own kind.
GUARD = """
import socket
def refuse(self, address):
    raise AssertionError(f"the network was touched: {address}")
socket.socket.connect = refuse
from perception.cli import main
main()
"""


def perception(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    env.pop("PERCEPTION_DEBUG", None)
    command = [sys.executable, "-c", GUARD, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden CLIP model in our format."""
    where = tmp_path_factory.mktemp("model") / "clip"
    pe.save(pe.load_clip(golden / "clip" / "clip.pt", config=clip_config(golden), device="cpu"), where)
    return where


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("pictures")
    for name in ("red", "green", "blue"):
        Image.effect_noise((60, 50), 50).convert("RGB").save(where / f"{name}.png")
    return where


def test_models() -> None:
    done = perception("models", "*spatial*", "--json")
    assert done.returncode == 0, done.stderr
    found = {model["name"]: model for model in json.loads(done.stdout)}
    assert len(found) == 5
    assert found["PE-Spatial-L14-448"]["parameters"] == 303_964_160
    text = perception("models").stdout
    assert "PE-Core-G14-448" in text
    assert "2419.3 M" in text
    language = {model["name"]: model for model in json.loads(perception("models", "perception-lm*", "--json").stdout)}
    assert language["Perception-LM-1B"]["kind"] == "lm"
    assert language["Perception-LM-1B"]["parameters"] == 1_235_814_400 + 291_415_040 + 6_295_552
    assert "FAIR Noncommercial" in text
    nothing = perception("models", "zzz")
    assert nothing.returncode == 1
    assert "error: no model matches 'zzz'" in nothing.stderr


def test_doctor() -> None:
    done = perception("doctor", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    names = {check["name"] for check in found["checks"]}
    assert {"python", "import name", "torch", "cpu", "interop: timm", "video: av"} <= names
    assert "devices" in perception("doctor").stdout


def test_classify(folder: Path, pictures: Path, tmp_path: Path) -> None:
    done = perception("classify", pictures, "-l", "cat", "-l", "dog", "--model", folder, "--top", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [Path(row["image"]).name for row in rows] == ["blue.png", "green.png", "red.png"]
    assert all(len(row["labels"]) == 1 and row["labels"][0]["label"] in ("cat", "dog") for row in rows)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    done = perception("classify", pictures / "red.png", "--labels", tmp_path / "labels.txt", "--model", folder)
    assert done.returncode == 0
    assert "red.png" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["classify", "nowhere.png", "-l", "a"], 1, "nowhere.png"),
        (["classify", "PICTURES"], 1, "no labels given"),
        (["classify", "PICTURES", "-l", "a", "--device", "cuda:9"], 1, "devices here"),
        (["classify", "PICTURES", "-l", "a", "--dtype", "int3"], 1, "choose from auto"),
        (["classify", "PICTURES", "-l", "a", "--template", "x"], 1, "has no '{}'"),
        (["classify", "PICTURES", "-l", "a", "--top", "0"], 2, "top"),
        (["classify"], 2, "images"),
        (["embed", "PICTURES", "--on-error", "ignore"], 1, "choose from raise, skip, log"),
        (["pca", "PICTURES", "--out", "x.nonsense"], 1, "no picture suffix"),
        (["pca", "PICTURES", "--layer", "77"], 1, "no layers [77]"),
        (["inspect", "nowhere.safetensors"], 1, "nowhere.safetensors"),
        (["frobnicate"], 2, "frobnicate"),
        (["convert", "MODEL", "out", "--layout", "gguf"], 1, "no layout 'gguf'"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    folder: Path, pictures: Path, arguments: list[str], code: int, message: str
) -> None:
    given = [str({"PICTURES": pictures, "MODEL": folder}.get(a, a)) for a in arguments]
    if given[0] in ("classify", "embed", "pca") and len(given) > 1:
        given += ["--model", str(folder)]
    done = perception(*given)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    if code == 1:
        assert done.stdout == ""
        assert done.stderr.strip().splitlines()[-1].startswith("error: ")


def test_f05_a_model_that_is_not_here(tmp_path: Path) -> None:
    done = perception("features", "x.png", "--model", "PE-Lang-L14-448", HF_HOME=str(tmp_path))
    assert done.returncode == 1
    assert "PE-Lang-L14-448" in done.stderr
    assert "perception download" in done.stderr


def test_unknown_model_has_a_hint() -> None:
    done = perception("features", "x.png", "--model", "PE-Lang-L14-484")
    assert done.returncode == 1
    assert "did you mean 'PE-Lang-L14-448'" in done.stderr


def test_embed(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "vectors.safetensors"
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    done = perception("embed", tmp_path / "bad.png", pictures, "-o", out, "--model", folder, "--json")
    assert done.returncode == 1
    assert "picture 0" in done.stderr
    assert not out.exists()
    done = perception(
        "embed", tmp_path / "bad.png", pictures, "-o", out, "--model", folder, "--on-error", "skip", "--json"
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["rows"], found["width"], len(found["failed"])) == (3, 12, 1)
    stored = load_embeddings(out)
    assert [Path(name).name for name in stored.names] == ["blue.png", "green.png", "red.png"]
    wanted = pe.embed(pe.load_clip(folder, device="cpu"), [pictures / "blue.png"])
    torch.testing.assert_close(stored.vectors[:1], wanted)


def test_features_and_pca(folder: Path, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "f.safetensors"
    done = perception("features", pictures, "-o", out, "--model", folder, "--layer", "0", "--layer", "-1", "--json")
    assert done.returncode == 0, done.stderr
    tensors = load_file(out)
    assert tensors["layer.-1.patches"].shape == (3, 4, 4, 24)
    assert tensors["layer.0.prefix"].shape == (3, 1, 24)
    done = perception("pca", pictures, "-o", tmp_path / "pca.png", "--model", folder, "--size", "64")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "pca.png") as sheet:
        assert sheet.size == (3 * 64, 64)


def test_features_leave_the_device_picture_by_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[str] = []

    class OnDevice:
        def __init__(self, values: torch.Tensor):
            self.values = values

        def cpu(self) -> torch.Tensor:
            seen.append("moved")
            return self.values

    def dense(*_: object, **__: object) -> list[Any]:
        seen.append("made")
        return [Features(cast(Any, OnDevice(torch.ones(1, 2, 2, 3))), cast(Any, OnDevice(torch.ones(1, 1, 3))))]

    monkeypatch.setattr(sys.modules["perception_encoder.features"], "features", dense)
    monkeypatch.setattr(cli, "_load_tower", lambda *_: None)
    cli.features(["a.png", "b.png"], tmp_path / "f.safetensors")
    assert seen == ["made", "moved", "moved"] * 2
    assert load_file(tmp_path / "f.safetensors")["layer.-1.patches"].shape == (2, 2, 2, 3)


def test_the_revision_decides_the_kind(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: list[str | None] = []

    def download(name: str, *, revision: str | None = None) -> Path:
        asked.append(revision)
        return folder

    monkeypatch.setattr(inspection, "download", download)
    monkeypatch.setattr("perception_encoder.zoo.load_clip", lambda *_, **settings: settings["revision"])
    assert cli._load("someone/else", None, "cpu", "auto", revision="v2") == "v2"
    assert asked == ["v2"]


def test_convert_there_and_back(golden: Path, folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(clip_config(golden).to_dict()))
    source = golden / "clip" / "clip.pt"
    for step in (
        ("convert", source, tmp_path / "ours", "--config", config),
        ("convert", tmp_path / "ours", tmp_path / "theirs.pt", "--layout", "reference"),
    ):
        done = perception(*step)
        assert done.returncode == 0, done.stderr
    before, after = (torch.load(path, weights_only=True) for path in (source, tmp_path / "theirs.pt"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype
        assert torch.equal(tensor, after[key])


def test_inspect(golden: Path, folder: Path) -> None:
    file = golden / "pe" / "lang_cls_ls.weights.safetensors"
    found = json.loads(perception("inspect", file, "--json").stdout)
    assert (found["layout"], found["kind"], len(found["tensors"])) == ("reference", "tower", 33)
    assert found["parameters"] == sum(t.numel() for t in load_file(file).values())
    found = json.loads(perception("inspect", golden / "clip" / "clip.pt", "--json").stdout)
    assert (found["layout"], found["kind"], found["dtypes"]) == ("reference", "clip", {"float16": 76 - 3})
    found = json.loads(perception("inspect", folder, "--json").stdout)
    assert found["config"]["vision"] == clip_config(golden).vision.to_dict()
    assert tower_config(golden, "lang_cls_ls").depth == 2


def test_f10_inspect_runs_nothing(tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (open, (str(tmp_path / "marker"), "w"))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"a": Evil()}))
    done = perception("inspect", tmp_path / "evil.pt")
    assert done.returncode == 1
    assert not (tmp_path / "marker").exists()


def test_f01_foreign_perception_package(tmp_path: Path) -> None:
    """PyPI's image-hashing library of the same name, earlier on the path."""
    (tmp_path / "perception").mkdir()
    (tmp_path / "perception" / "__init__.py").write_text("from math import sqrt\n")
    code = "import perception_encoder"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, check=False)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: the package `perception`")
    assert "`Perception`" in last
    assert "`perception-vision`" in last
    assert str(tmp_path) in last


def test_doctor_names_a_foreign_perception(monkeypatch: pytest.MonkeyPatch) -> None:
    from perception import doctor

    monkeypatch.setattr(doctor, "packages_distributions", lambda: {"perception": ["perception-vision", "Perception"]})
    found = {check.name: check for check in doctor.diagnose()}["import name"]
    assert found.ok is False
    assert "Perception" in found.detail
    assert "pip uninstall Perception" in found.fix
    assert not doctor.healthy([found])


def test_doctor_really_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed and broken is not installed and working (F-03): the fix is named."""
    from perception import doctor

    def broken(module: str) -> None:
        raise RuntimeError("Could not load libtorchcodec\nmany more lines")

    found = doctor._try("video", "torchcodec.decoders", "torchcodec", load=broken)
    assert found.ok is False
    assert "Could not load libtorchcodec" in found.detail
    assert "FFmpeg" in found.fix
    works = doctor._try("video", "av", "av", load=lambda module: None)
    assert doctor._either([found, works])[0].ok is None
    assert doctor._try("lm", "nothing", "no-such-distribution-here").ok is None


def test_verbs_that_do_not_load_leave_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perception import cli

    class Broken:
        name, value = "encoder", "some_package.cli:register"

        def load(self) -> None:
            raise OSError("libcudart.so.13: no such file")

    class Works:
        name, value = "lm", "other.cli:register"

        def load(self) -> object:
            return lambda app: app.command("other")(lambda: None)

    monkeypatch.setattr(cli, "entry_points", lambda group: [Works(), Broken()])
    assert [command.name for command in cli.build().registered_commands] == ["doctor", "other"]
    told = capsys.readouterr().err
    assert "without the verbs of some_package.cli:register, which does not load: libcudart.so.13" in told
    assert "`perception doctor`" in told


def test_doctor_reports_a_torch_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    from perception import doctor

    monkeypatch.setitem(sys.modules, "torch", None)  # importing it raises ImportError
    (found,) = doctor._devices()
    assert (found.group, found.name, found.ok) == ("devices", "torch", False)
    assert "torch" in found.detail
    assert not doctor.healthy([found])


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. 2 GiB\nmore lines")])
def test_no_memory_is_no_fault_of_ours(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from perception import cli

    def build() -> object:
        raise error

    monkeypatch.delenv("PERCEPTION_DEBUG", raising=False)
    monkeypatch.setattr(cli, "build", build)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory; try a smaller --batch-size or another --device (")
