"""Which attention kernel is fastest on a GPU, by head size and length, and how far is it from cuBLAS? And the small
fused kernels beside the plain operators they stand for, and beside a copy of their bytes.

    python benchmarks/gpu_attention.py
    python benchmarks/gpu_attention.py --only "decode"

bfloat16, random numbers. "auto" is what `perception.attention` chose by measuring; no kernel may be ahead of it by more
than the spread. A share is of the rate of a large matrix product, or of copying, in the same round.
"""

from collections.abc import Callable
from typing import Any

import gpu
import torch
import torch.nn.functional as F
from harness import Gate, Options, describe, options, race, save, show
from peers import agree

from perception.attention import KERNELS, attend, attend_packed, attention_kernel
from perception.kernels import measured
from perception.kernels.triton import decode, norm, rotary, swiglu
from perception.rope import rope_2d

# head_dim, heads, tokens, batch: B16, L14-336, G14-448 and a drawing-sized tower
TOWERS = [(64, 12, 197, 64), (64, 16, 577, 16), (96, 16, 1024, 8), (24, 8, 256, 64), (128, 32, 2048, 1)]
CACHES = [(1, 2048), (1, 11_520), (8, 4096)]  # batch, slots
DOCUMENTS = (64, 20, 800)  # how many, the shortest and the longest
LAYERS = 16  # as many caches as a model has, so that none stays in the device's own cache
BATCH = 16  # pictures of L14-336 that the small kernels work on
HALF = torch.bfloat16


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=HALF)


def towers(chosen: Options) -> dict[str, dict]:
    cases = {}
    for head_dim, heads, tokens, batch in TOWERS:
        for causal in (False, True):
            name = f"head_dim {head_dim}, {tokens} tokens, batch {batch}{', causal' * causal}"
            if not chosen.wants(name):
                continue
            q, k, v = (randn(batch, tokens, heads, head_dim) for _ in range(3))

            def call(kernel: str, q: Any = q, k: Any = k, v: Any = v, causal: bool = causal) -> torch.Tensor:
                with attention_kernel(kernel):
                    return attend(q, k, v, causal=causal)

            calls = {kernel: lambda kernel=kernel, call=call: call(kernel) for kernel in KERNELS}
            for kernel in measured.BACKENDS:
                if not measured.usable(kernel, q, k, v, causal, None):
                    del calls[kernel]
            flops = 4.0 * batch * heads * tokens**2 * head_dim / (2 if causal else 1)
            cases[name] = compare(name, chosen, calls, gpu.gemm(HALF, 4096, 4096, 4096), flops, "reference", "auto")
    return cases


def packed(chosen: Options) -> dict[str, dict]:
    count, shortest, longest = DOCUMENTS
    name = f"packed: {count} documents of {shortest} to {longest} tokens, 32 heads on 8, head_dim 64"
    if not chosen.wants(name):
        return {}
    lengths = torch.randint(shortest, longest, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    q, k, v = (randn(sum(lengths), heads, 64) for heads in (32, 8, 8))

    def call(kernel: str) -> torch.Tensor:
        with attention_kernel(kernel):
            return attend_packed(q, k, v, lengths, causal=True)

    calls = {kernel: lambda kernel=kernel: call(kernel) for kernel in ("auto", "flex", "sdpa")}
    flops = 2.0 * 32 * 64 * sum(n * n for n in lengths)
    return {name: compare(name, chosen, calls, gpu.gemm(HALF, 4096, 4096, 4096), flops, "sdpa", "auto")}


def decoding(chosen: Options) -> dict[str, dict]:
    cases = {}
    for batch, slots in CACHES:
        name = f"decode: batch {batch}, {slots} slots, 32 heads on 8, head_dim 64"
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
        cases[name] = compare(name, chosen, {"ours": fused, "attend": plain}, gpu.copy(), size, "attend", "ours")
    return cases


def small(chosen: Options) -> dict[str, dict]:
    """Bytes are those that have to be read and written once."""
    rope = tuple(t.to("cuda") for t in rope_2d(24, 24, 64, prefix=1))
    qkv, x, branch = randn(BATCH, 577, 3, 16, 64), randn(BATCH * 577, 1024), randn(BATCH * 577, 1024)
    weight, bias, gate_up = randn(1024), randn(1024), randn(256 * BATCH, 2 * 8192)
    cases: dict[str, tuple[dict[str, Callable[[], torch.Tensor]], float]] = {
        "rotary on packed qkv": (
            {
                "ours": lambda: rotary.rotate_qk(qkv.clone(), rope),
                "plain": lambda: rotary.rotate_qk_plain(qkv.clone(), rope),
            },
            2.0 * qkv.nbytes + 2.0 * qkv.nbytes * 2 / 3,
        ),
        "residual and norm": (
            {
                "ours": lambda: norm.layer_norm(x.clone(), weight, bias, 1e-5, branch),
                "plain": lambda: F.layer_norm(x.clone() + branch, (1024,), weight, bias),
            },
            6.0 * x.nbytes,
        ),
        "swiglu": (
            {
                "ours": lambda: swiglu.swiglu(gate_up),
                "plain": lambda: F.silu(gate_up[:, :8192]) * gate_up[:, 8192:],
            },
            1.5 * gate_up.nbytes,
        ),
    }
    return {
        name: compare(name, chosen, calls, gpu.copy(), size, "plain", "ours")
        for name, (calls, size) in cases.items()
        if chosen.wants(name)
    }


def compare(case: str, chosen: Options, calls: dict, limit: Any, work: float, truth: str, ours: str) -> dict[str, Any]:
    calls, failed = gpu.try_out(calls)
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
    others = tuple(name for name in calls if name != ours)
    gates = [Gate(what=f"GPU, {case}: {ours} / the fastest other", ours=ours, peers=others, least=0.95, aim=1.0)]
    return describe(found, gates, 0, left_out=failed, differences=differences, gpu=gpu.device())


def main() -> None:
    chosen = options(__doc__)
    if not gpu.here("gpu_attention", __doc__, {}, chosen):
        return
    cases: dict[str, dict] = {}
    with torch.inference_mode():
        for part in (towers, packed, decoding, small):
            for name, case in part(chosen).items():
                cases[name] = case
                show(name, case)
            gpu.clean_up()
    table = {" ".join(map(str, key)): kernel for key, kernel in measured.choices().items()}
    print("chosen by measurement:", *(f"  {key}: {kernel}" for key, kernel in table.items()), sep="\n")
    save("gpu_attention", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
