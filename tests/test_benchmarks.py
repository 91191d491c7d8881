"""The harness on a clock of its own: ratios, dropped rounds, verdicts; what is compared before anything is timed; and
the table in the README."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plm_tiny
import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import decode
    import encoder
    import harness
    import lm_loss
    import peers
    import pixels
    import run
    import scale
    import table
    from harness import Gate, Limit, Rounds, at_most, judge, options, quantile, race, sample, spread
finally:
    sys.path.pop(0)

GATE = Gate(what="ours / theirs", ours="ours", peers=("theirs", "others"), least=2.0, aim=3.0)


class Clock:
    """Time passes when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, *seconds: float) -> Callable[[], None]:
        """Takes `seconds` in turn, the last of them for ever."""
        left = list(seconds)

        def run() -> None:
            self.log.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def steady(ours: float = 1.0, theirs: float = 1.0, /, rounds: int = 9, **changes: list[float]) -> Rounds:
    seconds = {"ours": [ours] * rounds, "theirs": [theirs] * rounds, "limit": [1.0] * rounds} | changes
    return Rounds(seconds, {"ours": 6e9}, Limit(lambda: None, 1e10))


def test_a_sample_repeats_until_its_time_is_used() -> None:
    clock = Clock()
    assert sample(clock.work("a", 0.06), 0.2, clock) == pytest.approx(0.06)
    assert len(clock.log) == 4
    assert sample(clock.work("b", 3.0), 0.2, clock) == 3.0
    assert clock.log.count("b") == 1


def test_a_clock_that_waits_is_read_seldom() -> None:
    clock, reads = Clock(), []
    read = lambda: (reads.append(clock.now), clock.now)[1]  # noqa: E731
    assert sample(clock.work("a", 0.001), 0.2, read) == pytest.approx(0.001)
    assert 200 <= len(clock.log) <= 225
    assert len(reads) <= 11


def test_a_round_runs_everybody_and_the_first_changes() -> None:
    clock = Clock()
    limit = Limit(clock.work("limit", 0.3), 2e9)
    contenders = {"ours": clock.work("ours", 0.4), "theirs": clock.work("theirs", 1.0)}
    found = race(contenders, limit, work={"ours": 1e9}, rounds=3, clock=clock)
    rounds = clock.log[-9:]
    assert rounds == ["ours", "theirs", "limit", "theirs", "limit", "ours", "limit", "ours", "theirs"]
    assert found.seconds == {
        "ours": pytest.approx([0.4] * 3),
        "theirs": pytest.approx([1.0] * 3),
        "limit": pytest.approx([0.3] * 3),
    }
    assert found.ratios("ours", "theirs") == pytest.approx([2.5] * 3)
    assert found.shares("ours") == pytest.approx([0.375] * 3)  # 1e9 in 0.4 s, of 2e9 in 0.3 s


def test_what_is_fast_is_warmed_up_twice() -> None:
    clock = Clock()
    race({"fast": clock.work("fast", 5.0, 4.0, 0.1), "slow": clock.work("slow", 9.0)}, rounds=1, clock=clock)
    assert clock.log.count("slow") == 2  # one of them is the sample
    clock = Clock()
    found = race({"fast": clock.work("fast", 0.3, 0.2, 0.1)}, rounds=1, clock=clock)
    assert found.seconds["fast"] == [pytest.approx(0.1)]


def test_a_ratio_is_taken_inside_a_round() -> None:
    found = steady(ours=[1.0, 2.0, 4.0] * 3, theirs=[3.0, 6.0, 12.0] * 3)
    assert found.ratios("ours", "theirs") == [3.0] * 9
    row = judge(GATE, found, [])
    assert (row["median"], row["p10"], row["p90"], row["verdict"]) == (3.0, 3.0, 3.0, "met")


def test_the_fastest_peer_counts() -> None:
    found = steady(1.0, 5.0, others=[2.5] * 9)
    assert judge(GATE, found, [])["peer"] == "others"
    assert judge(GATE, found, [])["median"] == 2.5
    assert judge(GATE, steady(1.0, 5.0), [])["peer"] == "theirs"  # a peer that did not run does not


def test_rounds_of_another_clock_are_dropped() -> None:
    limit = [1.0, 1.19, 0.81, 1.21, 0.79, 1.0, 1.0, 1.0, 1.0]
    found = steady(limit=limit, ours=[1.0, 1, 1, 99, 99, 1, 1, 1, 1], theirs=[2.5] * 9)
    assert found.good == [0, 1, 2, 5, 6, 7, 8]
    row = judge(GATE, found, [])
    assert (row["median"], row["good rounds"], row["rounds"], row["verdict"]) == (2.5, 7, 9, "met")


def test_too_few_good_rounds_are_no_result() -> None:
    limit = [1.0, 1.5, 1.5, 1.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    for speed in (1.0, 9.0):  # never "missed", never "met"
        row = judge(GATE, steady(1.0, speed, limit=limit), [])
        assert row["verdict"] == "inconclusive"
        assert "6 good rounds" in row["why"]


def test_a_figure_says_on_how_few_rounds_it_rests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needy = Gate(what="x", ours="ours", peers=("theirs",), least=2.0, aim=3.0, needs=("no such flag",))
    for rounds, words, header in ((3, "6.60 (3 rounds) [", " (3 rounds)\n"), (1, "6.60 (1 round) [", " (1 round)\n")):
        case = harness.describe(steady(1.0, 6.6, rounds=rounds), [needy], 2)
        assert (case["rounds"], case["good rounds"]) == (rounds, rounds)
        harness.show("x", case)
        out = capsys.readouterr().out
        assert words in out
        assert header in out
        (tmp_path / "x.json").write_text(json.dumps({"cases": {"x": case}}))
        assert f"| x | 2.0 (3.0) | not run | {words[:-2]} *not judged* |" in table.render(tmp_path)
    whole = harness.describe(steady(1.0, 6.6, rounds=7), [needy], 2)
    harness.show("x", whole)
    assert "round" not in capsys.readouterr().out
    assert harness.few(judge(GATE, steady(1.0, 5.0, rounds=7, limit=[0.1, 1, 10, 1, 10, 0.1, 1]), [])) == " (3 rounds)"
    assert harness.few(at_most("s", [0.1] * 3, 0.15, 0.05)) == " (3 runs)"
    assert harness.few(at_most("s", [0.1] * 7, 0.15, 0.05)) == ""


@pytest.mark.parametrize(
    ("theirs", "verdict"),
    [
        ([2.0] * 9, "met"),
        ([1.99] * 9, "missed"),
        ([1.7] * 3 + [2.1] * 6, "inconclusive"),  # the median is there, the lower quartile is not
        ([1.85] * 3 + [2.1] * 6, "met"),
    ],
)
def test_verdicts(theirs: list[float], verdict: str) -> None:
    assert judge(GATE, steady(1.0, 0.0, theirs=theirs), [])["verdict"] == verdict


def test_what_a_processor_cannot_judge_is_reported() -> None:
    gate = Gate(what="x", ours="ours", peers=("theirs",), least=2.0, aim=3.0, needs=("AMD", "avx512f"))
    for speed, reached in ((5.0, True), (1.0, False)):
        row = judge(gate, steady(1.0, speed), ["AMD", "avx2"])
        assert (row["verdict"], row["median"], row["reached anyway"]) == ("not judged here", speed, reached)
        assert "lacking here: avx512f" in row["why"]
    assert judge(gate, steady(1.0, 5.0), ["AMD", "avx512f"])["verdict"] == "met"
    assert judge(gate, steady(1.0, 1.0), ["AMD", "avx512f"])["verdict"] == "missed"


def test_who_did_not_run_is_said() -> None:
    found = Rounds({"theirs": [1.0] * 9, "limit": [1.0] * 9}, {}, Limit(lambda: None, 1.0))
    assert judge(GATE, found, [])["verdict"] == "not run"
    assert judge(GATE, Rounds({"ours": [1.0] * 9, "limit": [1.0] * 9}), [])["verdict"] == "not run"


def test_why_a_peer_did_not_run_is_said() -> None:
    found = Rounds({"ours": [1.0] * 9, "limit": [1.0] * 9}, {}, Limit(lambda: None, 1.0))
    row = judge(GATE, found, [], {"theirs": "one call takes about 60 s here", "unasked": "no"})
    assert (row["verdict"], row["why"]) == ("not run", "theirs: one call takes about 60 s here")
    case = harness.describe(found, [GATE], 1, left_out={"theirs": "one call takes about 60 s here"})
    assert case["left out"] == {"theirs": "one call takes about 60 s here"}
    assert case["gates"][0]["why"] == row["why"]


def test_no_round_begins_after_the_time_is_used() -> None:
    clock = Clock()
    found = race({"slow": clock.work("slow", 10.0)}, rounds=9, seconds=25.0, clock=clock)
    assert found.seconds["slow"] == [10.0] * 3
    assert len(race({"slow": clock.work("slow", 10.0)}, rounds=9, seconds=0.0, clock=clock).seconds["slow"]) == 1


def test_the_share_of_the_limit() -> None:
    gate = Gate(what="share", ours="ours", least=0.55, aim=0.9)
    row = judge(gate, steady(1.0, 1.0), [])
    assert (row["peer"], row["median"], row["verdict"]) == ("limit", 0.6, "met")


def test_ceilings() -> None:
    assert at_most("s", [0.1, 0.2, 0.11], 0.15, 0.05)["verdict"] == "met"
    assert at_most("s", [0.2, 0.2, 0.11], 0.15, 0.05)["verdict"] == "missed"
    assert at_most("s", [0.1], 0.15, 0.05)["verdict"] == "inconclusive"


def test_quantiles() -> None:
    values = [5.0, 1.0, 4.0, 2.0, 3.0]
    assert [quantile(values, at) for at in (0, 0.25, 0.5, 0.9, 1)] == pytest.approx([1, 2, 3, 4.6, 5])
    assert spread([1.0, 1.0, 123456.0])["p90"] == 98760.0


def test_a_quick_look_is_over_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What hangs is stopped with all that it started; what fails is told from it; the next ones get their turn."""
    pid = tmp_path / "pid"
    hangs = f"""import pathlib, subprocess
child = subprocess.Popen(["sleep", "60"])
pathlib.Path({str(pid)!r}).write_text(str(child.pid))
child.wait()"""
    programs = {"good": "import sys; assert sys.argv[1:3] == ['--quick', '--seconds']", "hangs": hangs, "bad": "1 / 0"}
    for name, program in programs.items():
        (tmp_path / f"{name}.py").write_text(program)
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "QUICK", {"good": 2, "hangs": 1, "bad": 2})
    monkeypatch.setattr(run, "TOTAL", 10.0)
    start = time.monotonic()
    assert run.quickly() == {"good": "ok", "hangs": "stopped", "bad": "FAILED"}
    assert time.monotonic() - start < 10.0
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.is_file() or state.read_text().split()[2] == "Z"  # gone, or about to be
    monkeypatch.setattr(run, "quickly", lambda: {"a": "ok", "b": "stopped"})
    monkeypatch.setattr(sys, "argv", ["run.py", "--quick"])
    run.main()
    assert "no time left for the rest of: b" in capsys.readouterr().out
    monkeypatch.setattr(run, "quickly", lambda: {"a": "FAILED", "b": "stopped"})
    with pytest.raises(SystemExit, match="failed: a"):
        run.main()


def test_time_that_is_not_used_goes_to_the_next() -> None:
    assert run.shares({"a": 1, "b": 3}, 8.0) == 2.0
    assert run.shares({"b": 3}, 7.0) == 7.0
    assert set(run.QUICK) <= set(run.SCRIPTS)
    assert run.TOTAL < 120


def test_quick_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr("record.RESULTS", tmp_path)
    case = harness.describe(steady(1.0, 3.0), [GATE], 2)
    harness.save("x", "method", {"a": case}, options("", ["--quick"]))
    harness.save("x", "method", {"a": case}, options("", ["--no-save"]))
    seconds = [options("", arguments).seconds for arguments in ([], ["--quick"], ["--quick", "--seconds", "2"])]
    assert seconds == [600.0, 5.0, 2.0]
    assert not list(tmp_path.iterdir())
    harness.save("x", "method", {"a": case}, options("", []))
    harness.save("x", "method", {"b": case}, options("", []))
    found = json.loads((tmp_path / "x.json").read_text())
    assert list(found["cases"]) == ["a", "b"]  # what was measured before stays
    assert found["cases"]["a"]["gates"][0]["verdict"] == "met"
    assert found["cases"]["a"]["contenders"]["ours"]["share of limit"]["median"] == 0.6
    assert found["processor"]["flags"] is not None


def test_the_readme_holds_the_generated_table() -> None:
    readme = (ROOT / "README.md").read_text("utf-8")
    if table.START not in readme:
        pytest.skip("the README has no place for the table yet")
    assert table.in_readme(readme) == readme, "run `python benchmarks/table.py`"
    assert (ROOT / "benchmarks" / "results" / "TABLE.md").read_text("utf-8") == table.render()


def test_a_row_of_the_table(tmp_path: Path) -> None:
    one = harness.describe(steady(1.0, 3.0), [GATE], 1)
    two = harness.describe(steady(1.0, 1.5), [GATE], 2)
    ceiling = {"threads": None, "gates": [at_most("import", [0.1] * 3, 0.15, 0.05)]}
    content = {"processor": {"name": "A processor"}, "cases": {"c, 1": one, "c, 2": two, "i": ceiling}}
    (tmp_path / "encoder.json").write_text(json.dumps(content))
    (tmp_path / "other.json").write_text(json.dumps({"figures": 1}))
    text = table.render(tmp_path)
    assert "| ours / theirs | 2.0 (3.0) | 3.00 met | 1.50 **missed** |" in text
    assert "| import | ≤ 0.15 (0.05) | 0.10 (3 runs) met | - |" in text
    assert "Measured on A processor." in text
    readme = f"# Title\n\n{table.START}\nold\n{table.END}\n\nrest\n"
    assert table.in_readme(readme, tmp_path) == f"# Title\n\n{table.START}\n{text}{table.END}\n\nrest\n"
    with pytest.raises(ValueError, match="benchmarks:start"):
        table.in_readme("# Title", tmp_path)


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    one, two = (Gate(what=what, ours="ours", peers=("theirs",), least=2.0, aim=3.0) for what in "ab")
    cases = {"1": harness.describe(steady(1.0, 3.0), [one], 1), "2": harness.describe(steady(1.0, 3.0), [two], 2)}
    (tmp_path / "x.json").write_text(json.dumps({"cases": cases}))
    text = table.render(tmp_path)
    assert "| a | 2.0 (3.0) | 3.00 met | not run |" in text
    assert "| b | 2.0 (3.0) | not run | 3.00 met |" in text


def test_kernels_that_did_not_run_are_left_to_the_long_table(tmp_path: Path) -> None:
    row = {"what": "GPU, a kernel", "gate": 0.95, "aim": 1.0, "verdict": "not run"}
    file = tmp_path / "gpu_attention.json"
    file.write_text(json.dumps({"cases": {"a": {"gates": [row], "threads": 0}}}))
    assert "GPU, a kernel" in table.render(tmp_path)
    assert "GPU, a kernel" not in table.render(tmp_path, short=True)
    file.write_text(json.dumps({"cases": {"a": {"gates": [{**row, "median": 1.0}], "threads": 0}}}))
    assert "GPU, a kernel" in table.render(tmp_path, short=True)


def test_machines_and_versions_stand_under_the_table(tmp_path: Path) -> None:
    assert table.measured_on(tmp_path) == "Measured on nothing yet."
    case = harness.describe(steady(1.0, 3.0), [GATE], 2)
    unrun = harness.describe(Rounds({}), [GATE], 2)
    file = {
        "machine": "A processor, 2 cores, 24 GiB",
        "processor": {"name": "A processor", "flags": ["avx2", "AMD"], "torch uses": "AVX2"},
        "versions": {"torch": "2.13.0"},
        "peers": {"timm": "1.0.31", "open_clip_torch": "not installed"},
        "cases": {"c": case | {"versions of": {"faiss-cpu": "1.15.1", "torch": "2.13.0"}}},
    }
    (tmp_path / "a.json").write_text(json.dumps(file))
    (tmp_path / "b.json").write_text(json.dumps(file | {"machine": "another", "cases": {"c": unrun}}))
    wanted = (
        "Measured on A processor, 2 cores, 24 GiB (AVX2, avx2). torch 2.13.0; peers: faiss-cpu 1.15.1, timm 1.0.31."
    )
    assert table.measured_on(tmp_path) == wanted
    assert table.render(tmp_path).count(f"\n\n{wanted}\n\n") == 1
    (tmp_path / "c.json").write_text(json.dumps(file | {"cases": {"c": case | {"gpu": {"device": "A GPU"}}}}))
    assert table.measured_on(tmp_path) == wanted.replace("on A processor", "on A GPU; A processor")


def test_what_differs_in_one_row_is_not_averaged_away() -> None:
    wanted = torch.ones(100, 8)
    off = wanted.clone()
    off[7, 0] += 1e-3
    assert peers.agree(wanted, {"a": wanted}, relative=0.0) == {"a": {"relative error": 0.0, "cosine": 1.0}}
    found = peers.agree(wanted, {"a": off}, relative=1e-3)["a"]
    assert found["relative error"] == pytest.approx(1e-3 / 8**0.5, rel=1e-2)
    with pytest.raises(AssertionError, match="a computes something else"):
        peers.agree(wanted, {"a": off}, relative=1e-4)


@pytest.mark.parametrize(
    ("dtype", "quantize", "forms"), [(torch.float32, None, 2), (torch.bfloat16, None, 3), (torch.bfloat16, "int8", 5)]
)
def test_the_limit_is_the_best_of_all_forms(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, quantize: str | None, forms: int
) -> None:
    """Also of the one in float32, which a twin takes where bfloat16 is slow: no share is above 1 because of it."""
    from perception.kernels import probe

    real, tried = probe.seconds, []

    def seconds(form: Callable[[], Any], *, budget: float = 0.01, least: int = 2) -> float:
        if budget < 0.3:  # the library's own
            return real(form, budget=budget, least=least)
        tried.append(form().dtype)
        return -float(len(tried))  # the last is the fastest

    monkeypatch.setattr(probe, "seconds", seconds)
    limit = peers.gemm(dtype, 32, 64, 48, quantize)
    assert len(tried) == forms
    assert set(tried) == {dtype, torch.float32}
    assert limit.run().dtype == torch.float32
    assert limit.work == 2 * 32 * 64 * 48


def test_the_large_jpeg_weighs_what_it_says() -> None:
    sizes = [len(pixels.large_jpeg(seed)) for seed in (0, 15)]
    assert all(size == pytest.approx(746_000, rel=0.05) for size in sizes)
    assert sizes[0] != sizes[1]


@pytest.mark.filterwarnings("ignore")
class TestTokens:
    """What `decode.py` holds answers to."""

    def batch(self, *lengths: int) -> decode.Batch:
        tokens = torch.randint(0, 400, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
        return decode.batch_of(tokens, list(lengths))

    def test_a_token_is_behind_by_deviations(self) -> None:
        logits = torch.tensor([[0.0, 2.0, 4.0], [9.0, 9.0, 3.0]])
        assert decode.behind(logits, torch.tensor([2, 1])) == 0.0
        assert decode.behind(logits, torch.tensor([1, 0])) == pytest.approx(1.0)

    @torch.inference_mode()
    def test_each_row_is_looked_up_where_it_ends(self) -> None:
        plain, batch = plm_tiny.tiny_model(), self.batch(5, 2, 7)
        written = decode.answer(plain, batch, 6)
        assert torch.equal(decode.at_ends(plain(batch.tokens), [5, 2, 7]).argmax(-1), written[:, 0])
        found = decode.look_up(plain, batch, {"ours fp32": written, "ours int4": written}, 6)
        assert all(row["tokens behind, std"] <= 1e-5 for row in found.values())
        for row in range(3):  # whichever row and token it is
            wrong = written.clone()
            wrong[row, 3] = (wrong[row, 3] + 1) % 600
            with pytest.raises(AssertionError, match="ours bf16: a token is"):
                decode.look_up(plain, batch, {"ours bf16": wrong}, 6)
        with pytest.raises(AssertionError, match="tokens"):
            decode.look_up(plain, batch, {"ours fp32": written[:, :5]}, 6)
        limits = [decode.most_behind(dtype) for dtype in ("fp32", "bf16", "int8", "int4")]
        assert limits == sorted(limits)
        assert limits[0] < 1e-4

    @torch.inference_mode()
    def test_a_session_answers_as_without(self) -> None:
        plain, other = plm_tiny.tiny_model(), plm_tiny.tiny_model(seed=1)
        batches = [self.batch(9), self.batch(9)]
        batches[1].tokens[0, 6:] = torch.tensor([1, 2, 3])
        decode.same_answers(plain, plain, batches, decode.generation.Session())
        with pytest.raises(AssertionError, match="question 0 differs"):
            decode.same_answers(other, plain, batches, decode.generation.Session())


STUB = """import sys, torch
file = sys.argv[3]
if {early}: sys.exit(1)
print('{{"compile seconds": 1.5}}', flush=True)
for line in sys.stdin:
    if line.strip() == "end": break
    if line.strip() == "save": torch.save(torch.load(file)["pixels"] + 1, file)
    print("{{}}", flush=True)
"""


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[bool], encoder.Child]:
    """A child that compiles nothing; its file lies in `tmp_path / "files"`."""
    (tmp_path / "files").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "files"))
    monkeypatch.setattr(encoder, "PATIENCE", 300.0)  # on a busy machine

    def start(early: bool) -> encoder.Child:
        (tmp_path / "stub.py").write_text(STUB.format(early=early))
        monkeypatch.setattr(encoder, "__file__", str(tmp_path / "stub.py"))
        return encoder.Child(encoder.QUICK[0], nn.Linear(2, 2), torch.zeros(3), 1)

    return start


def test_a_child_leaves_nothing_behind(child: Callable[[bool], encoder.Child], tmp_path: Path) -> None:
    with child(False) as one:
        assert one.about == {"compile seconds": 1.5}
        one()
        assert torch.equal(one.output(), torch.ones(3))
        assert len(list((tmp_path / "files").iterdir())) == 1
    assert one.process is not None
    assert one.process.returncode == 0
    assert not list((tmp_path / "files").iterdir())
    other = child(False)
    with pytest.raises(ZeroDivisionError), other:
        _ = 1 / 0
    assert other.process is not None
    assert other.process.returncode == 0
    with pytest.raises(RuntimeError, match="ended early"):
        child(True)
    assert not list((tmp_path / "files").iterdir())


def test_memory_is_recorded_in_both_cases(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    monkeypatch.setattr("record.RESULTS", tmp_path)
    passes: list[str] = []

    def check_output(command: list[str], **options: Any) -> str:
        passes.append(command[-1])
        return f"a warning of somebody's\n{400.04 if command[-3] == 'ours' else 1000.0}\n"

    monkeypatch.setattr(subprocess, "check_output", check_output)
    monkeypatch.setattr(harness, "versions", lambda packages: {})
    monkeypatch.setattr(sys, "argv", ["lm_loss.py", "--only", "memory"])
    lm_loss.main()
    cases = json.loads((tmp_path / "lm_loss.json").read_text())["cases"]
    assert list(cases) == ["memory", "memory, accumulating"]
    assert passes == ["1"] * 6 + ["2"] * 6
    assert cases["memory, accumulating"]["extra MB"] == {"ours": [400.0] * 3, "all positions": [1000.0] * 3}
    assert [len(case["gates"]) for case in cases.values()] == [1, 0]
    assert capsys.readouterr().out.count("extra MB: {'ours': [400.0") == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pixels.py", "tiling.py"])
def test_quick_runs(script: str) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    assert "gate" in done.stdout


def test_the_law_of_a_curve() -> None:
    found = scale.law({n: 3 + 2 * n for n in (1, 2, 4, 8, 16)})
    assert (found["a"], found["b"], found["c"]) == pytest.approx((3, 2, 0), abs=1e-6)
    assert "linear to" not in found
    found = scale.law({n: 5 + 0.5 * n + 0.01 * n * n for n in (4, 16, 64, 256)})
    assert (found["a"], found["b"], found["c"]) == pytest.approx((5, 0.5, 0.01), rel=1e-3)
    n = found["linear to"]
    assert 0.01 * n * n / (5 + 0.5 * n + 0.01 * n * n) == pytest.approx(0.1, abs=0.01)
    assert scale.law({1: 1.0, 2: 1.5, 4: 1.8})["c"] >= 0  # a curve that flattens gets no negative square


def test_tables_stand_between_their_marks() -> None:
    case = {"what": "What.", "threads": 2, "ms": {"1": 5.0, "2": 7.0}, "law": scale.law({1: 5.0, 2: 7.0})}
    page = "# T\n<!-- A -->\nold\n<!-- end A -->\nprose\n<!-- B -->\nkept\n<!-- end B -->\n"
    found = scale.in_page(page, {"A": case, "C": case})
    assert "old" not in found
    assert "kept" in found
    assert "| ms | 5 | 7 |" in found
    assert found.endswith("prose\n<!-- B -->\nkept\n<!-- end B -->\n")
    assert scale.in_page(found, {"A": case}) == found


def test_the_page_holds_the_measured_tables() -> None:
    file = ROOT / "benchmarks" / "results" / "scale.json"
    if not file.is_file():
        pytest.skip("no curves were measured yet")
    page = (ROOT / "benchmarks" / "scale.md").read_text("utf-8")
    assert scale.in_page(page, json.loads(file.read_text("utf-8"))["cases"]) == page, "run benchmarks/scale.py"
