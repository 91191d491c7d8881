"""How fast is the image tower on a GPU, beside timm compiled and beside cuBLAS?

    python benchmarks/gpu_encoder.py
    python benchmarks/gpu_encoder.py --only "G14-448"

Random weights, bfloat16. The limit is the product of the tower's own fc1; the share is of the rate it reaches in the
same round. timm's tower has the same weights; "compiled" is `torch.compile(mode="max-autotune")`. Where timm has no
tower of these sizes the plain tower, compiled the same way, stands for it. "ours, compiled" is the twin after its
`compile()`, which is for batches above 8. Without a GPU the promises are written down as not run.
"""

import copy as copying
from dataclasses import dataclass

import gpu
import torch
from harness import Gate, Options, describe, options, race, save, show
from peers import agree, timm_tower, tower
from torch import Tensor, nn

from perception.optimize import optimize
from perception_encoder.fast_cuda import GRAPH_BATCH
from perception_encoder.speed import flops
from perception_encoder.vision import VisionTransformer

MODELS = {"B16-224": "PE-Core-B16-224", "L14-336": "PE-Core-L14-336", "G14-448": "PE-Core-G14-448"}


@dataclass(frozen=True)
class Case:
    model: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} bf16"


CASES = [
    *(Case("B16-224", batch) for batch in (1, 8, 256)),
    *(Case("L14-336", batch) for batch in (1, 8, 64)),
    *(Case("G14-448", batch) for batch in (1, 16)),
]
LARGE = {"B16-224": 256, "L14-336": 64, "G14-448": 16}  # where the share of the product's rate is promised


def gates(case: Case, peer: str = "timm") -> list[Gate]:
    """What was promised of a case."""
    ours = "ours, compiled" if case.batch == LARGE[case.model] else "ours"
    what = f"GPU, {case} / {peer} compiled"
    found = [Gate(what=what, ours=ours, peers=(f"{peer}, compiled",), least=1.3, aim=1.5)]
    if case.batch == LARGE[case.model]:
        found.append(Gate(what=f"GPU, {case}: share of the matrix product's rate", ours=ours, least=0.6, aim=0.7))
    return found


def measure(case: Case, chosen: Options) -> dict:
    plain = tower(MODELS[case.model])
    config = plain.config
    pixels = torch.randn(case.batch, 3, config.image_size, config.image_size).to("cuda", torch.bfloat16)
    try:
        theirs: nn.Module = timm_tower(plain)
        peer = "timm"
    except (ImportError, LookupError, RuntimeError):  # no timm, none of these sizes, or an older one
        theirs, peer = Pooled(copying.deepcopy(plain)), "plain"
    plain, theirs = plain.to("cuda", torch.bfloat16), theirs.to("cuda", torch.bfloat16).eval()
    fast, large = optimize(plain), optimize(plain)
    large.compile()
    compiled = torch.compile(copying.deepcopy(theirs), mode="max-autotune")
    calls = {
        "ours": lambda: fast.pooled(pixels),
        "ours, plain": lambda: plain.pooled(pixels),
        peer: lambda: theirs(pixels),
        f"{peer}, compiled": lambda: compiled(pixels).clone(),
    }
    if case.batch > GRAPH_BATCH:
        calls["ours, compiled"] = lambda: large.pooled(pixels)
    calls, failed = gpu.try_out(calls)
    differences = agree(calls["ours, plain"](), {name: call() for name, call in calls.items()}, cosine=0.999)
    work = dict.fromkeys(calls, case.batch * flops(config))
    rows = case.batch * (config.grid**2 + config.class_token)
    limit = gpu.gemm(torch.bfloat16, rows, config.width, config.mlp_width, times=8)
    found = race(
        calls,
        limit,
        work=work,
        rounds=chosen.rounds,
        least=chosen.least,
        seconds=chosen.seconds,
        clock=gpu.Clock(),
    )
    more = {"differences": differences, "gpu": gpu.device()}
    return describe(found, gates(case, peer), 0, left_out=failed, **more)


class Pooled(nn.Module):
    """A tower whose forward is its pooled embedding, as timm's is."""

    def __init__(self, model: VisionTransformer):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.pooled(pixels)


def main() -> None:
    chosen, cases = options(__doc__), {}
    promised = {str(case): gates(case) for case in CASES if case.batch == LARGE[case.model]}
    if not gpu.here("gpu_encoder", __doc__, promised, chosen):
        return
    with torch.inference_mode():
        for case in CASES[:1] if chosen.quick else CASES:
            if chosen.wants(str(case)):
                cases[str(case)] = measure(case, chosen)
                show(str(case), cases[str(case)])
                save("gpu_encoder", __doc__, cases, chosen)
                gpu.clean_up()


if __name__ == "__main__":
    main()
