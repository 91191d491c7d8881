"""PLM-nano as it comes with the package: small, offline, of PLM's own formats; its run files, and finetuning it."""

import json
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_tiny import tiny_assistant
from typer.testing import CliRunner

import perception_lm as plm
from perception.cli import build
from perception.errors import ConfigError
from perception_encoder.zoo import load_encoder
from perception_lm.samples import samples
from perception_lm.tokenizer import SPECIAL, read_ranks
from perception_lm.training.export import load_checkpoint
from perception_lm.training.launch import train
from perception_lm.training.nano import __main__ as nano
from perception_lm.training.nano.__main__ import STAGES, finish, stage
from perception_lm.training.nano.build import DECODER, KEPT, language_tower
from perception_lm.training.nano.mixture import Mixture
from perception_lm.training.nano.world import World
from perception_lm.training.run import load_run
from perception_lm.training.sources import SOURCES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "perception_lm" / "weights" / "PLM-nano"


@pytest.fixture(scope="module")
def assistant() -> plm.Assistant:
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", lambda *a: pytest.fail("the network was touched"))
    found = plm.load("PLM-nano", device="cpu", offline=True)
    patch.undo()
    return found


def test_it_is_there() -> None:
    assert "PLM-nano" in plm.list_models()


def test_it_is_small_and_whole(assistant: plm.Assistant) -> None:
    parameters = sum(p.numel() for p in assistant.model.parameters())
    assert 2e6 < parameters < 10e6
    assert (FOLDER / "model.safetensors").stat().st_size < 24e6
    assert sum(f.stat().st_size for f in FOLDER.iterdir()) < 24e6
    assert (FOLDER / "README.md").is_file()
    assert next(iter(plm.load("PLM-nano", device="cpu", dtype="stored").model.parameters())).dtype == torch.float16


def test_its_tokenizer_is_in_the_published_format(assistant: plm.Assistant) -> None:
    ranks = read_ranks((FOLDER / "tokenizer.model").read_bytes())
    tokenizer = assistant.tokenizer
    assert 2000 <= len(ranks) <= 4096
    assert [tokenizer.special[name] for name in SPECIAL] == list(range(len(ranks), len(ranks) + 256))
    assert all(len(tokenizer.encode(f"{min(k * 1000 // 32, 999):03d}")) == 1 for k in range(33))
    assert all(len(tokenizer.encode(str(number))) == 1 for number in range(101))
    assert len(tokenizer.encode("LUMBER")) == 6


def test_a_picture_is_as_many_tokens_as_its_projector_leaves(assistant: plm.Assistant) -> None:
    """One for each square of `pool` by `pool` patches, in every frame of a clip, too."""
    vision, media = assistant.model.encoder.config, assistant.processor.media
    tokens = (media.tile // vision.patch_size // assistant.model.projector.pool) ** 2
    assert (media.tile, vision.patch_size, media.frames) == (64, 8, 4)
    path = samples()["scene"]["path"]
    (found,) = assistant.processor.estimate([[{"role": "user", "content": [{"type": "image", "image": path}]}]])
    assert found.slots == tokens
    clip = samples()["clip"]["path"]
    (found,) = assistant.processor.estimate([[{"role": "user", "content": [{"type": "video", "video": clip}]}]])
    assert found.slots == 4 * tokens


def test_it_answers_what_it_learned(assistant: plm.Assistant) -> None:
    asked = [(e["path"], question, answer) for e in samples().values() for question, answer in e["questions"]]
    answers = [assistant.ask(path, question, max_new_tokens=96).strip() for path, question, _ in asked]
    right = [found == wanted for found, (_, _, wanted) in zip(answers, asked, strict=True)]
    assert sum(right) >= len(right) // 2, list(zip(answers, asked, strict=True))
    told = assistant.ask(samples()["chart"]["path"], "Describe the bar plot in the image.", max_new_tokens=96)
    assert re.match(r"The bar plot displays the values of \w+ categories: .*\. The axis runs from 0 to \d+\. ", told)


def test_it_gives_boxes(assistant: plm.Assistant) -> None:
    entry = samples()["scene"]
    (box,) = assistant.ground(entry["path"], f"the {entry['find'][0]}", max_new_tokens=24)
    assert 0 <= box.x1 < box.x2 <= 64
    assert 0 <= box.y1 < box.y2 <= 64


def test_the_tower_says_what_it_said() -> None:
    core = load_encoder("PE-Core-nano", device="cpu", dtype="float32")
    tower = language_tower(core)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        assert torch.equal(tower(pixels).patches, core.intermediates(pixels, [KEPT - 1])[0].patches)
    assert tower.config.layer_scale is not None
    assert tower.pool is None
    assert language_tower(tower) is tower


def test_a_core_becomes_a_lang_through_a_decoder(tmp_path: Path) -> None:
    """The run file `lang_nano`, two steps of it; the tower it ends with is what a language model is built from."""
    changes = [f"out={tmp_path}", "steps=2", "batch=2", "schedule.warmup=1", "engine.device=cpu"]
    changes += ["data.sources.drawings.options={ level = 0, told = true, weights = { shapes = 1 } }"]
    assert train(load_run("lang_nano", changes))
    tower = load_encoder(tmp_path / "tower", device="cpu")
    learned = load_checkpoint(tmp_path).model.encoder
    cut = language_tower(load_encoder("PE-Core-nano", device="cpu", dtype="float32"))
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.inference_mode():
        patches = tower(pixels).patches
        assert torch.equal(patches, learned(pixels).patches)
        assert not torch.equal(patches, cut(pixels).patches)
    assert (tower.pool, tower.config.depth) == (None, KEPT)
    assert tower.config.layer_scale is not None
    assert language_tower(tower) is tower  # as `--tower` takes it
    assert not (tmp_path / "model").exists()
    again = ["export", str(tmp_path), str(tmp_path / "again"), "--format", "tower"]
    assert CliRunner().invoke(build(), again, catch_exceptions=False).exit_code == 0
    with torch.inference_mode():
        assert torch.equal(load_encoder(tmp_path / "again", device="cpu")(pixels).patches, patches)


@pytest.mark.parametrize("name", STAGES)
def test_run_files(name: str, tmp_path: Path) -> None:
    run = stage(name, Path("some/data"), tmp_path, ("steps=7000",))
    assert run.out == str(tmp_path / name)
    assert run.model.init == str(tmp_path / ("start" if name == "stage1" else f"stage{int(name[-1]) - 1}/model"))
    assert run.steps == 7000
    assert {source.options["data"] for source in run.data.sources.values()} == {"some/data"}
    assert ("encoder" in run.model.learn) == (name != "stage1")
    assert run.data.seq_len <= DECODER.context
    made = SOURCES.get("nano/mixture")(data="none", weights={"shapes": 1.0}, level=0, count=5)
    assert isinstance(made, Mixture)
    with pytest.raises(ConfigError, match="split"):
        SOURCES.get("nano/mixture")(weights={"shapes": 1.0}, split="all")


def test_what_is_missing_or_mistyped_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    assert nano.main(given) == 1
    assert capsys.readouterr().err.startswith(f"error: no words at {tmp_path / 'none' / 'words.txt'}; run ")
    with pytest.raises(SystemExit) as ended:
        nano.main([*given, "--stages", "stage2,stage4"])
    assert ended.value.code == 2
    assert "no stages ['stage4']" in capsys.readouterr().err


def test_settings_may_stand_behind_the_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int]] = []
    monkeypatch.setattr(nano, "begin", lambda *_: None)
    monkeypatch.setattr(nano, "train", lambda run: seen.append((Path(run.out).name, run.steps)))
    assert nano.main(["--out", str(tmp_path), "--stages", "stage2,stage3", "steps=777"]) == 1  # stopped in stage2
    assert seen == [("stage2", 777)]


def test_the_start_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first of several processes; the others wait until it is there."""
    made: list[int] = []
    monkeypatch.setattr(nano, "build_start", lambda *_: made.append(1))
    nano.begin(tmp_path, tmp_path, "PE-Core-nano", 0)
    assert made == [1]

    def meanwhile(seconds: float) -> None:
        (tmp_path / "start").mkdir()
        (tmp_path / "start" / "config.json").touch()

    monkeypatch.setattr(nano.time, "sleep", meanwhile)
    nano.begin(tmp_path, tmp_path, "PE-Core-nano", 1)
    assert made == [1]
    monkeypatch.setattr(nano, "LONGEST", -1.0)
    with pytest.raises(TimeoutError, match="the first process"):
        nano.begin(tmp_path / "other", tmp_path, "PE-Core-nano", 1)


def test_one_process_gives_the_model_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Path] = []
    monkeypatch.setattr(nano, "begin", lambda *_: None)
    monkeypatch.setattr(nano, "finish", lambda trained, folder: given.append(folder))
    for name in STAGES:
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "config.json").touch()
    for rank in ("1", "0"):
        monkeypatch.setenv("RANK", rank)
        assert nano.main(["--out", str(tmp_path)]) == 0
    assert given == [tmp_path / "PLM-nano"]


def test_a_stage_learns_and_is_given_away(tmp_path: Path, assistant: plm.Assistant) -> None:
    from perception_lm.training.launch import train

    run = stage("stage3", Path("none"), tmp_path, ("steps=2", "batch=2", "schedule.warmup=1", "data.mix.few=1.0"))
    losses: list[float] = []
    learner = plm.load("PLM-nano", device="cpu", dtype="float32")
    rows = Mixture(World(), {"shapes": 1.0}, count=50)
    done = train(
        run,
        assistant=learner,
        sources={"few": rows},
        after_step=lambda trainer, line: losses.append(line["loss"]),
        progress=False,
    )
    assert done
    assert len(losses) == 2
    finish(tmp_path / "stage3" / "model", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["kind" if "kind" in config else "format"]
    assert (
        plm.load(tmp_path / "out", device="cpu", dtype="stored").model.decoder.token_embed.weight.dtype == torch.float16
    )


REPORTS = ROOT / "examples" / "finetune" / "reports.py"


def test_the_walkthrough_is_one_page() -> None:
    assert len(REPORTS.read_text("utf-8").splitlines()) < 65
    told = (REPORTS.parent / "README.md").read_text("utf-8")
    for part in ("reports.toml", "lora.toml", "perception train", "perception export", "finetuned/model"):
        assert part in told
    plain, lora = (load_run(REPORTS.with_name(f"{name}.toml")) for name in ("reports", "lora"))
    assert plain.out != lora.out, "one must not go on where the other ended"
    assert replace(lora, out=plain.out, lora=None, model=plain.model, optimizer=plain.optimizer) == plain
    assert lora.model == replace(plain.model, learn=())


@pytest.fixture(scope="module")
def unlearned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of PLM-nano's kind that knows nothing: two steps are not to depend on what it knew."""
    folder = tmp_path_factory.mktemp("unlearned")
    tiny_assistant().save(folder)
    return folder


@pytest.mark.parametrize("name", ["reports", "lora"])
def test_the_walkthrough_runs(tmp_path: Path, unlearned: Path, name: str) -> None:
    """Every step of it, briefly."""
    said = walk(tmp_path, name, f"model.init={unlearned}", "steps=2", "schedule.warmup=1", "batch=2", "keep.steps=1")
    assert re.findall(r"^(before|after|exported and loaded again): 0 of (\d+) right", said, re.MULTILINE) == [
        ("before", "200"), ("after", "200"), ("exported and loaded again", "20"),
    ]  # fmt: skip
    out = tmp_path / load_run(REPORTS.with_name(f"{name}.toml")).out
    assert (out / "adapter" / "adapter_model.safetensors").is_file() == (name == "lora")
    assert (out / "hf" / "config.json").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["reports", "lora"])
def test_the_walkthrough_teaches(tmp_path: Path, name: str) -> None:
    said = walk(tmp_path, name, timeout=1700)
    before, after, exported = (
        int(right) / int(n)
        for right, n in re.findall(r"^(?:before|after|exp.*): (\d+) of (\d+) right", said, re.MULTILINE)
    )
    assert before < 0.05
    assert min(after, exported) > 0.6


def walk(folder: Path, name: str, *overrides: str, timeout: int = 280) -> str:
    pytest.importorskip("easy_vqa", reason="the walkthrough's data: pip install easy-vqa")
    if name == "lora":
        pytest.importorskip("peft", reason="adapters are peft's")
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPORTS), str(REPORTS.with_name(f"{name}.toml")), *overrides]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
