"""What the command refuses before it works, and how it says so. In this process, offline."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image
from safetensors.torch import load_file

import perception_encoder as pe
from perception import cli
from perception_encoder import cli as encoder_verbs
from perception_encoder import samples
from perception_lm import zoo


class Done(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def perception(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command as `main` runs it."""
    monkeypatch.delenv("PERCEPTION_DEBUG", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(*arguments: Any) -> Done:
        monkeypatch.setattr(sys, "argv", ["perception", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(path)
    return path


# --- a folder that holds another model -----------------------------------------------------------------------------


def test_a_model_does_not_replace_another(perception: Run, tmp_path: Path) -> None:
    full = tmp_path / "full"
    assert perception("export", "PLM-nano", full, "--format", "hf").code == 0
    before = (full / "config.json").read_bytes()
    for verb in (
        ("convert", "PE-Core-nano", full),
        ("download", "PE-Core-nano", "--out", full),
        ("export", "PLM-nano", full),
        ("export", "PLM-nano", full, "--format", "original"),
    ):
        done = perception(*verb)
        assert (done.code, done.out) == (1, ""), verb
        assert f"error: {full} holds a model already" in done.err
        assert "--force" in done.err
        assert (full / "config.json").read_bytes() == before
    assert perception("export", "PLM-nano", full, "--format", "hf", "--force").code == 0
    # By its config.json it would still be read as the model that is there.
    done = perception("export", "PLM-nano", full, "--format", "original", "--force")
    assert (done.code, "would be read in its place" in done.err) == (1, True)
    assert perception("convert", "PE-Core-nano", full, "--force").code == 0
    assert json.loads((full / "config.json").read_text())["kind"] == "clip"


def same(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_a_model_of_another_size_or_with_other_weights_is_another(perception: Run, tmp_path: Path) -> None:
    small = pe.VisionConfig(image_size=16, patch_size=8, width=16, depth=1, heads=2, mlp_width=32, pool_heads=2)
    pe.save(pe.VisionTransformer(small), tmp_path / "small")
    assert perception("convert", tmp_path / "small", tmp_path / "out").code == 0
    assert perception("convert", tmp_path / "small", tmp_path / "out").code == 0  # the very same
    pe.save(pe.VisionTransformer(small), tmp_path / "trained")
    done = perception("convert", tmp_path / "trained", tmp_path / "out")
    assert (done.code, "holds a model already" in done.err) == (1, True), "same shape, other weights"
    assert same(tmp_path / "small", tmp_path / "out")
    assert perception("convert", tmp_path / "trained", tmp_path / "out", "--force").code == 0
    assert same(tmp_path / "trained", tmp_path / "out")
    done = perception("convert", "PE-Core-nano", tmp_path / "out")
    assert (done.code, "holds a model already" in done.err) == (1, True)
    (tmp_path / "out" / "config.json").write_text("{")
    assert "holds a model already" in perception("convert", tmp_path / "small", tmp_path / "out").err
    assert perception("export", "PLM-nano", tmp_path / "lm", "--format", "original").code == 0
    assert "holds a model already" in perception("convert", "PE-Core-nano", tmp_path / "lm").err


# --- outputs of the wrong kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "PE-Core-nano", "o.pt"], "the native layout is a folder"),
        (["convert", "PE-Core-nano", "o.safetensors"], "the native layout is a folder"),
        (["convert", "PE-Core-nano", "o.pt", "--layout", "open_clip"], "a folder or a .safetensors file"),
        (["convert", "PE-Core-nano", "o", "--layout", "reference"], "the reference layout is a .pt file"),
        (["convert", "PE-Core-nano", "there.txt"], "the native layout is a folder"),
        (["download", "PE-Core-nano", "-o", "o.pt"], "the native layout is a folder"),
        (["export", "PLM-nano", "o.safetensors"], "a language model is a folder"),
        (["features", "there.png", "-o", "f.txt"], "--out f.txt is no .safetensors file"),
        (["pca", "there.png", "-o", "x.txt"], "--out x.txt has no picture suffix"),
        (["pca", "there.png", "-o", "x.psd"], "--out x.psd has no picture suffix"),
        (["ground", "there.png", "a", "-o", "x.psd"], "--out x.psd has no picture suffix"),
        (["demo", "--out", "there.png"], "--out there.png is no folder"),
        (["demo", "--out", "page.html"], "--out page.html is no folder"),
    ],
)
def test_outputs_are_looked_at_first(
    perception: Run, arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No model is loaded and nothing is written."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    for name in ("there.png", "there.txt"):
        Image.new("RGB", (40, 30)).save(tmp_path / name, "PNG")
    for name in ("load_clip", "load_encoder"):
        monkeypatch.setattr(f"perception_encoder.zoo.{name}", refuse)
    monkeypatch.setattr("perception_lm.zoo.load", refuse)
    done = perception(*arguments)
    assert (done.code, done.out) == (1, ""), done.err
    assert message in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.png", "there.txt"]


def test_a_dot_in_a_folder_is_no_suffix(perception: Run, tmp_path: Path) -> None:
    assert perception("convert", "PE-Core-nano", tmp_path / "nano-0.1.v2").code == 0
    assert (tmp_path / "nano-0.1.v2" / "model.safetensors").is_file()


# --- options that would be ignored ----------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", ["generate", "estimate"])
def test_options_of_videos_need_one(perception: Run, picture: Path, verb: str) -> None:
    asked = (verb, "--question", "What?")
    for option, value in (("--frames", "4"), ("--start", "5"), ("--end", "2"), ("--fps", "1")):
        for media in ((), ("--media_path", picture)):
            done = perception(*asked, *media, option, value)
            assert (done.code, done.out) == (1, "")
            assert f"{option} is for videos, and none is given" in done.err
    clip = samples.clips()["bunny"]
    assert perception("estimate", "--media_path", clip, "--frames", "2", "--start", "1", "--end", "2").code == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--question", "a", "--frames", "0"],
        ["generate", "--question", "a", "--max-tiles", "0"],
        ["generate", "--question", "a", "--samples", "0"],
        ["generate", "--question", "a", "--top-k", "0"],
        ["generate", "--question", "a", "--max-new-tokens", "0"],
        ["estimate", "--max-new-tokens", "-5"],
        ["chat", "--frames", "-1"],
        ["features", "x.png", "--size", "0"],
        ["pca", "x.png", "--size", "-64"],
    ],
)
def test_counts_are_at_least_one(perception: Run, arguments: list[str]) -> None:
    done = perception(*arguments)
    assert done.code == 2
    assert arguments[-2] in done.err


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--question", "a", "--ckpt", "PLM-nan"], "did you mean 'PLM-nano'"),
        (["estimate", "--ckpt", "PLM-nan"], "did you mean 'PLM-nano'"),
        (["features", "x.png", "--model", "PE-Core-nan"], "did you mean 'PE-Core-nano'"),
        (["inspect", "PLM-nan"], "did you mean 'PLM-nano'"),
        (["download", "PE-Core-nan"], "did you mean 'PE-Core-nano'"),
        (["convert", "PLM-nan", "out"], "did you mean 'PLM-nano'"),
        (["convert", "PLM-nano", "out"], "'PLM-nano' is a language model"),
        (["features", "x.png", "--model", "PLM-nano"], "'PLM-nano' is a language model"),
        (["classify", "x.png", "-l", "a", "--model", "Perception-LM-1B"], "'Perception-LM-1B' is a language model"),
        (["generate", "--question", "a", "--ckpt", "PE-Core-nano"], "'PE-Core-nano' is a vision encoder"),
        (["estimate", "--ckpt", "PE-Core-nano"], "'PE-Core-nano' is a vision encoder"),
        (["export", "PE-Core-L14-336", "out"], "'PE-Core-L14-336' is a vision encoder"),
        (["classify", "x.png", "-l", "a", "--model", "PE-Spatial-B16-512"], "`perception features`"),
    ],
)
def test_names_that_do_not_fit(perception: Run, arguments: list[str], message: str) -> None:
    done = perception(*arguments)
    assert (done.code, done.out) == (1, "")
    assert message in done.err
    assert "load_encoder" not in done.err.replace("perception_encoder.load_encoder", "")


def test_a_folder_of_another_model_is_told_by_its_config(perception: Run, picture: Path) -> None:
    done = perception("classify", picture, "-l", "a", "--model", zoo.download("PLM-nano"))
    assert done.code == 1
    assert "config.json is no config of ours: 'format' is 'perception-lm'" in done.err


def test_verbs_know_the_models_of_both_packages(perception: Run) -> None:
    found = json.loads(perception("inspect", "PLM-nano", "--json").out)
    assert found["config"]["format"] == "perception-lm"
    assert found["parameters"] == zoo.describe("PLM-nano")["parameters"]["total"]
    done = perception("download", "PLM-nano", "--json")
    assert Path(json.loads(done.out)["file"]) == zoo.download("PLM-nano")
    done = perception("download", "Perception-LM-1B")
    assert done.code == 1
    assert "facebook/Perception-LM-1B is not in the cache" in done.err


@pytest.mark.parametrize("name", ["../../etc", "/etc", "there", "./there", "there/in.safetensors"])
def test_only_models_are_downloaded(
    perception: Run, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "in.safetensors").touch()
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b" if name.startswith("..") else tmp_path)
    done = perception("download", "../../there" if name == "../../etc" else name)
    assert (done.code, done.out) == (1, "")
    assert "is on this machine already" in done.err


# --- the shell's own words ------------------------------------------------------------------------------------------


def test_a_mark_without_media_is_text(perception: Run) -> None:
    asked = ("generate", "--question", "<image> hi", "--max-new-tokens", "2")
    done = perception(*asked)
    assert done.code == 0, done.err
    chat = zoo.load("PLM-nano", device="cpu").generate(
        [{"role": "user", "content": [{"type": "text", "text": "<image> hi", "literal": True}]}], max_new_tokens=2
    )
    assert done.out == f"{chat[0].text}\n"
    assert perception("estimate", "--question", "<image> hi").code == 0


def test_a_tokenizer_is_given_by_name(perception: Run, tmp_path: Path) -> None:
    folder, words = tmp_path / "lm", zoo.download("PLM-nano") / "tokenizer.model"
    zoo.save(zoo.load_model("PLM-nano", device="cpu")[0], folder)
    asked = ("generate", "--question", "Hi?", "--max-new-tokens", "2", "--ckpt")
    done = perception(*asked, folder)
    assert done.code == 1
    assert "--tokenizer PATH" in done.err
    assert perception(*asked, folder, "--tokenizer", words).out == perception(*asked, "PLM-nano").out
    estimated = ("estimate", "--ckpt", folder, "--question", "Hi?", "--json")
    assert json.loads(perception(*estimated).out)["counted"] is False
    assert json.loads(perception(*estimated, "--tokenizer", words).out)["counted"] is True
    assert perception("export", folder, tmp_path / "whole", "--tokenizer", words).code == 0
    assert perception(*asked, tmp_path / "whole").code == 0


def test_an_estimate_counts_with_the_tokenizer_that_is_here(perception: Run) -> None:
    found = json.loads(perception("estimate", "--question", "How many?", "--json").out)
    assert found["counted"] is True
    batch = zoo.load("PLM-nano", device="cpu").processor([{"role": "user", "content": "How many?"}])
    assert found["tokens"] == batch.lengths[0]


def test_an_estimate_looks_into_the_cache(perception: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a published name and of somebody's hub id; the network is not asked."""
    asked = []

    def locate(reference: str, *, revision: None = None, offline: bool | None = None) -> Path:
        asked.append((reference, offline))
        return zoo._packaged()["PLM-nano"]

    monkeypatch.setattr(zoo, "locate", locate)
    for name in ("Perception-LM-1B", "someone/else"):
        assert json.loads(perception("estimate", "--ckpt", name, "--json").out)["counted"] is True
    assert asked == [("hf://facebook/Perception-LM-1B", True), ("someone/else", True)]


def test_warnings_are_one_line(perception: Run, picture: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        done = perception("classify", picture, "-l", "cat", "-l", "cat")
    assert done.code == 0, done.err
    assert "\nwarning: labels given more than once share their probability: ['cat']\n" in done.err
    assert "UserWarning" not in done.err
    assert ".py" not in done.err


# --- whose fault it is ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), IndexError("x"), AttributeError("x")])
def test_our_own_faults_are_told_from_bad_input(
    perception: Run, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(encoder_verbs, "_load_clip", broken)
    done = perception("classify", "x.png", "-l", "a")
    assert done.code == 70
    assert f"internal error ({type(error).__name__}): x" in done.err


@pytest.mark.parametrize("error", [ValueError("x"), LookupError("x"), OSError("x")])
def test_bad_input_is_an_error(perception: Run, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(encoder_verbs, "_load_clip", broken)
    done = perception("classify", "x.png", "-l", "a")
    assert (done.code, done.err.splitlines()[-1]) == (1, "error: x")


@pytest.mark.parametrize("content", ["5", "[]", '"text"', "null", '{"vision": 5}', '{"vision": {"image_size": "28"}}'])
def test_a_config_that_is_no_table(perception: Run, content: str, tmp_path: Path) -> None:
    config, weights = tmp_path / "config.json", zoo.towers._packaged()["PE-Core-nano"] / "model.safetensors"
    config.write_text(content)
    for verb in (("features", samples.drawings()["castle"], "--model", weights), ("convert", weights, tmp_path / "o")):
        assert perception(*verb, "--config", config).code == 1, verb


def test_features_are_written_whole(perception: Run, picture: Path, tmp_path: Path) -> None:
    done = perception("features", picture, "-o", tmp_path / "f.safetensors")
    assert done.code == 0, done.err
    assert set(load_file(tmp_path / "f.safetensors")) == {"layer.-1.patches", "layer.-1.prefix"}
