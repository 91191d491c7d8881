"""How fast is the image tower, beside timm's on the same weights and beside the machine's matrix product?

    python benchmarks/encoder.py                              # every case
    python benchmarks/encoder.py --only "B16-224 batch 8 fp32" --threads 2
    python benchmarks/encoder.py --only compile               # timm after torch.compile and freezing

open_clip's tower of these names is timm's module, so timm stands for both. "oneDNN flag" is timm with
`torch.backends.mkldnn.matmul.fp32_precision = "bf16"`, a public switch that sends float32 through oneDNN; where the
processor multiplies bfloat16 natively it rounds, and the difference is written down. A peer whose one call
would take longer than 20 s by the rate of a plain product of its dtype is left out, and said so; all are compared with
timm in float32.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Call, Gate, Limit, Options, describe, options, race, save, show
from peers import DTYPES, agree, forecast, gemm, onednn_fp32, timm_tower, tower
from torch import Tensor, nn

from perception.optimize import optimize
from perception_encoder.speed import flops

MODELS = {"B16-224": "PE-Core-B16-224", "L14-336": "PE-Core-L14-336"}
TOO_SLOW = 20.0  # seconds a call
PATIENCE = 30.0  # seconds in which a child may end by itself
AMD_512, AMD_BF16 = ("AMD", "avx512f"), ("AMD", "avx512_bf16")
VNNI = ("avx512_bf16", "avx512_vnni")


@dataclass(frozen=True)
class Case:
    model: str
    batch: int
    dtype: str  # fp32, bf16, int8 (against bf16 peers)
    compiled: bool = False

    def __str__(self) -> str:
        return f"{self.model} batch {self.batch} {self.dtype}{' compile' if self.compiled else ''}"


CASES = [
    *(Case("B16-224", batch, dtype) for batch in (1, 8) for dtype in ("fp32", "bf16", "int8")),
    *(Case("L14-336", 1, dtype) for dtype in ("fp32", "bf16", "int8")),
    *(Case(model, batch, "bf16", True) for model, batch in (("B16-224", 1), ("B16-224", 8), ("L14-336", 1))),
]
QUICK = [Case("B16-224", 1, "fp32")]


def gates(case: Case, threads: int) -> list[Gate]:
    """What was promised of a case; a promise for both cores is not asked of one."""
    name, large = str(case).removesuffix(" compile"), case.model == "L14-336"
    best, flag, compiled = ("timm",), ("timm, oneDNN flag",), ("timm, compile + freezing",)
    if case.compiled:
        least, aim = (1.2, 1.35) if large else (1.15, 1.3)
        what = f"{name} / compile + freezing"
        return [Gate(what=what, ours="ours", peers=compiled, least=least, aim=aim, needs=AMD_BF16)]
    if case.dtype == "int8":
        return [Gate(what=f"{name} / best peer in bf16", ours="ours", peers=best, least=1.9, aim=2.5, needs=VNNI)]
    fp32 = case.dtype == "fp32"
    needs = AMD_512 if fp32 else AMD_BF16
    least, aim = {True: (1.9, 2.2) if large else (2.0, 2.7), False: (1.45, 2.1) if large else (1.3, 1.6)}[fp32]
    found = [Gate(what=f"{name} / best peer by default", ours="ours", peers=best, least=least, aim=aim, needs=needs)]
    if fp32 and not large:
        what = f"{name} / peer with the oneDNN flag"
        found.append(Gate(what=what, ours="ours", peers=flag, least=1.15, aim=1.4, needs=needs))
    share = {"B16-224": (0.85, 0.97 if fp32 else 0.95), "L14-336": (0.72, 0.85)}[case.model]
    if case.batch == 8 or large:
        what = f"{name}: share of the matrix product's rate"
        found.append(Gate(what=what, ours="ours", least=share[0], aim=share[1], needs=() if fp32 else AMD_BF16))
    return found


class Child:
    """timm after torch.compile with freezing, in a process of its own: inductor's caches do not know the difference
    between a frozen graph and one that is not. However the `with` block ends, process and file end with it."""

    def __init__(self, case: Case, weights: nn.Module, pixels: Tensor, threads: int):
        self.process: subprocess.Popen[str] | None = None
        handle, self.file = tempfile.mkstemp(prefix="perception-encoder-", suffix=".pt")
        os.close(handle)
        try:
            torch.save({"state": weights.state_dict(), "pixels": pixels}, self.file)
            arguments = [sys.executable, __file__, "--child", MODELS[case.model], self.file, str(threads)]
            self.process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.about = self._read()  # waits for the compilation
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __call__(self) -> None:
        self._write("run")
        self._read()

    def output(self) -> Tensor:
        self._write("save")
        self._read()
        return torch.load(self.file)

    def close(self) -> None:
        try:
            if self.process is not None:
                with suppress(OSError, subprocess.TimeoutExpired):  # it ended before, or compiles and does not listen
                    self._write("end")
                    self.process.wait(PATIENCE)
        finally:
            if self.process is not None:
                with suppress(BrokenPipeError), self.process:  # closes its pipes and waits
                    self.process.kill()  # nothing to one that has ended
            Path(self.file).unlink(missing_ok=True)

    def _write(self, word: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def _read(self) -> dict:
        assert self.process is not None
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the compiling child ended early")


@torch.inference_mode()
def child(name: str, file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    import torch._inductor.config as inductor

    inductor.freezing = True
    found = torch.load(file)
    theirs = timm_tower(tower(name))
    theirs.to(found["pixels"].dtype).load_state_dict(found["state"])
    run, start = torch.compile(theirs), time.perf_counter()
    output = run(found["pixels"])
    print(json.dumps({"compile seconds": time.perf_counter() - start}), flush=True)
    for line in sys.stdin:
        if line.strip() == "end":
            return
        if line.strip() == "save":
            torch.save(output, file)
        else:
            output = run(found["pixels"])
        print("{}", flush=True)


def limit_of(case: Case, model: nn.Module, dtype: torch.dtype) -> Limit:
    """The first product of the MLP: the largest there is, in the model's own shape."""
    config = model.config
    rows = case.batch * (config.grid**2 + config.class_token)
    rows = min(rows, 2048)  # beyond it the rate does not change, and the sample only gets longer
    return gemm(dtype, rows, config.width, config.mlp_width, "int8" if case.dtype == "int8" else None)


def contenders(
    case: Case, plain: nn.Module, theirs: nn.Module, pixels: Tensor, threads: int, slow: bool, stack: ExitStack
) -> Iterator[tuple[str, Call]]:
    """What a process of its own runs ends with `stack`."""
    fast = optimize(plain, "int8" if case.dtype == "int8" else None)
    yield "ours", lambda: fast.pooled(pixels)
    if slow:
        return
    if case.compiled:
        yield "timm, compile + freezing", stack.enter_context(Child(case, theirs, pixels, threads))
        return
    yield "timm", lambda: theirs(pixels)
    if case.dtype == "fp32":
        yield "ours, plain", lambda: plain.pooled(pixels)

        def flagged() -> Tensor:
            with onednn_fp32():
                return theirs(pixels)

        yield "timm, oneDNN flag", flagged


@torch.inference_mode()
def measure(case: Case, threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    dtype = DTYPES["fp32" if case.dtype == "fp32" else "bf16"]
    plain = tower(MODELS[case.model])
    theirs, side = timm_tower(plain), plain.config.image_size
    pixels = torch.randn(case.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    wanted, pixels = theirs(pixels), pixels.to(dtype)
    plain, theirs = plain.to(dtype), theirs.to(dtype)
    peer, work = "timm, compile + freezing" if case.compiled else "timm", case.batch * flops(plain.config)
    needed = forecast(work, dtype)
    left_out = {peer: f"one call takes about {needed:.0f} s here"} if needed > TOO_SLOW else {}
    more: dict = {"differences": {}}
    with ExitStack() as stack:
        calls = dict(contenders(case, plain, theirs, pixels, threads, bool(left_out), stack))
        for name, call in calls.items():
            output = call.output() if isinstance(call, Child) else call()
            more["differences"] |= agree(wanted, {name: output}, **bound(case, name))
        found = race(
            calls,
            limit_of(case, plain, dtype),
            work=dict.fromkeys(calls, work),
            rounds=chosen.rounds,
            least=chosen.least,
            seconds=chosen.seconds,
        )
        for call in calls.values():
            if isinstance(call, Child):
                more["compiling"] = call.about
    return describe(found, gates(case, threads), threads, left_out=left_out, **more)


def bound(case: Case, name: str) -> dict[str, float]:
    """What a contender may be off from timm in float32; the oneDNN flag rounds to bfloat16 where it can."""
    if case.dtype == "fp32" and "flag" not in name:
        return {"relative": 1e-5}
    return {"cosine": 0.999 if case.dtype == "int8" and name == "ours" else 0.9999}


def main() -> None:
    if "--child" in sys.argv:
        child(*sys.argv[sys.argv.index("--child") + 1 :])
        return
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for case in QUICK if chosen.quick else CASES:
            name = f"{case}, {threads} threads"
            if chosen.wants(name):
                cases[name] = measure(case, threads, chosen)
                show(str(case), cases[name])
                save("encoder", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
