"""What this machine does well, measured once a process and never guessed from its name."""

import functools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Run = Callable[[], Tensor]
Call = Callable[[Tensor], Tensor]
MARGIN = 1.03  # a twin must beat the plain operator by this much, so that noise alone never picks it


@dataclass(frozen=True)
class Capabilities:
    """What was measured.

    threads       of torch's pool when it was measured
    instructions  what torch's own kernels were dispatched to: "AVX2", "AVX512", "DEFAULT", ...
    float32       the form of a float32 linear that is fastest here
    bfloat16      the same for bfloat16 weights; "float32" says that computing in float32 is faster
    int8          the form of an int8 linear, or None where it is not faster or not right
    compiler      whether compiled kernels may be built
    """

    threads: int
    instructions: str
    float32: str
    bfloat16: str
    int8: str | None
    compiler: bool


def capabilities() -> Capabilities:
    """Measured at the first call (a fraction of a second), remembered for as long as the number of threads stays."""
    return _capabilities(torch.get_num_threads())


@functools.cache
def _capabilities(threads: int) -> Capabilities:
    from perception.kernels.cpp import has_compiler
    from perception.kernels.linear import choose

    int8 = choose(torch.float32, "int8")
    return Capabilities(
        threads=threads,
        instructions=torch.backends.cpu.get_cpu_capability(),
        float32=choose(torch.float32),
        bfloat16=choose(torch.bfloat16),
        int8=int8 if int8.startswith("int8") else None,
        compiler=has_compiler(),
    )


def seconds(run: Callable[[], object], *, budget: float = 0.01, least: int = 2) -> float:
    """The least time of one call: repeated until `budget` seconds are used, `least` times at the least."""
    best, used, times = float("inf"), 0.0, 0
    while used < budget or times < least:
        start = time.perf_counter()
        run()
        took = time.perf_counter() - start
        best, used, times = min(best, took), used + took, times + 1
    return best


def race(
    plain: tuple[str, Call],
    rivals: Mapping[str, Call],
    x: Tensor,
    *,
    tolerance: float = 1e-5,
    rounds: int = 8,
    budget: float = 0.1,
) -> str:
    """The name of the fastest that gives the right answer; `plain` wins unless a rival is clearly faster.

    plain      name and call of the operator that is right by definition
    rivals     calls that should give the same; one that raises or differs is out
    x          what they are called with, rows first
    tolerance  relative error (norm over norm) a rival may have
    rounds     in which each runs once
    budget     seconds after which no round begins, once there were three; after three times as many none does

    All take turns, another one first in every round, so that a change of clock and other work on the machine meet each
    alike; the least of each counts. One that is far behind after three rounds is not run again.
    """
    name, run = plain
    few = x[:8]  # some operators exist here only as an unoptimised reference: find that out on a few rows
    limit = 8 * seconds(lambda: run(few), budget=0.0) + 1e-3
    wanted, runs = run(few).float(), {name: run}
    for rival, call in rivals.items():
        on_few = functools.partial(call, few)
        if agrees(rival, on_few, wanted, tolerance) and seconds(on_few, budget=0.0, least=3) < limit:
            runs[rival] = call
    best, names = dict.fromkeys(runs, float("inf")), list(runs)
    start = time.perf_counter()
    for index in range(rounds):
        used = time.perf_counter() - start
        if index and used > (budget if index >= 3 else 3 * budget):  # on a slow machine one round has to do
            break
        for candidate in names[index % len(names) :] + names[: index % len(names)]:
            if index < 3 or best[candidate] < 2 * min(best.values()):
                took = seconds(functools.partial(runs[candidate], x), budget=0.0, least=1)
                best[candidate] = min(best[candidate], took)
    winner = min(best, key=best.__getitem__)
    winner = winner if best[winner] * MARGIN < best[name] else name
    log.debug("%s is chosen: %s", winner, {each: f"{1e3 * took:.2f} ms" for each, took in best.items()})
    return winner


def agrees(name: str, run: Run, wanted: Tensor, tolerance: float) -> bool:
    """Whether a call runs here and gives `wanted` to a relative error of `tolerance`."""
    try:
        got = run().float()
    except Exception as error:  # operators torch does not promise may be absent, moved, or refuse this machine
        log.debug("%s does not run here: %s", name, error)
        return False
    off = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30)) if got.shape == wanted.shape else float("inf")
    if not off <= tolerance:  # not >, so that a NaN is out too
        log.debug("%s is wrong here: relative error %.2g", name, off)
        return False
    return True


def gemm_limit(dtype: torch.dtype, m: int, k: int, n: int, *, quantize: Literal["int8"] | None = None) -> float:
    """GFLOP/s of one `m k n` product in the fastest form here: what a model of that shape cannot exceed by much."""
    from perception.kernels.linear import pack

    x = torch.randn(m, k).to(dtype)
    packed = pack(torch.randn(n, k).to(dtype), None, dtype=dtype, quantize=quantize, rows=m)
    packed(x)
    return 2e-9 * m * k * n / seconds(lambda: packed(x), budget=0.2)


def read_bandwidth(size: int = 256 << 20) -> float:
    """GB/s of reading memory, over `size` bytes: far more than any cache should hold."""
    block = torch.ones(size // 8, dtype=torch.int64)
    return 1e-9 * block.nbytes / seconds(lambda: block.sum(), budget=0.3, least=3)
