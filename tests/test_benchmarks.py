"""The harness on a clock of its own: ratios, dropped rounds, verdicts; and the table in the README."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
try:
    import harness
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
    assert "| import | ≤ 0.15 (0.05) | 0.10 met | |" in text
    assert "A processor" in text
    readme = f"# Title\n\n{table.START}\nold\n{table.END}\n\nrest\n"
    assert table.in_readme(readme, tmp_path) == f"# Title\n\n{table.START}\n{text}{table.END}\n\nrest\n"
    with pytest.raises(ValueError, match="benchmarks:start"):
        table.in_readme("# Title", tmp_path)


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
