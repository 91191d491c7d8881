"""How near the models come to what this machine can do. `perception doctor --speed` shows it.

A package with verbs in the group `perception.commands` says which models are worth measuring by a module `speed` with
one function `cases(names)`; nothing here knows them.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any, Literal

import torch

from perception.errors import ConfigError

GROUP = "perception.commands"
SHAPE = (512, 1024, 4096)  # a product of a middling transformer: large enough to be bound by arithmetic
SAMPLE = 0.3  # seconds of one measurement


@dataclass(frozen=True)
class Case:
    """One model at one batch size.

    name   of the model, with what one call is
    flops  of one call
    plain  one call of the model as it loads
    fast   makes its optimised twin and returns one call of that; slow itself, so it is asked for when it is needed
    read   bytes of weights that one call reads; 0 where so many rows share them that reading is no matter
    """

    name: str
    flops: float
    plain: Callable[[], object]
    fast: Callable[[], Callable[[], object]]
    read: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What was measured of the machine: GFLOP/s of a matrix product in each dtype, and GB/s of reading memory.

    None: no form of it is both right and faster than float32 here.
    """

    threads: int
    instructions: str
    float32: float
    bfloat16: float
    int8: float | None
    read: float


@dataclass(frozen=True)
class Reached:
    """Milliseconds of one call, plain and optimised, and the part each reaches of what binds it: the float32 product's
    rate or the memory's, whichever would take longer. Weights that fit into a cache are read faster than memory."""

    name: str
    plain_ms: float
    plain_share: float
    fast_ms: float
    fast_share: float
    bound: Literal["product", "memory"]


def limits() -> Limits:
    """Measured now, in a second or two, with the threads torch uses."""
    from perception.kernels.probe import capabilities, gemm_limit, read_bandwidth

    found = capabilities()
    rate = {dtype: gemm_limit(dtype, *SHAPE) for dtype in (torch.float32, torch.bfloat16)}
    return Limits(
        threads=found.threads,
        instructions=found.instructions,
        float32=rate[torch.float32],
        bfloat16=rate[torch.bfloat16],
        int8=gemm_limit(torch.float32, *SHAPE, quantize="int8") if found.int8 else None,
        read=read_bandwidth(),
    )


def cases(names: Sequence[str] = ()) -> Iterator[Case]:
    """The models to measure: those named, or each package's own choice.

    Raises ConfigError for a name that no package knows.
    """
    left = set(names)
    for module in _modules():
        for case in module.cases(names):
            left -= {name for name in left if case.name.startswith(name)}
            yield case
    if left:
        raise ConfigError(f"no model {', '.join(sorted(left))} to measure; `perception models` lists all of them")


@torch.inference_mode()
def reached(case: Case, limit: Limits) -> Reached:
    """Run one case, plain and optimised in turn."""
    fast = case.fast()
    plain_seconds, fast_seconds = _in_turn(case.plain, fast)
    product, memory = case.flops / (1e9 * limit.float32), case.read / (1e9 * limit.read)  # seconds at the least
    least = max(product, memory)
    return Reached(
        name=case.name,
        plain_ms=1e3 * plain_seconds,
        plain_share=least / plain_seconds,
        fast_ms=1e3 * fast_seconds,
        fast_share=least / fast_seconds,
        bound="memory" if memory > product else "product",
    )


def as_json(limit: Limits, found: Sequence[Reached]) -> dict[str, Any]:
    return {"limits": asdict(limit), "models": [asdict(row) for row in found]}


def report(limit: Limits, found: Sequence[Reached]) -> str:
    """For people."""
    int8 = f"{limit.int8:.0f}" if limit.int8 else "-"
    lines = [
        f"machine, {limit.threads} threads, {limit.instructions}",
        f"  matrix product, GFLOP/s    float32 {limit.float32:.0f}   bfloat16 {limit.bfloat16:.0f}   int8 {int8}",
        f"  reading memory, GB/s       {limit.read:.1f}",
        "",
        f"{'models, float32':<40}{'plain':>12}{'of limit':>10}{'optimised':>12}{'of limit':>10}  limit",
    ]
    for row in found:
        plain = f"{row.plain_ms:>9.1f} ms{row.plain_share:>10.0%}"
        lines.append(f"  {row.name:<38}{plain}{row.fast_ms:>9.1f} ms{row.fast_share:>10.0%}  {row.bound}")
    if any(row.bound == "memory" and max(row.plain_share, row.fast_share) > 1 for row in found):
        lines.append("  More than all of the memory's rate: these weights stay in a cache.")
    return "\n".join(lines)


def _in_turn(*calls: Callable[[], object]) -> tuple[float, ...]:
    """Seconds of one call of each: the least of several, taken alternately."""
    for call in calls:
        call()
    best = [float("inf")] * len(calls)
    start = time.perf_counter()
    while time.perf_counter() - start < SAMPLE * len(calls) or max(best) == float("inf"):
        for index, call in enumerate(calls):
            began = time.perf_counter()
            call()
            best[index] = min(best[index], time.perf_counter() - began)
    return tuple(best)


def _modules() -> list[ModuleType]:
    packages = dict.fromkeys(point.module.partition(".")[0] for point in sorted(entry_points(group=GROUP)))
    here = [f"{package}.speed" for package in packages if importlib.util.find_spec(f"{package}.speed")]
    return [importlib.import_module(name) for name in here]
