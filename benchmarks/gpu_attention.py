"""Which attention kernel is fastest on a GPU, by head size and length, and how far is it from cuBLAS? And the small
fused kernels beside the plain operators they stand for, and beside a copy of their bytes.

    python benchmarks/gpu_attention.py
    python benchmarks/gpu_attention.py --only "decode"

bfloat16, random numbers. "auto" is what `perception.attention` chose by measuring; no kernel may be ahead of it by more
than the spread. "reference" is the formula in float32, step by step. All that runs in a case is compared with the
plainest of its kernels; where that one does not run, the case does not. A share is of the rate of a large matrix
product, or of copying, in the same round. What is called is a recorded graph, so that the device is measured and not
how fast Python starts kernels; "flex", "reference" and packed documents run as they are. Without a GPU the promises are
written down as not run.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from harness import Gate, Options, describe, options, race, save, show
from peers import agree

from perception.attention import KERNELS, attend, attend_packed, attention_kernel
from perception.kernels import measured
from perception.kernels.graphs import Graph
from perception.kernels.triton import decode, norm, rotary, swiglu
from perception.rope import rope_2d

# head_dim, heads, tokens, batch: B16, L14-336, G14-448 and a drawing-sized tower
TOWERS = [(64, 12, 197, 64), (64, 16, 577, 16), (96, 16, 1024, 8), (24, 8, 256, 64), (128, 32, 2048, 1)]
CACHES = [(1, 2048), (1, 11_520), (8, 4096)]  # batch, slots
DOCUMENTS = (64, 20, 800)  # how many, the shortest and the longest
LAYERS = 64  # caches in turn: the smallest are 270 MB together, many times the device's own cache (60 MB on an H200)
BATCH = 16  # pictures of L14-336 that the small kernels work on
SMALL = ("rotary on packed qkv", "residual and norm", "swiglu")
HALF = torch.bfloat16
AS_THEY_ARE = ("flex", "reference")  # compiled at its first call, and too large to be started slowly
Case = tuple[str, dict[str, Any]]


def tower_name(head_dim: int, tokens: int, batch: int, causal: bool) -> str:
    return f"head_dim {head_dim}, {tokens} tokens, batch {batch}{', causal' * causal}"


def packed_name() -> str:
    count, shortest, longest = DOCUMENTS
    return f"packed: {count} documents of {shortest} to {longest} tokens, 32 heads on 8, head_dim 64"


def cache_name(batch: int, slots: int) -> str:
    return f"decode: batch {batch}, {slots} slots, 32 heads on 8, head_dim 64"


def gates(case: str, ours: str, others: Sequence[str]) -> list[Gate]:
    """What was promised of a case."""
    return [Gate(what=f"GPU, {case}: {ours} / the fastest other", ours=ours, peers=tuple(others), least=0.95, aim=1.0)]


def promised() -> dict[str, list[Gate]]:
    """Of every case, beside all that may run in it."""
    kernels = [kernel for kernel in KERNELS if kernel != "auto"]
    found = {
        tower_name(head_dim, tokens, batch, causal): ("auto", kernels)
        for head_dim, _, tokens, batch in TOWERS
        for causal in (False, True)
    }
    found[packed_name()] = ("auto", ["flex", "sdpa"])
    found |= {cache_name(*cache): ("ours", ["attend"]) for cache in CACHES}
    found |= {name: ("ours", ["plain"]) for name in SMALL}
    return {name: gates(name, ours, others) for name, (ours, others) in found.items()}


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=HALF)


def recorded(call: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same as one launch, recorded at the first call."""

    @cache
    def graph() -> Graph:
        return Graph(lambda: (call(),), device=randn(1).device)

    return lambda: graph()()[0]


def towers(chosen: Options) -> Iterator[Case]:
    for head_dim, heads, tokens, batch in TOWERS:
        for causal in (False, True):
            name = tower_name(head_dim, tokens, batch, causal)
            if not chosen.wants(name):
                continue
            q, k, v = (randn(batch, tokens, heads, head_dim) for _ in range(3))

            def call(kernel: str, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> torch.Tensor:
                with attention_kernel(kernel):
                    return attend(q, k, v, causal=causal)

            calls = {kernel: lambda kernel=kernel, call=call: call(kernel) for kernel in KERNELS}
            calls = {name: run if name in AS_THEY_ARE else recorded(run) for name, run in calls.items()}
            for kernel in measured.BACKENDS:
                if not measured.usable(kernel, q, k, v, causal, None):
                    del calls[kernel]
            flops = 4.0 * batch * heads * tokens**2 * head_dim / (2 if causal else 1)
            yield name, compare(name, chosen, calls, gpu.gemm(HALF, 4096, 4096, 4096), flops, "reference", "auto")


def packed(chosen: Options) -> Iterator[Case]:
    count, shortest, longest = DOCUMENTS
    name = packed_name()
    if not chosen.wants(name):
        return
    lengths = torch.randint(shortest, longest, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    q, k, v = (randn(sum(lengths), heads, 64) for heads in (32, 8, 8))

    def call(kernel: str) -> torch.Tensor:
        with attention_kernel(kernel):
            return attend_packed(q, k, v, lengths, causal=True)

    calls = {kernel: lambda kernel=kernel: call(kernel) for kernel in ("auto", "flex", "sdpa")}
    flops = 2.0 * 32 * 64 * sum(n * n for n in lengths)
    yield name, compare(name, chosen, calls, gpu.gemm(HALF, 4096, 4096, 4096), flops, "sdpa", "auto")


def decoding(chosen: Options) -> Iterator[Case]:
    for batch, slots in CACHES:
        name = cache_name(batch, slots)
        if not chosen.wants(name):
            continue
        q = randn(batch, 32, 64)
        caches = [(randn(batch, slots, 8, 64), randn(batch, slots, 8, 64)) for _ in range(LAYERS)]
        lengths = torch.full((batch,), slots, device="cuda")

        def fused(q: Any = q, caches: Any = caches, lengths: Any = lengths) -> torch.Tensor:
            return [decode.attend_decode(q, keys, values, lengths) for keys, values in caches][-1]

        def plain(q: Any = q, caches: Any = caches) -> torch.Tensor:
            return [attend(q[:, None], keys, values)[:, 0] for keys, values in caches][-1]

        size = float(sum(t.nbytes for pair in caches for t in pair))
        calls = {"ours": recorded(fused), "attend": recorded(plain)}
        yield name, compare(name, chosen, calls, gpu.copy(), size, "attend", "ours")


def small(chosen: Options) -> Iterator[Case]:
    """Bytes are those that have to be read and written once."""
    rope = tuple(t.to("cuda") for t in rope_2d(24, 24, 64, prefix=1))
    qkv, x, branch = randn(BATCH, 577, 3, 16, 64), randn(BATCH * 577, 1024), randn(BATCH * 577, 1024)
    weight, bias, gate_up = randn(1024), randn(1024), randn(256 * BATCH, 2 * 8192)
    both: list[tuple[dict[str, Callable[[], torch.Tensor]], float]] = [
        (
            {
                "ours": lambda: rotary.rotate_qk(qkv.clone(), rope),
                "plain": lambda: rotary.rotate_qk_plain(qkv.clone(), rope),
            },
            2.0 * qkv.nbytes + 2.0 * qkv.nbytes * 2 / 3,
        ),
        (
            {
                "ours": lambda: norm.layer_norm(x.clone(), weight, bias, 1e-5, branch),
                "plain": lambda: F.layer_norm(x.clone() + branch, (1024,), weight, bias),
            },
            6.0 * x.nbytes,
        ),
        (
            {
                "ours": lambda: swiglu.swiglu(gate_up),
                "plain": lambda: F.silu(gate_up[:, :8192]) * gate_up[:, 8192:],
            },
            1.5 * gate_up.nbytes,
        ),
    ]
    for name, (plainly, size) in zip(SMALL, both, strict=True):
        if chosen.wants(name):
            calls = {side: recorded(call) for side, call in plainly.items()}
            yield name, compare(name, chosen, calls, gpu.copy(), size, "plain", "ours")


def compare(case: str, chosen: Options, calls: dict, limit: Any, work: float, truth: str, ours: str) -> dict[str, Any]:
    calls, failed = gpu.try_out(calls)
    asked = gates(case, ours, [name for name in (*calls, *failed) if name != ours])
    if truth not in calls:  # nothing can be compared with it
        return gpu.not_run(asked, failed)
    differences = agree(calls[truth](), {name: call() for name, call in calls.items()}, relative=2e-2)
    found = race(
        calls,
        limit,
        work=dict.fromkeys(calls, work),
        rounds=chosen.rounds,
        least=min(chosen.least, 0.1),
        seconds=chosen.seconds,
        clock=gpu.Clock(),
    )
    return describe(found, asked, 0, left_out=failed, differences=differences, gpu=gpu.device())


def main() -> None:
    chosen = options(__doc__)
    if not gpu.here("gpu_attention", __doc__, promised(), chosen):
        return
    cases: dict[str, dict[str, Any]] = {}
    with torch.inference_mode():
        for part in (towers, packed, decoding, small):
            for name, case in part(chosen):
                cases[name] = case
                show(name, case)
                save("gpu_attention", __doc__, cases, chosen)
                gpu.clean_up()
    table = {" ".join(map(str, key)): kernel for key, kernel in measured.choices().items()}
    print("chosen by measurement:", *(f"  {key}: {kernel}" for key, kernel in table.items()), sep="\n")


if __name__ == "__main__":
    main()
