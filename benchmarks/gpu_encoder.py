"""How fast is the image tower on a GPU, beside timm compiled and beside cuBLAS?

    python benchmarks/gpu_encoder.py
    python benchmarks/gpu_encoder.py --only "G14-448"

Random weights, bfloat16. The limit is the product of the tower's own fc1; the share is of the rate it reaches in the
same round. timm's tower has the same weights; "compiled" is `torch.compile(mode="max-autotune")`. Where timm has no
tower of these sizes the plain tower, compiled the same way, stands for it.
"""

import copy as copying
from dataclasses import dataclass

import gpu
import torch
from harness import Gate, Options, describe, options, race, save, show
from peers import agree, timm_tower, tower
from torch import nn

from perception.optimize import optimize
from perception_encoder.speed import flops

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


def measure(case: Case, chosen: Options) -> dict:
    plain = tower(MODELS[case.model])
    config = plain.config
    pixels = torch.randn(case.batch, 3, config.image_size, config.image_size, device="cuda").bfloat16()
    try:
        theirs: nn.Module = timm_tower(plain)
        peer = "timm"
    except (AssertionError, KeyError, RuntimeError, ImportError):
        theirs, peer = _pooled(copying.deepcopy(plain)), "plain"
    plain, theirs = plain.to("cuda", torch.bfloat16), theirs.to("cuda", torch.bfloat16).eval()
    fast = optimize(plain)
    compiled = torch.compile(copying.deepcopy(theirs), mode="max-autotune")
    calls = {
        "ours": lambda: fast.pooled(pixels),
        "ours, plain": lambda: plain.pooled(pixels),
        peer: lambda: theirs(pixels),
        f"{peer}, compiled": lambda: compiled(pixels).clone(),
    }
    calls, failed = gpu.try_out(calls)
    differences = agree(calls["ours, plain"](), {name: call() for name, call in calls.items()}, cosine=0.999)
    work = dict.fromkeys(calls, case.batch * flops(config))
    rows = case.batch * (config.grid**2 + config.class_token)
    limit = gpu.gemm(torch.bfloat16, rows, config.width, config.mlp_width, times=8)
    found = race(calls, limit, work=work, rounds=chosen.rounds, least=chosen.least, clock=gpu.Clock())
    gates = [Gate(what=f"{case} / {peer} compiled", ours="ours", peers=(f"{peer}, compiled",), least=1.3, aim=1.5)]
    if case.batch == LARGE[case.model]:
        gates.append(Gate(what=f"{case}: share of the matrix product's rate", ours="ours", least=0.6, aim=0.7))
    more = {"differences": differences, "left out": failed, "gpu": gpu.conditions()}
    return describe(found, gates, torch.get_num_threads(), **more)


def _pooled(model: nn.Module) -> nn.Module:
    model.forward = model.pooled  # type: ignore[method-assign, operator]
    return model


def main() -> None:
    chosen, cases = options(__doc__), {}
    if not gpu.here():
        return
    with torch.inference_mode():
        for case in CASES[:1] if chosen.quick else CASES:
            if chosen.wants(str(case)):
                cases[str(case)] = measure(case, chosen)
                show(str(case), cases[str(case)])
                gpu.clean_up()
    save("gpu_encoder", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
