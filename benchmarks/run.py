"""Every benchmark of speed, one process each, one after the other; then the table.

python benchmarks/run.py --quick     # two minutes: do the quickest run, and roughly what comes out; nothing is kept
python benchmarks/run.py             # an hour or more; results/*.json, results/TABLE.md and the README's table
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    *("import_time", "pixels", "tiling", "encoder", "text", "decode", "load", "first_image", "lm_loss", "retrieval"),
    *("training_linear", "scale"),
)
# Of each its cheapest case, and the part of the time it may take: what it does not use, those after it have.
QUICK = {"import_time": 2, "pixels": 2, "tiling": 3, "lm_loss": 2, "encoder": 3, "text": 3, "decode": 5}
TOTAL = 115.0  # seconds of a quick look
ROUNDS = 0.2  # of a script's time, that the rounds of its case may take; the rest is for imports, models and warm-up


def run(script: str, *arguments: str, seconds: float | None = None) -> str:
    """How it ended: "ok", "FAILED", or "stopped" after so many seconds, together with all that it started."""
    process = subprocess.Popen([sys.executable, str(HERE / f"{script}.py"), *arguments], start_new_session=True)
    try:
        return "FAILED" if process.wait(seconds) else "ok"
    except subprocess.TimeoutExpired:
        return "stopped"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def shares(weights: Mapping[str, float], left: float) -> float:
    """Seconds of the first of these, of those that are left for all."""
    first = next(iter(weights.values()))
    return left * first / sum(weights.values())


def quickly() -> dict[str, str]:
    """A quick look at each: how it ended. All is over after TOTAL seconds, on whatever machine."""
    end, ended, waiting = time.monotonic() + TOTAL, {}, dict(QUICK)
    while waiting:
        share = shares(waiting, end - time.monotonic())
        script, start = next(iter(waiting)), time.monotonic()
        ended[script] = run(script, "--quick", "--seconds", f"{ROUNDS * share:.1f}", seconds=share)
        print(f"{script}: {ended[script]}, {time.monotonic() - start:.0f} of {share:.0f} s\n", flush=True)
        del waiting[script]
    return ended


def wholly() -> dict[str, str]:
    """Each benchmark to its end, and the table."""
    ended = {}
    for script in SCRIPTS:
        start = time.monotonic()
        ended[script] = run(script)
        print(f"{script}: {ended[script]}, {time.monotonic() - start:.0f} s\n", flush=True)
    subprocess.run([sys.executable, str(HERE / "table.py")], check=True)
    return ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    ended = quickly() if parser.parse_args().quick else wholly()
    if stopped := [script for script, how in ended.items() if how == "stopped"]:
        print(
            f"no time left for the rest of: {', '.join(stopped)}; run them alone, `python benchmarks/NAME.py --quick`"
        )
    if failed := [script for script, how in ended.items() if how == "FAILED"]:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
