"""What does the language model's loss cost when only answers are learned, beside the logits of every position?

    python benchmarks/lm_loss.py --only time --threads 2
    python benchmarks/lm_loss.py --only memory

Hidden states of 512 positions (memory: 1024), 35 % of them answers, a head of 128256 x 2048 with random weights;
forward and backward to hidden states and head. "all positions" is the usual way: logits of everything, then
cross-entropy that ignores the rest. Extra memory, in a process of its own, is the peak of one step over what remains
after it: weights, inputs and their gradients, which no way of computing a loss can save. "accumulating": the gradients
exist already, as in the second pass of an accumulated step, so that each way also makes the head's gradient (1.05 GB) a
second time.
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Gate, Options, at_most, conditions, describe, options, race, save, show
from load_memory import peak, resident
from peers import gemm
from torch import Tensor

from perception_lm.losses import answer_loss

WIDTH, VOCAB, SHARE = 2048, 128_256, 0.35


def inputs(positions: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, positions, WIDTH, generator=g).requires_grad_()
    labels = torch.randint(0, vocab, (1, positions), generator=g)
    labels[0, torch.randperm(positions, generator=g)[int(SHARE * positions) :]] = -100
    head = (torch.randn(vocab, WIDTH, generator=g) * WIDTH**-0.5).requires_grad_()
    return hidden, labels, head


def all_positions(hidden: Tensor, labels: Tensor, head: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head).float().flatten(0, 1), labels.flatten(), ignore_index=-100)


LOSSES = {"ours": lambda *given: answer_loss(*given, chunk=128), "all positions": all_positions}


def extra(how: str, positions: str, passes: str) -> float:
    """In the child: megabytes at the peak of the last pass over what remains after it."""
    hidden, labels, head = inputs(int(positions), VOCAB)
    LOSSES[how](*inputs(4, 64)).backward()
    for _ in range(int(passes)):
        Path("/proc/self/clear_refs").write_text("5")
        LOSSES[how](hidden, labels, head).backward()
    return (peak() - resident()) / 1e6


def main() -> None:
    if "--one" in sys.argv:
        print(json.dumps(extra(*sys.argv[sys.argv.index("--one") + 1 :])))
        return
    chosen, cases = options(__doc__), {}
    positions, vocab = (64, 16_000) if chosen.quick else (512, VOCAB)
    for threads in chosen.threads:
        case = f"time, {threads} threads"
        if chosen.wants(case):
            cases[case] = times(positions, vocab, threads, chosen)
            show(case, cases[case])
            save("lm_loss", __doc__, cases, chosen)
    for case, passes in (("memory", 1), ("memory, accumulating", 2)):
        if chosen.wants(case) and not chosen.quick:
            cases[case] = memory(passes)
            show(case, cases[case])
            print(f"  extra MB: {cases[case]['extra MB']}", flush=True)
            save("lm_loss", __doc__, cases, chosen)


def times(positions: int, vocab: int, threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    hidden, labels, head = inputs(positions, vocab)
    one, other = (loss(hidden, labels, head) for loss in LOSSES.values())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    del one, other
    calls = {how: lambda loss=loss: loss(hidden, labels, head).backward() for how, loss in LOSSES.items()}
    limit = gemm(torch.float32, 512, WIDTH, 4 * WIDTH)
    found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    gate = Gate(what="loss step / all positions", ours="ours", peers=("all positions",), least=2, aim=2.65)
    return describe(found, [gate], threads, positions=positions)


def memory(passes: int) -> dict:
    """Three processes a way: what a pass needs beside weights, inputs and gradients."""
    found: dict[str, list[float]] = {}
    for how in LOSSES:
        command = [sys.executable, __file__, "--one", how, "1024", str(passes)]
        runs = [subprocess.check_output(command, text=True) for _ in range(3)]
        found[how] = [round(json.loads(run.splitlines()[-1]), 1) for run in runs]
    ratios = [ours / theirs for ours, theirs in zip(*found.values(), strict=True)]
    gates = [at_most("loss step: extra memory / all positions", ratios, 0.5, 0.4)] if passes == 1 else []
    return {**conditions(0), "extra MB": found, "positions": 1024, "ratios": ratios, "gates": gates}


if __name__ == "__main__":
    main()
