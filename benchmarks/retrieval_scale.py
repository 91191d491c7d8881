"""How the cost of an index grows: the real part protocol with synthetic vectors, at sizes that double and double again.

    python benchmarks/retrieval_scale.py --rows 10000000 --width 64

For each size: parts are written as an embedding job writes them (vectors, ids, sidecars with sha256), an index is
trained once, filled block by block, merged on disk and measured on rows held out, opened, and searched. Bytes and
seconds of each step go to `results/retrieval_scale.json`, with the growth of each; `scale.md` carries them on to
10^9 x 1024. Seconds are those of the processor: what else the machine does meanwhile does not count.
"""

import argparse
import json
import logging
import math
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from record import record

from perception_encoder.retrieval.columns import Column, column, id_hashes
from perception_encoder.retrieval.faiss_store import FaissStore, Origin
from perception_encoder.retrieval.parts import write_part

ORIGIN = Origin("synthetic", "synthetic", "synthetic", dtype="float16")


def write_parts(folder: Path, rows: int, width: int, part_rows: int) -> float:
    """Vectors in 1,000 clusters, float16, a part at a time; the seconds of the protocol, not of making them up."""
    random = torch.Generator().manual_seed(0)
    middle = torch.randn(1000, width, generator=random)
    spent = 0.0
    for number, start in enumerate(range(0, rows, part_rows)):
        count = min(part_rows, rows - start)
        x = middle[torch.randint(0, 1000, (count,), generator=random)] + torch.randn(count, width, generator=random)
        vectors = F.normalize(x, dim=1)
        began = time.process_time()
        ids = [f"shard-{number:05d}.tar/{i:09d}" for i in range(start, start + count)]
        source = column([f"shard-{number:05d}.tar"] * count)
        columns = {"id": column(ids), "source": source, "hash": Column(id_hashes(ids))}
        write_part(folder, number, vectors, columns, ORIGIN, [])
        spent += time.process_time() - began
    return spent


def measure(rows: int, width: int, part_rows: int, memory: int | None, kind: str) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="perception-scale-"))
    try:
        (folder / "parts").mkdir()
        seconds = {"write parts": write_parts(folder / "parts", rows, width, part_rows)}
        began = time.process_time()
        store = FaissStore.create(folder, width, origin=ORIGIN)
        seconds["check parts"] = time.process_time() - began
        began = time.process_time()
        report = store.optimize(kind=kind, max_memory=memory, target_recall=0.9)
        seconds["build, tune, measure"] = time.process_time() - began
        began = time.process_time()
        opened = FaissStore(folder)
        seconds["open"] = time.process_time() - began
        queries = opened.snapshot().vectors(np.arange(0, rows, max(1, rows // 20))[:20])
        times = []
        for query in queries:
            began = time.process_time()
            opened.search(query[None], 10)
            times.append(time.process_time() - began)
        began = time.process_time()
        opened.add(["one more"], queries[:1])
        seconds["add one row, the first"] = time.process_time() - began
        began = time.process_time()
        opened.add(["and one more"], queries[:1])
        seconds["add one row, the next"] = time.process_time() - began
        sizes = {
            "vectors and columns": sum(f.stat().st_size for f in (folder / "parts").glob("*.safetensors")),
            "sidecars": sum(f.stat().st_size for f in (folder / "parts").glob("*.json")),
            "index": sum(f.stat().st_size for f in folder.glob("index-*.faiss")),
            "manifest": (folder / "manifest.json").stat().st_size,
        }
        found = {
            "rows": rows,
            "width": width,
            "parts": math.ceil(rows / part_rows),
            "index": report["index"],
            "recall@10, rows held out": report["measured"]["recall"],
            "bytes": sizes,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
            "ms a query": round(1000 * float(np.median(times)), 3),
            "peak memory, MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000),
        }
        print(json.dumps(found), flush=True)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def growth(sizes: list[int], values: list[float]) -> float:
    """The exponent of n: 1 is linear."""
    return round(float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-6)), 1)[0]), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="the largest size; the others are a quarter each")
    parser.add_argument("--sizes", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--part-rows", type=int, default=100_000)
    parser.add_argument("--kind", default="ivf-sq8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    logging.getLogger("perception_encoder").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    sizes = [given.rows // 4**step for step in reversed(range(given.sizes))]
    runs = [measure(n, given.width, given.part_rows, None, given.kind) for n in sizes]
    last = runs[-1]
    names = list(last["seconds"])
    result = {
        "threads": given.threads,
        "seconds": "of the processor, all threads together",
        "runs": runs,
        "growth with rows, exponent": {
            **{name: growth(sizes, [run["seconds"][name] for run in runs]) for name in names},
            "a query": growth(sizes, [run["ms a query"] for run in runs]),
            "index bytes": growth(sizes, [run["bytes"]["index"] for run in runs]),
        },
        "bytes a row, largest run": {name: round(size / last["rows"], 2) for name, size in last["bytes"].items()},
        "rows a second, largest run": {n: round(last["rows"] / last["seconds"][n]) for n in names[:3]},
    }
    if not given.no_record:
        print(record("retrieval_scale", result, ("torch", "numpy", "safetensors", "faiss-cpu")))


if __name__ == "__main__":
    main()
