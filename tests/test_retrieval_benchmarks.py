"""The plan for 10^9 pictures: the page is what the script writes, the script runs, the formulas are the code's."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("faiss", reason="the extra `retrieval` is not installed")
pytest.importorskip("pyarrow", reason="the extra `retrieval` is not installed")
HERE = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(HERE))
try:
    import retrieval_scale
finally:
    sys.path.pop(0)


def test_the_page_is_what_the_script_writes() -> None:
    result = json.loads((HERE / "results" / "retrieval_scale.json").read_text("utf-8"))
    page = (HERE / "scale.md").read_text("utf-8")
    assert retrieval_scale.in_page(page, result) == page, "run benchmarks/retrieval_scale.py"


def test_the_simulation_runs_and_its_formulas_hold() -> None:
    runs = [retrieval_scale.measure(rows, 16, 2000, None, "ivf-sq8") for rows in (4000, 16_000)]
    last = runs[-1]
    assert (last["parts"], last["index"]["kind"]) == (8, "ivf-sq8")
    assert last["bytes"]["index"] == pytest.approx(last["index"]["memory"], rel=0.1)
    assert last["bytes"]["vectors and columns"] > 2 * 16_000 * 16
    seconds = dict.fromkeys(last["seconds"], 1.0)
    grows = dict.fromkeys((*seconds, "a query", "index bytes"), 1.0)
    result = {"runs": runs, "threads": 1, "growth with rows, exponent": grows}
    assert "| step | at 16,000 x 16 |" in retrieval_scale.measured(result)
    plan = retrieval_scale.plan(result, 10**6, 512, 10_000)
    for what, value in (
        ("vectors, float16", "1.02 GB"),
        ("parts of 10,000 rows", "100 of 11.5 MB"),
        ("lists L", "4,096"),
    ):
        (line,) = [line for line in plan.splitlines() if line.startswith(f"| {what} ")]
        assert value in line
    assert retrieval_scale.growth([1, 4, 16], [2.0, 16.0, 128.0]) == 1.5
    assert [retrieval_scale.amount(size) for size in (5, 999.6, 1e12, 1e16)] == ["5 B", "1 kB", "1 TB", "10000 TB"]
