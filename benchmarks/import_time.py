"""What `import perception_encoder` costs over `import torch`: whole processes, in turn, after a warm-up."""

import subprocess
import sys
import time

from harness import at_most, options, processor
from record import record, spread

RUNS = 15


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


def main() -> None:
    chosen = options(__doc__)
    commands = {"torch": "import torch", "ours": "import perception_encoder"}
    for code in commands.values():
        seconds(code)
    rounds = [{name: seconds(code) for name, code in commands.items()} for _ in range(3 if chosen.quick else RUNS)]
    over = [r["ours"] - r["torch"] for r in rounds]
    gate = at_most("import, seconds beyond torch's", over, 0.15, 0.05)
    result = {
        "method": "wall seconds of whole processes, one of each a round; the difference is taken within a round",
        "import torch, s": spread([r["torch"] for r in rounds], 3),
        "import perception_encoder, s": spread([r["ours"] for r in rounds], 3),
        "difference, s": spread(over, 3),
        "processor": processor(),
        "cases": {"import": {"threads": 0, "gates": [gate]}},
    }
    print(result["difference, s"], gate)
    if chosen.save:
        print(record("import_time", result))


if __name__ == "__main__":
    main()
