"""Should training use another linear than F.linear in float32?

    python benchmarks/training_linear.py --threads 2

Forward and backward of one linear with bias, of every shape in the towers' blocks, for a step's rows. "packed": an
autograd function whose forward is oneDNN's packed operator, which has no derivative of its own, and whose backward is
F.linear's two products; a step changes the weights, so it packs them anew each time. "packed once" leaves that out:
no optimiser could, but it bounds what a cheaper packing would give. "switch": F.linear with PyTorch's own switch that
sends float32 products through oneDNN; where the processor has bfloat16 it rounds, and is left out. The limit is three
products of the forward's shape.
"""

from typing import Any

import torch
import torch.nn.functional as F
from harness import Options, describe, options, race, save, show
from peers import gemm, onednn_fp32
from torch import Tensor

from perception.kernels.linear import OneDnn

SHAPES = {"B16": (768, 3072, 8 * 197), "L14": (1024, 4096, 4 * 577)}  # width, width of the MLP, rows of a step


class Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: OneDnn | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (layer or OneDnn(weight.detach(), bias.detach(), torch.float32))(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ x, grad.sum(0), None


def times(rows: int, k: int, n: int, threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(s, generator=g) for s in ((rows, k), (n, k), (n,), (rows, n)))
    given = [x.requires_grad_(), weight.mul_(k**-0.5).requires_grad_(), bias.requires_grad_()]
    once = OneDnn(weight.detach(), bias.detach(), torch.float32)

    def step(linear: Any) -> tuple[Tensor, ...]:
        output = linear(*given)
        return output.detach(), *torch.autograd.grad(output, given, grad)

    def switched() -> tuple[Tensor, ...]:
        with onednn_fp32():
            return step(F.linear)

    calls = {
        "plain": lambda: step(F.linear),
        "packed": lambda: step(lambda *a: Packed.apply(*a, None)),
        "packed once": lambda: step(lambda *a: Packed.apply(*a, once)),
        "switch": switched,
    }
    wanted, left_out = calls["plain"](), {}
    for way in [*calls]:
        off = max(
            float((mine - theirs).norm() / theirs.norm()) for mine, theirs in zip(calls[way](), wanted, strict=True)
        )
        if off > 1e-5:
            left_out[way] = f"off by {off:.1g}"
            del calls[way]
    limit = gemm(torch.float32, rows, k, n)
    work = dict.fromkeys(calls, 3 * limit.work)
    found = race(calls, limit, work=work, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    ratios = {way: found.ratios(way, "plain") for way in calls if way != "plain"}  # above 1: faster than plain
    return describe(found, [], threads, left_out=left_out, rows=rows, inputs=k, outputs=n, ratios=ratios)


def main() -> None:
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for tower, (width, hidden, rows) in SHAPES.items():
            rows = rows // 8 if chosen.quick else rows
            for part, k, n in (
                ("qkv", width, 3 * width), ("proj", width, width), ("fc1", width, hidden), ("fc2", hidden, width)
            ):  # fmt: skip
                case = f"{tower} {part}, {threads} threads"
                if chosen.wants(case):
                    cases[case] = times(rows, k, n, threads, chosen)
                    show(case, cases[case])
                    save("training_linear", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
