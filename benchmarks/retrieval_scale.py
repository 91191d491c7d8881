"""How the cost of an index grows: the real part protocol with synthetic vectors, at sizes that quadruple.

    python benchmarks/retrieval_scale.py --rows 10000000 --width 64

For each size: parts are written as an embedding job writes them (vectors, ids, sidecars with sha256), an index is
trained once, filled block by block, merged on disk and measured on rows held out, opened, and searched. Bytes and
seconds of each step go to `results/retrieval_scale.json`, with the growth of each; the tables between the marks of
`scale.md` are made from it and from the formulas of `perception_encoder/retrieval/choice.py`, which carry it on to
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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from record import record

from perception.files import atomic_write
from perception_encoder.retrieval.building import BLOCK_BYTES
from perception_encoder.retrieval.choice import RESCORE, TRAINING_ROWS, Choice, candidates, list_count
from perception_encoder.retrieval.columns import Column, column, id_hashes
from perception_encoder.retrieval.faiss_store import FaissStore, Origin
from perception_encoder.retrieval.parts import write_part

ORIGIN = Origin("synthetic", "synthetic", "synthetic", dtype="float16")
PAGE = Path(__file__).parent / "scale.md"
GOAL = (10**9, 1024, 100_000)  # rows, width, rows of a part
COLUMNS = 130  # bytes of the columns of a row: id, source and inside of some 30 letters each, sizes, hash
ROUNDS = 10  # of k-means
FLOPS = 3e12  # a second, of a machine of the plan, in float32
DISK, MEMORY = 0.5e9, 20e9  # bytes a second


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


# --- scale.md --------------------------------------------------------------------------------------------------------


def measured(result: Mapping[str, Any]) -> str:
    """What was measured, in Markdown."""
    runs, grows = result["runs"], result["growth with rows, exponent"]
    first, last = runs[0], runs[-1]
    rows, sizes, seconds = last["rows"], last["bytes"], last["seconds"]
    recalls = [run["recall@10, rows held out"] for run in runs]
    memory, written = last["index"]["memory"], sizes["index"]

    def rate(name: str) -> str:
        return f"{seconds[name]:.3g} s, {rows / seconds[name]:,.0f} rows a second"

    steps = {
        "write parts: vectors, columns, hashes, sidecars": (rate("write parts"), grows["write parts"]),
        "hash and check all parts": (rate("check parts"), grows["check parts"]),
        "train, fill, merge, tune, measure": (rate("build, tune, measure"), grows["build, tune, measure"]),
        "open": (f"{seconds['open']:.3g} s, {last['parts']} parts", grows["open"]),
        "add one row, the first time (hashes of all ids are sorted)": (
            f"{seconds['add one row, the first']:.3g} s",
            grows["add one row, the first"],
        ),
        "add one row, the next time": (f"{seconds['add one row, the next']:.3g} s", grows["add one row, the next"]),
        f"a query, at recall@10 of {min(recalls):.2f} to {max(recalls):.2f} on rows held out": (
            f"{last['ms a query']:.3g} ms",
            grows["a query"],
        ),
        "bytes of the index": (amount(written), grows["index bytes"]),
    }
    return "\n".join(
        [
            (
                f"{first['rows']:,} to {rows:,} rows of {last['width']} numbers, {last['index']['kind']}, "
                f"{result['threads']} thread{'s' if result['threads'] > 1 else ''}, seconds of the processor."
            ),
            "",
            f"| step | at {rows:,} x {last['width']} | grows with rows as |",
            "|---|--:|--:|",
            *(f"| {what} | {value} | n^{exponent:.2f} |" for what, (value, exponent) in steps.items()),
            (
                f"| bytes of the parts | {amount(sizes['vectors and columns'])}, "
                f"{2 * rows * last['width'] / sizes['vectors and columns']:.0%} of it vectors | |"
            ),
            f"| manifest | {amount(sizes['manifest'])}, {sizes['manifest'] / last['parts']:.0f} bytes a part | |",
            f"| peak memory | {last['peak memory, MB']} MB | |",
            "",
            (
                f"The formula for the index gives {amount(memory)} where {amount(written)} were written "
                f"({written / memory - 1:+.1%})."
            ),
        ]
    )


def plan(result: Mapping[str, Any], rows: int, width: int, part_rows: int) -> str:
    """The same for sizes nobody ran, in Markdown: the formulas of `choice`, and division."""
    last = result["runs"][-1]
    n, c, lists, parts = rows, width, list_count(rows), math.ceil(rows / part_rows)
    part, each = part_rows * (2 * c + COLUMNS), last["bytes"]["manifest"] / last["parts"]
    kinds = {one.kind if one.kind != "ivf-pq" else f"pq{one.code}": one for one in candidates(n, c)}
    pq = kinds["pq64"]
    sample = TRAINING_ROWS[1] * lists
    train, assign = 2.0 * ROUNDS * sample * lists * c, 2.0 * n * lists * c

    def held(one: Choice) -> str:
        return amount(one.bytes(n, c))

    table = [
        ("vectors, float16", "2 n C", amount(2 * n * c)),
        ("columns: id, source, inside, sizes, hash", f"about {COLUMNS} n", amount(COLUMNS * n)),
        (f"parts of {part_rows:,} rows", f"n / {part_rows:,}", f"{parts:,} of {amount(part)}, with a sidecar each"),
        ("manifest, rewritten with every version", f"{each:.0f} bytes a part", amount(each * parts)),
        ("lists L", "power of two near 4 sqrt(n)", f"{lists:,}"),
        ("centroids", "4 L C", amount(4 * lists * c)),
        ("exact search, resident", "4 n C", held(kinds["flat"])),
        ("ivf-sq8, resident", "n (C + 8) + 4 L C", held(kinds["ivf-sq8"])),
        ("ivf-pq of 128 bytes, resident", "n (128 + 8) + 4 L C", held(kinds["pq128"])),
        ("ivf-pq of 64 bytes, resident", "n (64 + 8) + 4 L C", held(pq)),
        (
            "training sample",
            f"{TRAINING_ROWS[1]} L vectors, float32 in memory",
            f"{sample / 1e6:.1f} M, {amount(4 * sample * c)}",
        ),
        (
            "training",
            f"{ROUNDS} rounds of 2 x {TRAINING_ROWS[1]} L x L x C",
            f"{train / 1e15:.3g} PFLOP, {train / FLOPS / 3600:.1f} h",
        ),
        ("putting rows into lists", "2 n L C", f"{assign / 1e15:.3g} PFLOP, {assign / FLOPS / 3600:.0f} h"),
        ("the same on 16 machines", "blocks are filled apart", f"{assign / FLOPS / 3600 / 16:.1f} h"),
        (
            "blocks, each filled in memory",
            f"{amount(BLOCK_BYTES)} of codes and ids",
            f"{math.ceil(72 * n / BLOCK_BYTES)}",
        ),
        (
            "merging blocks",
            "codes and ids read and written once",
            f"2 x {amount(72 * n)}, {2 * 72 * n / DISK / 60:.0f} min",
        ),
        ("a query: which lists", "2 L C, centroids read", f"{1000 * 4 * lists * c / MEMORY:.0f} ms"),
        (
            "a query: codes of 64 lists",
            "64 n / L codes",
            f"{64 * n / lists / 1000:.0f} k, {1000 * 64 * n / lists * 72 / MEMORY:.1f} ms",
        ),
        (
            "a query: scores again from disk, k = 10",
            f"{10 * RESCORE} reads of {2 * c} bytes",
            f"{10 * RESCORE * 0.1:.0f} ms at 0.1 ms a read",
        ),
        ("embedding at R pictures a second", "n / 3600 R", f"{n / 3600:,.0f} / R h"),
    ]
    return "\n".join(
        [
            f"| what | how | at {n:,} x {c} |",
            "|---|---|--:|",
            *(f"| {what} | {how} | {value} |" for what, how, value in table),
            "",
            (
                f"Hours are those of a machine that sustains {FLOPS / 1e12:.0f} TFLOP/s in float32; disks are read and "
                f"written at {DISK / 1e9:g} GB/s, memory is read at {MEMORY / 1e9:.0f} GB/s."
            ),
        ]
    )


def amount(size: float) -> str:
    """Bytes to three digits."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{float(f'{size:.3g}'):g} {units[0]}"


def in_page(page: str, result: Mapping[str, Any]) -> str:
    """`scale.md` with both tables between their marks."""
    for name, text in (("Retrieval", measured(result)), ("Plan", plan(result, *GOAL))):
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        head, rest = page.split(start, 1)
        page = f"{head}{start}\n{text}\n{end}{rest.split(end, 1)[1]}"
    return page


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
        with atomic_write(PAGE) as temporary:
            temporary.write_text(in_page(PAGE.read_text("utf-8"), result), "utf-8")


if __name__ == "__main__":
    main()
