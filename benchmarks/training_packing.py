"""A training step of packed samples against the same step padded: tokens a second, and memory at its peak.

The same model, the same samples in each pass; rounds alternate. Padding is to `seq_len`, as the
reference pads. Tokens are those of samples: padding is work, and counts as nothing.

    python benchmarks/training_packing.py            # writes benchmarks/results/training_packing.json
"""

import argparse
import ctypes
import gc
import random
import statistics
import string
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import record, spread

from perception.device import pick_device
from perception_encoder.config import VisionConfig
from perception_encoder.vision import VisionTransformer
from perception_lm.config import DecoderConfig, MediaConfig, PlmConfig, ProjectorConfig
from perception_lm.model import build
from perception_lm.processor import Processor
from perception_lm.tokenizer import LlamaTokenizer
from perception_lm.training.examples import Example, Examples, Pack, join, pad, plan
from perception_lm.training.rows import read_row
from perception_lm.training.task import AnswerTask

SEQ_LEN, TOKENS, SAMPLES = 1024, 4096, 12


def rows(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Pictures, a question each, and answers whose lengths spread as people's do: most short, some ten times that."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        length = max(4, min(560, int(rng.lognormvariate(4.2, 0.9))))
        answer = "".join(rng.choice(string.ascii_lowercase + "    ") for _ in range(length))
        picture = Image.new("RGB", (64, 64), tuple(rng.randrange(256) for _ in range(3)))
        turns = [{"from": "human", "value": "What is this?"}, {"from": "assistant", "value": answer}]
        found.append({"image": picture, "conversations": turns})
    return found


def model(device: torch.device) -> tuple[AnswerTask, Examples]:
    words = LlamaTokenizer.of_bytes()
    config = PlmConfig(
        vision=VisionConfig(
            image_size=64, patch_size=8, width=192, depth=4, heads=3, mlp_width=768, norm_post=False, pool=None
        ),
        projector=ProjectorConfig(in_width=192, width=256),
        decoder=DecoderConfig(
            width=256, depth=6, heads=4, kv_heads=2, mlp_width=768, vocab=words.vocab, context=SEQ_LEN, tied=True
        ),
        media=MediaConfig(tile=64, tiling="vanilla", context=SEQ_LEN),
    )
    torch.manual_seed(0)
    whole = build(config, words.image_token).to(device).train()
    assert isinstance(whole.encoder, VisionTransformer)
    return AnswerTask(whole), Examples(processor=Processor(words, config.media, 16), seq_len=SEQ_LEN)


def passes(examples: list[Example], layout: str, token: int) -> list[Pack]:
    if layout == "packed":
        return [join([examples[i] for i in row]) for row in plan(list(map(len, examples)), TOKENS)]
    return [pad([examples[i] for i in row], SEQ_LEN, token) for row in plan(list(map(len, examples)), TOKENS)]


def step(task: AnswerTask, packs: list[Pack]) -> tuple[float, float]:
    """Forward and backward of all passes: seconds, and the mean loss."""
    device = next(task.parameters()).device
    task.zero_grad(set_to_none=True)
    began, total, weight = time.perf_counter(), 0.0, 0.0
    for pack in packs:
        loss = task(pack)
        loss.total.backward()
        total, weight = total + float(loss.total.detach()), weight + loss.weight
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began, total / weight


class Peak:
    """Bytes held beyond what was held before."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed goes back to the system, and counts again
            Path("/proc/self/clear_refs").write_text("5")  # forget the highest mark (proc(5))
            self.before = _status("VmRSS")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status("VmHWM") - self.before


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def measure(rounds: int, device: torch.device) -> dict[str, Any]:
    task, make = model(device)
    examples = [make(read_row(row)) for row in rows(SAMPLES)]
    tokens = sum(map(len, examples))
    work = {layout: passes(examples, layout, make.processor.tokenizer.pad) for layout in ("packed", "padded")}
    seconds: dict[str, list[float]] = {layout: [] for layout in work}
    memory: dict[str, list[float]] = {layout: [] for layout in work}
    losses = {layout: step(task, packs)[1] for layout, packs in work.items()}  # warm-up
    assert abs(losses["packed"] - losses["padded"]) < 1e-4 * losses["padded"], losses
    for _ in range(rounds):
        for layout, packs in work.items():
            task.zero_grad(set_to_none=True)
            peak = Peak(device)
            seconds[layout].append(step(task, packs)[0])
            memory[layout].append(peak.bytes() / 2**20)
    result: dict[str, Any] = {
        "samples": SAMPLES,
        "tokens": tokens,
        "seq_len": SEQ_LEN,
        "tokens_of_a_pass": TOKENS,
        "learned": sum(pack.learned for pack in work["packed"]),
        "loss": losses,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    for layout, packs in work.items():
        result[layout] = {
            "passes": len(packs),
            "padding": round(1 - tokens / sum(pack.tokens.numel() for pack in packs), 4),
            "seconds": spread(seconds[layout]),
            "tokens_s": spread([tokens / s for s in seconds[layout]]),
            "peak_mib": spread(memory[layout]),
        }
    ratios = [b / a for a, b in zip(seconds["packed"], seconds["padded"], strict=True)]
    result["speed_ratio"] = spread(ratios)
    result["memory_ratio"] = round(statistics.median(memory["padded"]) / statistics.median(memory["packed"]), 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    result = measure(arguments.rounds, pick_device(arguments.device))
    print(record("training_packing", result))
    for layout in ("packed", "padded"):
        found = result[layout]
        print(layout, found["tokens_s"], "tokens/s", found["peak_mib"], "MiB", f"{found['padding']:.1%} padding")
    print("padded / packed:", result["speed_ratio"], "time,", result["memory_ratio"], "memory")


if __name__ == "__main__":
    main()
