"""Every benchmark of speed, one process each, one after the other; then the table.

python benchmarks/run.py --quick     # two minutes: does everything run, and roughly what comes out; nothing is kept
python benchmarks/run.py             # an hour or more; results/*.json, results/TABLE.md and the README's table
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
QUICK = ("import_time", "pixels", "tiling", "encoder", "text", "decode", "lm_loss")  # of each its cheapest case
SCRIPTS = ("import_time", "pixels", "tiling", "encoder", "text", "decode", "load", "first_image", "lm_loss", "scale")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    failed = []
    for script in QUICK if quick else SCRIPTS:
        start = time.perf_counter()
        done = subprocess.run([sys.executable, str(HERE / f"{script}.py"), *["--quick"] * quick], check=False)
        print(
            f"{script}: {'ok' if not done.returncode else 'FAILED'}, {time.perf_counter() - start:.0f} s\n", flush=True
        )
        failed += [script] * bool(done.returncode)
    if not quick:
        subprocess.run([sys.executable, str(HERE / "table.py")], check=True)
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
