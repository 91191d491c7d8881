"""What do 8 and 4 bits cost in answers, and what do they save in memory?

    python benchmarks/quantize_lm.py

No published weights are needed: a small decoder of ours is trained for a few minutes on bytes of Python's own standard
library, then its blocks are rounded, and text it has never seen is read with the full and the rounded weights.

    perplexity   of a byte, on modules that were kept out of training
    KL           mean over bytes of KL(full || rounded), in nats
    top-1        share of bytes where both models' likeliest next byte is the same
    greedy       of continuations written by both: share that are equal to the end, and bytes before they part

The memory of the published models is computed from their sizes, not measured. A model of half a million parameters
trained for minutes says how well the rounding works, not what a published model's answers will lose.
"""

import argparse
import copy
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record
from torch import Tensor

from perception_lm.config import DecoderConfig, PlmConfig
from perception_lm.decoder import Decoder
from perception_lm.quantize import decoder_linears, quantize, weight_bytes
from perception_lm.zoo import MODELS, count_parameters

CONFIG = DecoderConfig(
    width=128, depth=3, heads=4, kv_heads=2, mlp_width=384, vocab=256, tied=True, context=512, rope_theta=10_000.0
)
LENGTH, BATCH = 128, 8


def corpus() -> tuple[Tensor, Tensor]:
    """Bytes to learn from and bytes to be judged by: whole modules, every tenth is kept out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stat().st_size > 2000)
    parts = [torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files]
    held = torch.cat(parts[::10])
    return torch.cat([part for n, part in enumerate(parts) if n % 10]), held


def train(decoder: Decoder, data: Tensor, steps: int) -> float:
    """Cosine from 3e-3 after a short warm-up. Returns the mean loss of the last 50 steps."""
    g = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min(1, (n + 1) / 40) * (0.55 + 0.45 * math.cos(math.pi * n / steps))
    )
    losses: list[float] = []
    for step in range(steps):
        at = torch.randint(0, len(data) - LENGTH - 1, (BATCH,), generator=g)
        rows = torch.stack([data[i : i + LENGTH + 1] for i in at]).long()
        logits = decoder(decoder.embed(rows[:, :-1]))
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(step, round(losses[-1], 3), flush=True)
    return sum(losses[-50:]) / len(losses[-50:])


@torch.inference_mode()
def read(decoder: Decoder, rows: Tensor) -> Tensor:
    """Log-probabilities of each next byte: B T V float32"""
    dtype = decoder.token_embed.weight.dtype
    parts = [decoder(decoder.embed(part[:, :-1]).to(dtype)).float().log_softmax(-1) for part in rows.split(8)]
    return torch.cat(parts)


@torch.inference_mode()
def write(decoder: Decoder, prompts: Tensor, count: int) -> Tensor:
    """Greedy continuations: B count"""
    cache = decoder.new_cache(len(prompts), prompts.shape[1] + count)
    new = decoder(decoder.embed(prompts), cache, last=1).argmax(-1)
    written = [new]
    for _ in range(count - 1):
        new = decoder(decoder.embed(new), cache).argmax(-1)
        written.append(new)
    return torch.cat(written, 1)


def judge(decoder: Decoder, full: Tensor, rows: Tensor, answers: Tensor, prompts: Tensor) -> dict[str, float]:
    found = read(decoder, rows)
    loss = F.nll_loss(found.flatten(0, 1), rows[:, 1:].flatten())
    mine = write(decoder, prompts, answers.shape[1])
    same = (mine == answers).long().cumprod(1).sum(1)
    return {
        "perplexity": round(float(loss.exp()), 4),
        "KL, nats": round(float((full.exp() * (full - found)).sum(-1).mean()), 6),
        "top-1 agreement": round(float((full.argmax(-1) == found.argmax(-1)).float().mean()), 4),
        "greedy continuations equal": round(float((same == answers.shape[1]).float().mean()), 4),
        "greedy bytes before they part, mean": round(float(same.float().mean()), 1),
    }


def published(config: PlmConfig) -> dict[str, float]:
    """GB of the weights, computed: blocks rounded, all else in bfloat16."""
    with torch.device("meta"):
        layers = decoder_linears(Decoder(config.decoder)).values()
    total = count_parameters(config)["total"]
    weights, rows = sum(layer.weight.numel() for layer in layers), sum(layer.out_features for layer in layers)
    rest = 2 * (total - weights)
    sizes = {"bfloat16": 2 * total, "int8": rest + weights + 5 * rows, "int4": rest + weights // 2 + 4 * weights // 64}
    return {kind: round(size / 1e9, 2) for kind, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    data, held = corpus()
    decoder = Decoder(CONFIG)
    loss = train(decoder, data, arguments.steps)
    decoder.eval()

    g = torch.Generator().manual_seed(1)
    at = torch.randint(0, len(held) - LENGTH - 1, (128,), generator=g)
    rows = torch.stack([held[i : i + LENGTH + 1] for i in at]).long()
    prompts = rows[:64, :64]
    full, answers = read(decoder, rows), write(decoder, prompts, 64)
    variants = {
        "float32": decoder,
        "bfloat16": copy.deepcopy(decoder).bfloat16(),
        "int8": quantize(copy.deepcopy(decoder), "int8"),
        "int4, groups of 64": quantize(copy.deepcopy(decoder), "int4"),
        "int4, groups of 32": quantize(copy.deepcopy(decoder), "int4", group=32),
    }
    results = {}
    for name, variant in variants.items():
        blocks = sum(weight_bytes(layer) for layer in decoder_linears(variant).values())
        results[name] = {
            "weights, MB": round(weight_bytes(variant) / 1e6, 3),
            "of them the blocks' matrices, MB": round(blocks / 1e6, 3),
            **judge(variant, full, rows, answers, prompts),
        }
        print(name, results[name])
    result = {
        "method": (__doc__ or "").split("\n\n")[2].replace("\n", " "),
        "model": {
            "parameters": sum(p.numel() for p in decoder.parameters()),
            "config": CONFIG.to_dict(),
            "training": f"{arguments.steps} steps of {BATCH} x {LENGTH} bytes",
            "training bytes": len(data),
            "last loss, nats a byte": round(loss, 4),
        },
        "held-out bytes read": rows[:, 1:].numel(),
        "prompts": "64 of 64 bytes, continued by 64",
        "results": results,
        "published models, GB of weights (computed)": {n: published(MODELS.get(n).config) for n in MODELS.names()},
    }
    print(record("quantize_lm", result, packages=("torch", "torchao", "numpy")))


if __name__ == "__main__":
    main()
