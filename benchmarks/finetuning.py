"""How long does the finetuning walkthrough take, and what does the model know before and after?

    pip install easy-vqa      # the pictures of the walkthrough
    python benchmarks/finetuning.py --threads 2

Runs `examples/finetune/reports.py` whole, once with all weights and once with adapters, each in an empty folder; writes
benchmarks/results/finetuning.json and the figures of examples/finetune/README.md.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from typing import Any

from record import ROOT, record

from perception.files import atomic_write

EXAMPLE = ROOT / "examples" / "finetune"
RUNS = {"all weights": "reports.toml", "LoRA": "lora.toml"}
SAID = re.compile(
    r"^(?P<when>[a-z ]+): (?P<right>\d+) of (?P<n>\d+) right(?: \((?P<low>\d+)% to (?P<high>\d+)%\))?", re.M
)
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


def walk(toml: str, threads: int) -> dict[str, Any]:
    """One walkthrough from nothing: its seconds, and what it said of every stage."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, str(EXAMPLE / "reports.py"), str(EXAMPLE / toml)],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds = time.perf_counter() - began
    print(done.stdout, f"{seconds:.0f} s", flush=True)
    stages = {
        m["when"]: {k: int(m[k]) for k in ("right", "n", "low", "high") if m[k]} for m in SAID.finditer(done.stdout)
    }
    return {"seconds": round(seconds, 1), "stages": stages}


def text(runs: dict[str, dict[str, Any]], machine: str, threads: int) -> str:
    """The paragraph of the README."""
    lines = [
        f"Measured on {machine} with {threads} thread{'s' if threads > 1 else ''}, from making the rows to asking the",
        "exported model (`benchmarks/finetuning.py`):",
        "",
        "| | time | before | after | exported, loaded again |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, run in runs.items():
        minutes, seconds = divmod(round(run["seconds"]), 60)
        before, after, again = (run["stages"][when] for when in ("before", "after", "exported and loaded again"))
        cells = [
            f"{minutes} min {seconds} s",
            f"{before['right']} of {before['n']}",
            f"{after['right']} of {after['n']} ({after['low']} to {after['high']} %)",
            f"{again['right']} of {again['n']}",
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    same = next(iter(runs.values()))["stages"]["always the same"]
    return "\n".join([*lines, "", f"Always giving the most frequent report: {same['right']} of {same['n']}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    runs = {name: walk(toml, options.threads) for name, toml in RUNS.items()}
    path = record("finetuning", {"threads": options.threads, "runs": runs}, ("torch", "peft", "easy-vqa", "numpy"))
    page = EXAMPLE / "README.md"
    processor = re.search('"machine": "([^,]*)', path.read_text("utf-8"))
    measured = "\n".join([BEGIN, text(runs, processor[1] if processor else "this machine", options.threads), END])
    content = page.read_text("utf-8")
    content = re.sub(f"{BEGIN}.*?{END}", lambda _: measured, content, flags=re.DOTALL)
    with atomic_write(page) as temporary:
        temporary.write_text(content, "utf-8")
    print(path)


if __name__ == "__main__":
    main()
