"""What the scripts for a GPU share: whether there is one, what is written where none is, its clock and its limits."""

import gc
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from harness import Gate, Limit, Options, Rounds, conditions, judge, save
from record import RESULTS
from torch import Tensor

SIZE = 1 << 30  # bytes that are copied to measure memory: many times what a cache holds
ABSENT = "no CUDA device"


def here(name: str, method: str | None, promised: Mapping[str, Sequence[Gate]], chosen: Options) -> bool:
    """Whether there is a CUDA device. Where there is none, what was promised is written down as not run.

    promised  gates by case; a case that was measured once, on whatever machine, stays as it is
    """
    if torch.cuda.is_available():
        return True
    print(f"skipped: {ABSENT}", flush=True)
    path = RESULTS / f"{name}.json"
    known = json.loads(path.read_text("utf-8"))["cases"] if path.is_file() else {}
    save(name, method, {case: not_run(gates) for case, gates in promised.items() if case not in known}, chosen)
    return False


def not_run(gates: Sequence[Gate], why: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A case without figures.  why: by contender; by default there is no device for any"""
    if why is None:
        why = dict.fromkeys(sorted({name for gate in gates for name in (gate.ours, *gate.peers)}), ABSENT)
    return {**conditions(0), "left out": dict(why), "gates": [judge(gate, Rounds({}), (), why) for gate in gates]}


class Clock:
    """Seconds on the device's own clock: an event behind all that was asked of it so far."""

    def __init__(self) -> None:
        self.start = torch.cuda.Event(enable_timing=True)
        self.start.record()

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return self.start.elapsed_time(now) / 1000


def gemm(dtype: torch.dtype, m: int, k: int, n: int, times: int = 1) -> Limit:
    """A matrix product as cuBLAS does it, `times` in a row, on numbers that are not zeros."""
    x, weight = torch.randn(m, k, device="cuda", dtype=dtype), torch.randn(n, k, device="cuda", dtype=dtype)
    out = torch.empty(m, n, device="cuda", dtype=dtype)

    def run() -> Tensor:
        for _ in range(times):
            torch.mm(x, weight.T, out=out)
        return out

    return Limit(run, 2.0 * m * k * n * times)


def copy(size: int = SIZE) -> Limit:
    """Memory on the device read and written: both count."""
    source = torch.randint(0, 255, (size,), device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    return Limit(lambda: target.copy_(source), 2.0 * size, "GB/s")


def device() -> dict[str, Any]:
    found = torch.cuda.get_device_properties(0)
    return {"device": found.name, "memory, GiB": round(found.total_memory / 2**30), "cuda": torch.version.cuda}


def try_out(calls: dict[str, Callable[[], Any]]) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """Each call once, and again where recording takes a second one; what fails here is left out, and said why."""
    good, failed = {}, {}
    for name, call in calls.items():
        try:
            for _ in range(3):
                call()
            torch.cuda.synchronize()
            good[name] = call
        except Exception as error:  # a peer that cannot run is not what is measured
            failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return good, failed


def clean_up() -> None:
    gc.collect()
    torch.cuda.empty_cache()
