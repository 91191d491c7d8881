"""The loop, its checkpoints and its record, with a task of eight numbers."""

import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from training_tiny import one_thread  # noqa: F401  every test here runs with it

from perception.errors import CheckpointError, ConfigError
from perception.settings import read_settings
from perception.training.distributed import EngineConfig, processes
from perception.training.files import differences, find_run, read_run
from perception.training.metrics import Metrics, peak_flops, read_metrics
from perception.training.state import (
    Checkpoints,
    KeepConfig,
    find_checkpoint,
    is_whole,
    load_tensors,
    mark,
    read_facts,
    tensor_shapes,
)
from perception.training.trainer import Loss, Stopped, Trainer, TrainerConfig


class Lost(NamedTuple):
    source: str
    index: int
    why: str
    too_long: bool


@dataclass
class Report:
    samples: int = 2
    lost: list[Lost] = field(default_factory=list)


@dataclass
class Step:
    packs: Iterator[Tensor]
    report: Report


class Numbers:
    """Two samples a step, one a pass; what they are depends on the position alone."""

    def __init__(
        self,
        broken: dict[int, float] | None = None,
        lost: dict[int, list[Lost]] | None = None,
        empty: Collection[int] = (),
    ):
        self.broken, self.lost, self.without = broken or {}, lost or {}, empty

    def steps(self, position: int) -> Iterator[Step]:
        while True:
            step = position // 2
            packs = [torch.randn(8, generator=torch.Generator().manual_seed(k)) for k in (position, position + 1)]
            if step in self.broken:
                packs[1][0] = self.broken[step]
            yield Step(iter([] if step in self.without else packs), Report(lost=self.lost.get(step, [])))
            position += 2

    def empty(self) -> Tensor:
        return torch.zeros(8)


class Task(nn.Module):
    """A line through numbers, with noise of its own."""

    def __init__(self, weight: float = 3.0):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 1)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.weight = weight

    def forward(self, x: Tensor) -> Loss:
        noisy = x + 0.1 * torch.randn_like(x)
        return Loss((self.layer(noisy) - 1).square().sum() * self.weight, self.weight, 100.0)


def trainer(folder: Path, steps: int = 6, data: Any = None, task: Task | None = None, **changes: Any) -> Trainer:
    task = task or Task()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], lr=0.1)
    keep = KeepConfig(**changes.pop("keep", {"steps": 2, "keep": 2}))
    inner = {k: changes.pop(k) for k in ("after_step", "save_frozen", "facts") if k in changes}
    config = TrainerConfig(**{"steps": steps, "batch": 2, "tensorboard": False, "keep": keep, **changes})
    return Trainer(task, [optimizer], data or Numbers(), config, folder, schedule=lambda s: 1 / (1 + s), **inner)


def curve(folder: Path) -> list[tuple[float, float, int]]:
    return [(line["loss"], line["grad_norm"], line["position"]) for line in read_metrics(folder)]


def test_a_run_that_stops_continues_bit_for_bit(tmp_path: Path) -> None:
    assert trainer(tmp_path / "whole", average=0.9).run()
    wanted = curve(tmp_path / "whole")
    assert len(wanted) == 6

    def stop(self: Trainer, line: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    broken = tmp_path / "broken"
    generator = torch.get_rng_state()
    for _ in range(6):  # F-128: told to stop in every step
        last = trainer(broken, after_step=stop, average=0.9)
        last.run()
    assert last.step == 6
    assert torch.equal(torch.get_rng_state(), generator), "the global generator is left as it was"
    assert curve(broken) == wanted
    again = trainer(tmp_path / "whole", average=0.9)
    assert again.run()
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, last.tensors()[name]), name
    assert not torch.equal(again.averages["layer.weight"], again.task.layer.weight)


def test_f120_killed_while_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is on the disk at the moment of death, the newest whole checkpoint is what counts."""
    trainer(tmp_path / "whole", steps=6).run()
    wanted = curve(tmp_path / "whole")

    class Killed(BaseException):
        pass

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    for number, place in enumerate(("mark", "atomic_write", "sync_folder")):
        folder = tmp_path / str(number)
        first = trainer(folder, steps=6, keep={"steps": 2, "keep": 1})
        with monkeypatch.context() as patch:

            def save(
                self: Checkpoints,
                step: int,
                *rest: Any,
                place: str = place,
                patch: Any = patch,
                original: Any = Checkpoints.save,
            ) -> Path:
                if step == 4:
                    patch.setattr(f"perception.training.state.{place}", die)
                return original(self, step, *rest)

            patch.setattr(Checkpoints, "save", save)
            with pytest.raises(Killed):
                first.run()
        assert (folder / "checkpoints" / "step-00000004").is_dir()
        assert Checkpoints(folder / "checkpoints").steps() == [2]
        assert trainer(folder, steps=6).run()
        assert curve(folder) == wanted
        assert Checkpoints(folder / "checkpoints").steps() == [4, 6]


def test_a_checkpoint_that_lost_a_file_is_none(tmp_path: Path) -> None:
    trainer(tmp_path, steps=4).run()
    path = find_checkpoint(tmp_path)
    assert path is not None
    assert path == find_checkpoint(path) == tmp_path / "checkpoints" / "step-00000004"
    next(path.glob("*.distcp")).write_bytes(b"short")
    assert not is_whole(path)
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step-00000002"
    assert find_checkpoint(path) is None


def test_kept_and_purged(tmp_path: Path) -> None:
    trainer(tmp_path, steps=12, keep={"steps": 2, "keep": 2, "mark": 6}).run()
    assert Checkpoints(tmp_path / "checkpoints").steps() == [6, 10, 12]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


def test_f123_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Once: training goes on, with the old checkpoint as it was. Again and again: it stops and says why."""
    full = {4}

    def write(self: Any, *rest: Any, original: Any = dcp.FileSystemWriter.write_data) -> Any:
        if int(Path(self.path).name[5:]) in full:
            raise OSError(28, "No space left on device")
        return original(self, *rest)

    # Where the disk is met, inside torch: what comes out of there then is no Exception.
    monkeypatch.setattr(dcp.FileSystemWriter, "write_data", write)
    assert trainer(tmp_path / "once").run()
    assert "No space left on device" in caplog.text
    assert Checkpoints(tmp_path / "once" / "checkpoints").steps() == [2, 6]
    full |= {6, 8}
    with pytest.raises(CheckpointError, match="No space left on device"):
        trainer(tmp_path / "often", steps=12).run()
    assert Checkpoints(tmp_path / "often" / "checkpoints").steps() == [2]
    assert not (tmp_path / "often" / "checkpoints" / "step-00000008").exists()


def test_f127_numbers_that_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A step with NaN or infinity is passed over, and leaves the weights as they were; too many end the run."""
    weights = []
    one = trainer(
        tmp_path / "one",
        data=Numbers({2: float("nan"), 3: float("inf")}),
        after_step=lambda self, line: weights.append(self.task.layer.weight.clone()),
    )
    assert one.run()
    assert torch.equal(weights[1], weights[2])
    assert torch.equal(weights[2], weights[3])
    assert not torch.equal(weights[3], weights[4])
    lines = read_metrics(tmp_path / "one")
    assert [line.get("skipped") for line in lines] == [None, None, 1, 2, None, None]
    assert "step 3 is skipped" in caplog.text
    many = trainer(tmp_path / "many", steps=20, data=Numbers(dict.fromkeys(range(4, 20), float("nan"))), patience=3)
    with pytest.raises(Stopped, match="in 3 steps in a row: loss nan, gradient nan; the state is saved"):
        many.run()
    assert many.step == 7
    assert Checkpoints(tmp_path / "many" / "checkpoints").steps()[-1] == 7
    again = trainer(tmp_path / "many", steps=8, patience=3)  # sound data: it gets another chance
    assert again.run()


def test_a_step_without_anything_to_learn(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is passed over; too many in a row end the run, and so does a run of nothing else, however short."""
    long = {s: [Lost("a", i, f"rows.jsonl:{i}: 99 tokens; seq_len is 64", True) for i in (1, 2)] for s in range(20)}
    some = trainer(tmp_path / "some", steps=6, data=Numbers(lost=long, empty={1, 2, 4}), patience=3)
    assert some.run()
    assert [line.get("skipped") for line in read_metrics(tmp_path / "some")] == [None, 1, 2, None, 3, None]
    assert [record.message for record in caplog.records if "left out" in record.message] == [
        "left out rows.jsonl:1: 99 tokens; seq_len is 64 (others like it are counted as too_long, and not named)"
    ]
    many = trainer(tmp_path / "many", steps=20, data=Numbers(lost=long, empty=range(4, 20)), patience=3)
    why = r"learned in 3 steps in a row: 6 samples too long, such as rows\.jsonl:1: 99 tokens; seq_len is 64; the state"
    with pytest.raises(Stopped, match=why):
        many.run()
    assert many.step == 7
    assert trainer(tmp_path / "many", steps=8, patience=3).run()
    few = {"data": Numbers(lost=long, empty=range(20)), "steps": 3}
    before = Task().layer.weight.clone()
    for why in (
        "was learned in 3 of 3 steps: 6 samples too long, such as rows",
        "was learned in 3 of 3 steps; the state",
    ):
        every = trainer(tmp_path / "every", **few)
        with pytest.raises(Stopped, match=why):
            every.run()
        assert torch.equal(every.task.layer.weight, before)
    assert trainer(tmp_path / "every", steps=4).run()


def test_bad_rows_are_limited(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """F-124. A row counts once however often it comes, and what is only too long does not count."""
    bad = {s: [Lost("a", s % 3, f"rows.jsonl:{s % 3}: broken", False), Lost("a", 9, "long", True)] for s in range(20)}
    assert trainer(tmp_path / "fine", data=Numbers(lost=bad), max_bad=3).run()
    assert read_metrics(tmp_path / "fine")[-1]["bad_rows"] == 3
    assert "left out rows.jsonl:1: broken" in caplog.text
    strict = trainer(tmp_path / "strict", data=Numbers(lost=bad), max_bad=1)
    with pytest.raises(Stopped, match=r"2 bad rows; max_bad allows 1 .*, the last of them rows.jsonl:1: broken\)"):
        strict.run()
    assert strict.step == 2
    again = trainer(tmp_path / "strict", data=Numbers(lost=bad), max_bad=3)  # it remembers which
    assert again.run()
    assert read_metrics(tmp_path / "strict")[-1]["bad_rows"] == 3


def test_stopped_by_the_clock(tmp_path: Path) -> None:
    assert not trainer(tmp_path, stop_after=1e-9).run()
    assert Checkpoints(tmp_path / "checkpoints").steps() == [1]


def test_settings_that_changed_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another seed or mixture gives the saved place in the data another meaning."""
    trainer(tmp_path, steps=2, facts={"run": {"seed": 1, "data": {"mix": {"a": 1.0}, "ends": (1, 2)}}}).run()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, steps=3, facts={"run": {"seed": 1, "data": {"mix": {"a": 1.0}, "ends": (1, 2)}}}).run()
        assert "settings that" not in caplog.text
        trainer(tmp_path, steps=4, facts={"run": {"seed": 2, "data": {"mix": {"a": 3.0}, "ends": (1, 2)}}}).run()
    assert "settings that are not those of step 3: data.mix.a, seed" in caplog.text


def test_f130_data_that_changed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, steps=2, facts={"fingerprints": {"rows": "abc", "words": "x"}}).run()
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, steps=3, facts={"fingerprints": {"rows": "abc", "words": "x"}}).run()
        assert "has changed" not in caplog.text
        trainer(tmp_path, steps=4, facts={"fingerprints": {"rows": "abd", "words": "x"}}).run()
    assert "rows has changed since step 3: abc, now abd" in caplog.text


def test_another_model(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).run()
    other = Task()
    other.layer = nn.Linear(8, 2)
    with pytest.raises(CheckpointError, match=r"'model.layer.weight' is \(1, 8\), expected \(2, 8\)"):
        trainer(tmp_path, task=other).run()


def test_frozen_weights_may_stay_out(tmp_path: Path) -> None:
    trainer(tmp_path / "a", steps=2).run()
    trainer(tmp_path / "b", steps=2, save_frozen=False).run()
    names = [set(tensor_shapes(tmp_path / n / "checkpoints" / "step-00000002")) for n in "ab"]
    assert names[0] - names[1] == {"model.frozen"}
    assert trainer(tmp_path / "b", steps=3, save_frozen=False).run()


def test_the_gradient_is_cut_after_it_was_divided(tmp_path: Path) -> None:
    """Weights of a hundred a pass: the mean, not the sum, is what is clipped and recorded."""
    plain, heavy = (trainer(tmp_path / name, steps=1, task=Task(weight=w)) for name, w in (("a", 1.0), ("b", 100.0)))
    plain.run()
    heavy.run()
    (a,), (b,) = (read_metrics(tmp_path / name) for name in "ab")
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-5)
    torch.testing.assert_close(plain.task.layer.weight, heavy.task.layer.weight)


# --- checkpoints of others ------------------------------------------------------------------------------------------


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("/tmp/perception-was-here",)


@pytest.mark.parametrize("kind", ["code", "bytes", "other", "path", "damaged"])
def test_f122_an_index_runs_nothing(tmp_path: Path, kind: str) -> None:
    """torch keeps the index as a pickle: ours is read by a reader that knows the classes of an index alone."""
    trainer(tmp_path, steps=2).run()
    path = tmp_path / "checkpoints" / "step-00000002"
    index = path / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    if kind == "code":
        metadata.planner_data = Evil()
    elif kind == "bytes":
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        metadata.state_dict_metadata["model.layer.weight"] = BytesStorageMetadata()
    elif kind == "other":
        metadata.state_dict_metadata["model.layer.weight"] = Path("x")
    elif kind == "path":
        for place in metadata.storage_data.values():
            place.relative_path = "../../secret"
    content = pickle.dumps(metadata) if kind != "damaged" else index.read_bytes()[:100]
    index.write_bytes(content)
    mark(path)
    refused = {"code": "no index needs", "bytes": "no index needs", "other": "more than tensors", "path": "secret"}
    with pytest.raises(CheckpointError, match=refused.get(kind, "cannot be read")):
        trainer(tmp_path, steps=3).run()
    assert not Path("/tmp/perception-was-here").exists()


def test_f122_a_folder_that_everybody_can_change(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, steps=2).run()
    (tmp_path / "checkpoints" / "step-00000002").chmod(0o777)
    trainer(tmp_path, steps=3).run()
    assert "can be written by everybody" in caplog.text


def test_f122_a_folder_of_somebody_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = os.geteuid()
    trainer(tmp_path, steps=2).run()
    path = tmp_path / "checkpoints" / "step-00000002"
    inner = Path.stat

    def owned_by(uid: int) -> None:
        def stat(self: Path, **how: Any) -> os.stat_result:
            found = inner(self, **how)
            return os.stat_result((*found[:4], uid, *found[5:])) if self == path else found

        monkeypatch.setattr(Path, "stat", stat)

    for owner, reader, warned in ((own, own, False), (0, own + 1, False), (own + 7, own, True), (own + 7, 0, True)):
        caplog.clear()
        owned_by(owner)
        monkeypatch.setattr(os, "geteuid", lambda reader=reader: reader)
        tensor_shapes(path)
        assert (f"is another user's (number {own + 7})" in caplog.text) == warned


def test_facts_that_are_none(tmp_path: Path) -> None:
    trainer(tmp_path, steps=2).run()
    path = tmp_path / "checkpoints" / "step-00000002"
    for content in ("{broken", "[]"):
        (path / "run.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"run\.json"):
            read_facts(path)
    with pytest.raises(CheckpointError, match="'nothing'"):
        load_tensors(path, {"nothing": torch.zeros(3)})


# --- run files, the record, the world -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inner:
    lr: float = 1.0
    names: tuple[str, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Outer:
    steps: int
    out: str = "x"
    inner: Inner = field(default_factory=Inner)


def test_run_files_are_strict(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("steps = 3\n[inner]\nlr = 2\n")
    found = read_run(Outer, path, ["steps=5", "out=runs/a b", "inner.names=['q']", "inner.shares={a = 1, b = 0.5}"])
    assert found == Outer(steps=5, out="runs/a b", inner=Inner(lr=2.0, names=("q",), shares={"a": 1.0, "b": 0.5}))
    for override, message in {
        "stepz=5": r"unknown keys \['stepz'\]",
        "inner.lt=1": r"unknown keys \['lt'\]",
        "steps=many": "steps is 'many'; expected int",
        "steps=true": "expected int",
        "inner.shares={a='x'}": r"inner\.shares\.a is 'x'; expected float",
        "steps": "no override",
        "=3": "no override",
        "steps.a=3": "not a table",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_run(Outer, path, [override])
    for content in ("steps = ", "\x00", "a" * 10):
        path.write_text(content)
        with pytest.raises(ConfigError, match="is no TOML"):
            read_run(Outer, path)
    with pytest.raises(ConfigError, match="no run file"):
        read_run(Outer, tmp_path / "missing.toml")


@dataclass(frozen=True, kw_only=True)
class Choice:
    inner: Inner | None = None
    either: str | Inner | None = None
    several: Inner | Outer | None = None


def test_a_table_that_may_be_left_out_is_as_strict(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("")
    assert read_run(Choice, path, ["inner.lr=2", "either=x"]) == Choice(inner=Inner(lr=2.0), either="x")
    for override, message in {
        "inner.lt=1": r"inner has unknown keys \['lt'\]; Inner has",
        "either.lr=fast": r"either\.lr is 'fast'; expected float",
        "inner=3": r"inner is 3; expected Inner \| None",
        "several.lt=1": r"several is {'lt': 1}; expected Inner \| Outer \| None",
    }.items():
        with pytest.raises(ConfigError, match=message):
            read_run(Choice, path, [override])


def test_a_run_file_that_is_not_there_names_those_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    for name in ("one", "two"):
        (ready / f"{name}.toml").write_text("steps = 3\n")
    monkeypatch.chdir(tmp_path)
    assert find_run("two", ready) == find_run("two.toml", ready) == ready / "two.toml"
    (tmp_path / "two.toml").write_text("steps = 4\n")
    assert find_run("two.toml", ready) == Path("two.toml"), "a file that is here comes first"
    (tmp_path / "one").mkdir()
    assert find_run("one", ready) == ready / "one.toml", "a folder is no run file"
    for name in ("three", "runs/two", "runs/two.toml"):
        with pytest.raises(ConfigError, match=f"no run file at {name}; those of the package are one, two"):
            find_run(name, ready)


def test_differences() -> None:
    assert differences({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4}, "e": 5}) == ["b.c", "b.d", "e"]


def test_the_record_goes_back_to_where_the_run_begins_again(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    record = Metrics(tmp_path, steps=9, step=2, tensorboard=False)
    record.write({"step": 3, "loss": 0.5})
    record.close()
    assert [line["loss"] for line in read_metrics(tmp_path)] == [1.0, 1.0, 0.5]


def test_tensorboard_has_what_the_record_has(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    assert trainer(tmp_path, steps=2, tensorboard=True).run()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()


def test_tensorboard_goes_back_with_the_record(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, losses in ((0, (1.0, 2.0, 3.0)), (1, (5.0, 6.0))):
        record = Metrics(tmp_path, steps=9, step=first)
        for step, loss in enumerate(losses, first + 1):
            record.write({"step": step, "loss": loss})
        record.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    wanted = [(line["step"], line["loss"]) for line in read_metrics(tmp_path)]
    assert [(event.step, event.value) for event in shown] == wanted == [(1, 1.0), (2, 5.0), (3, 6.0)]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", 989e12),
        ("Tesla T4", 65e12),
        ("NVIDIA T400 4GB", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
    ],
)
def test_a_peak_is_of_the_whole_name(name: str, peak: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda")) == peak


def test_devices_that_are_not_here() -> None:
    with pytest.raises(ConfigError, match="not available"), processes(EngineConfig(device="cuda:77")):
        pass
    with pytest.raises(ConfigError, match="precision"):
        read_settings(EngineConfig, {"precision": "fp8"}, "engine")


def test_one_process_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    wrong = processes(EngineConfig(device="cpu", shard="none"))
    with pytest.raises(ConfigError, match="and 2 were started; take 'auto', 'full' or 'hybrid'"), wrong:
        pass


# Forked when torch is there already, so that both come to the group well within the timeout.
WAITING = """
import os, sys, time
from perception.training.distributed import EngineConfig, processes

rank = 1 if (child := os.fork()) == 0 else 0
os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
said = "left"
try:
    for turn in range(2):  # groups that come after each other; the time is also theirs to meet, on a busy machine
        with processes(EngineConfig(device="cpu", timeout=8.0, threads=1)) as world:
            if world.first and turn == 0:
                if sys.argv[2] == "error":
                    raise OSError("the disk is full")
                time.sleep(10)
except Exception as error:
    said = f"{type(error).__name__}: {error}"
if rank == 0:
    os.waitpid(child, 0)
print(rank, said, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked")
@pytest.mark.parametrize(
    ("how", "wanted"),
    [("well", "1 left\n0 left\n"), ("error", "1 FirstEnded: the first process .*\n0 OSError: the disk is full\n")],
)
def test_the_others_wait_while_the_first_writes(how: str, wanted: str) -> None:
    """Longer than a process may be silent, as a large model may take to a slow disk; not when it failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", WAITING, port, how]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=100, check=False)
    assert re.fullmatch(wanted, done.stdout), done.stdout + done.stderr


ENDING = """
import atexit, os
from pathlib import Path

def tell():  # asked for first, and so called last
    names = [Path(f"/proc/self/task/{task}/comm").read_text().strip() for task in os.listdir("/proc/self/task")]
    print([name for name in names if "gloo_runloop" in name])

atexit.register(tell)
import torch
from perception.training.distributed import EngineConfig, processes, shard, whole_tensor
from perception.training.state import Checkpoints

torch.set_num_threads(1)
config = EngineConfig(device="cpu", shard="full")
with processes(config) as world:
    layer = torch.nn.Linear(4, 4)
    shard(layer, [], config, world)
    layer(torch.ones(2, 4)).sum().backward()
    whole_tensor(layer.weight.grad)
    Checkpoints("checkpoints", world=world).save(1, dict(layer.named_parameters()), {})
del layer
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are looked up in /proc")
def test_no_thread_of_the_group_outlives_a_run(tmp_path: Path) -> None:
    """One that still held tensors while the interpreter ended would end the process with signal 6."""
    given = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-c", ENDING], timeout=200, check=False, **given)  # type: ignore[call-overload]
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
