"""How fast does the 1B language model answer on a GPU, beside transformers' and beside memory itself?

    python benchmarks/gpu_decode.py
    python benchmarks/gpu_decode.py --only prefill

Perception-LM-1B whole, random weights, bfloat16. "decoding": 128 tokens after a prompt of 16, whole `generate` calls,
greedy, nothing that stops early; a share is the rate at which weights are read, of the rate of a copy (read and written
bytes both count) in the same round. "static + compile" is transformers' static cache, which compiles its decoding step.
"prefill": the first token after 37 tiles of 448 pixels and a question; a share is of the rate of a large matrix
product. Two models that compute the same in bfloat16 still differ in close calls of random weights, so what must agree
are the logits after the prompt. Without a GPU the promises are written down as not run.
"""

import copy as copying
from typing import Any

import decode
import gpu
import torch
from harness import Gate, Options, describe, options, race, save, show
from peers import agree
from torch import Tensor, nn

from perception.optimize import optimize
from perception_encoder.speed import flops
from perception_lm.config import PlmConfig
from perception_lm.processor import Batch

DEPTH, TOWER, NEW, PROMPT, TILES = 16, 23, 128, 16, 37
LARGE_PRODUCT = (8192, 8192, 8192)


def models(depth: int, tower: int) -> tuple[PlmConfig, Any, Any]:
    config, plain = decode.slice_of_1b(depth, tower)
    theirs = half(decode.transformers_model(config, copying.deepcopy(plain)))
    return config, plain.to("cuda", torch.bfloat16), theirs


def half(model: nn.Module) -> nn.Module:
    """transformers' model on the GPU in bfloat16, as its own loading leaves it: the angles stay in float32."""
    exact = {
        name: buffer.clone()
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if name.endswith("inv_freq")
    }
    model = model.to("cuda", torch.bfloat16)
    for name, buffer in exact.items():
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, buffer.to("cuda"))
    return model


def static(model: Any, tokens: Tensor, new: int) -> Tensor:
    found = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=new,
        do_sample=False,
        cache_implementation="static",
    )
    return found[:, -new:]


def decoding_gates(rows: int) -> list[Gate]:
    """What was promised of decoding."""
    what, eager = f"GPU, decoding, batch {rows}", ("transformers",)
    compiled = ("transformers, static + compile",)
    gates = [
        Gate(what=f"{what} / transformers eager", ours="ours", peers=eager, least=8, aim=12),
        Gate(what=f"{what} / static cache + compile", ours="ours", peers=compiled, least=1.2, aim=1.5),
        Gate(what=f"{what}: share of copy bandwidth", ours="ours", least=0.7, aim=0.75),
    ]
    return gates if rows == 1 else gates[1:2]


def decoding(chosen: Options, rows: int) -> dict:
    config, plain, theirs = models(2 if chosen.quick else DEPTH, 1)
    g = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, config.decoder.vocab - 256, (rows, PROMPT), generator=g)
    there = tokens.to("cuda")
    batch, new = decode.batch_of(tokens, [PROMPT] * rows), 16 if chosen.quick else NEW
    twins = {"ours": optimize(plain), "ours int8": optimize(plain, "int8"), "ours int4": optimize(plain, "int4")}
    bits = {"ours int8": 8.0, "ours int4": 4.5}
    # 16 layers of random weights in 4 bits: four of them are at 0.93 already
    least = {"ours": 0.999, "ours int8": 0.99, "ours int4": 0.8}
    wanted = plain(there)[:, -1]
    differences = agree(wanted, {"transformers": theirs(input_ids=there).logits[:, -1]}, cosine=0.999)
    for name, fast in twins.items():
        differences |= agree(wanted, {name: fast(there)[:, -1]}, cosine=least[name])
    calls = {
        **{name: lambda fast=fast: decode.answer(fast, batch, new) for name, fast in twins.items()},
        "ours, plain": lambda: decode.answer(plain, batch, new),
        "transformers": lambda: decode.theirs_answer(theirs, there, [PROMPT] * rows, new),
        "transformers, static + compile": lambda: static(theirs, there, new),
    }
    calls, failed = gpu.try_out(calls)
    work = {name: new * decode.weight_bytes(config, bits.get(name, 16.0)) for name in calls}
    result = race(
        calls,
        gpu.copy(),
        work=work,
        rounds=chosen.rounds,
        least=chosen.least,
        seconds=chosen.seconds,
        clock=gpu.Clock(),
    )
    more = {"tokens": new, "differences": differences, "gpu": gpu.device()}
    return describe(result, decoding_gates(rows), 0, left_out=failed, **more)


def prefill_gates(tiles: int = TILES) -> list[Gate]:
    """What was promised of the first token."""
    what = f"GPU, prefill of {tiles} tiles: share of the matrix product's rate"
    return [Gate(what=what, ours="ours", least=0.59, aim=0.7)]  # at most 1.7 times the time of its arithmetic


def prefill(chosen: Options) -> dict:
    config, plain, theirs = models(2 if chosen.quick else DEPTH, 2 if chosen.quick else TOWER)
    fast, tiles = optimize(plain), 3 if chosen.quick else TILES
    slots = (config.vision.grid // config.projector.pool) ** 2
    g = torch.Generator().manual_seed(2)
    text = torch.randint(0, config.decoder.vocab - 256, (2, 24), generator=g)
    media = torch.full((tiles * slots,), plain.media_token)
    tokens = torch.cat([text[0], media, text[1]])[None]
    side = config.vision.image_size
    pixels = torch.randn(tiles, 3, side, side, generator=g)
    batch = Batch(tokens=tokens, lengths=(tokens.shape[1],), pixels=pixels, media_counts=(tiles,))
    theirs_pixels, there = pixels[None].to("cuda", torch.bfloat16), tokens.to("cuda")
    calls = {
        "ours": lambda: decode.answer(fast, batch, 1),
        "ours, plain": lambda: decode.answer(plain, batch, 1),
        "transformers": lambda: theirs.generate(
            input_ids=there,
            attention_mask=torch.ones_like(there),
            pixel_values=theirs_pixels,
            max_new_tokens=1,
            do_sample=False,
        ),
    }
    calls, failed = gpu.try_out(calls)
    wanted = plain(there, pixels, last=1)[:, -1]
    found = {"ours": fast(there, pixels, last=1)[:, -1]}
    if "transformers" in calls:
        found["transformers"] = theirs(input_ids=there, pixel_values=theirs_pixels, logits_to_keep=1).logits[:, -1]
    differences = agree(wanted, found, cosine=0.999)
    work = dict.fromkeys(calls, tiles * flops(config.vision) + lm_flops(config, tokens.shape[1]))
    limit = gpu.gemm(torch.bfloat16, *LARGE_PRODUCT)
    result = race(
        calls,
        limit,
        work=work,
        rounds=chosen.rounds,
        least=chosen.least,
        seconds=chosen.seconds,
        clock=gpu.Clock(),
    )
    more = {"prompt": tokens.shape[1], "differences": differences, "gpu": gpu.device()}
    return describe(result, prefill_gates(tiles), 0, left_out=failed, **more)


def lm_flops(config: PlmConfig, prompt: int) -> float:
    """Products of every block over the prompt, causal attention, and one row of logits."""
    d = config.decoder
    blocks = decode.weight_bytes(config, 8) - d.vocab * d.width
    return 2.0 * blocks * prompt + 2.0 * d.depth * d.heads * d.head_dim * prompt**2 + 2.0 * d.vocab * d.width


def main() -> None:
    chosen, cases = options(__doc__), {}
    promised = {
        "decoding batch 1": decoding_gates(1),
        "decoding batch 8": decoding_gates(8),
        "prefill": prefill_gates(),
    }
    if not gpu.here("gpu_decode", __doc__, promised, chosen):
        return
    parts = {
        "decoding batch 1": lambda: decoding(chosen, 1),
        "decoding batch 8": lambda: decoding(chosen, 8),
        "prefill": lambda: prefill(chosen),
    }
    with torch.inference_mode():
        for name, part in parts.items():
            if chosen.wants(name):
                cases[name] = part()
                show(name, cases[name])
                save("gpu_decode", __doc__, cases, chosen)
                gpu.clean_up()


if __name__ == "__main__":
    main()
