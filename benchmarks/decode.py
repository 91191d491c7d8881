"""How fast does the language model answer, beside transformers' on the same weights and beside memory itself?

    python benchmarks/decode.py --only "answer" --threads 2
    python benchmarks/decode.py --only "second question"

A slice of Perception-LM-1B: its widths, vocabulary and tower, 4 of its 16 layers (506 M parameters read a token) with
random weights. "answer": 24 tokens after a prompt of 16, whole `generate` calls, greedy, nothing that stops early;
the limit is reading memory, so a share is the part of the bandwidth with which weights are read. "batch 8": 8 tokens
for each of eight prompts of 2 to 16, padded there. "prefill": the first token after a tile of 448 pixels and a
question, the tower of 23 layers among it; where a plain product says that the peer takes longer than 12 s, a slice of
about the same proportions runs (4 layers of the tower, 1 of the decoder). "second question": the first token of another
question on the same picture.

Before anything is timed, the logits at the end of every prompt are compared with float32's, and every token of every
timed answer is looked up in the logits that the plain float32 model gives after the tokens before it: it may be behind
the best one by no more than the dtype's error in these logits.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from harness import Gate, Limit, Options, describe, options, race, save, show
from peers import DTYPES, agree, fill, forecast, gemm, parameters, randomise, read_sweep, shim
from torch import Tensor, nn

from perception.checkpoint import convert
from perception.optimize import optimize
from perception_lm import foreign_configs as foreign
from perception_lm import generation
from perception_lm.checkpoints import builder, hugging_face
from perception_lm.config import PlmConfig
from perception_lm.model import PerceptionLM
from perception_lm.processor import Batch
from perception_lm.zoo import MODELS

TOO_SLOW, DEPTH, TOWER, NEW, PROMPT = 12.0, 4, 23, 24, 16
BF16, VNNI = ("avx512_bf16",), ("avx512_bf16", "avx512_vnni")
ROUGH = 0.999  # cosine of a peer in bfloat16, which rounds after every operator
# What our logits may be off: in float32 by a relative error, else by cosine with float32's; the worst of eight rows had
# 0.99994, 0.99899, 0.929. Random weights lose more to rounding than trained ones.
RELATIVE, COSINE = 1e-5, {"bf16": 0.9999, "int8": 0.998, "int4": 0.9}


def slice_of_1b(depth: int = DEPTH, tower: int = 1) -> tuple[PlmConfig, PerceptionLM]:
    config = MODELS.get("Perception-LM-1B").config
    vision, decoder = replace(config.vision, depth=tower), replace(config.decoder, depth=depth)
    config = replace(config, vision=vision, decoder=decoder)
    with torch.device("meta"):
        model = builder(config, config.decoder.vocab - 254)
    return config, randomise(model.to_empty(device="cpu"))  # type: ignore[return-value]


def transformers_model(config: PlmConfig, model: PerceptionLM) -> nn.Module:
    """transformers' model with our weights, and nothing that ends an answer early."""
    shim()
    from transformers import PerceptionLMConfig, PerceptionLMForConditionalGeneration
    from transformers.initialization import no_init_weights

    vocab = config.decoder.vocab
    special = {"bos": vocab - 256, "end": vocab - 255, "eot": vocab - 247}
    described = foreign.write_hugging_face(
        config, media_tokens=(model.media_token, model.media_token + 1), special=special, dtype="float32"
    )
    settings = PerceptionLMConfig(**{key: value for key, value in described.items() if key != "model_type"})
    settings.tie_word_embeddings = False  # filled below; tied by hand, for the table names the embedding once
    with no_init_weights():
        theirs = PerceptionLMForConditionalGeneration(settings)
    state = dict(convert(model.state_dict(), hugging_face(config), back=True))
    state.setdefault("lm_head.weight", state["model.language_model.embed_tokens.weight"])
    fill(theirs, state)
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs


def batch_of(tokens: Tensor, lengths: list[int], pixels: Tensor | None = None) -> Batch:
    return Batch(
        tokens=tokens, lengths=tuple(lengths), pixels=pixels, media_counts=(int(pixels is not None),) * len(lengths)
    )


def answer(model: Any, batch: Batch, new: int, reuse: Any = None) -> Tensor:
    replies = generation.generate(model, batch, lambda ids: "", max_new_tokens=new, stop_tokens=(), reuse=reuse)
    return torch.tensor([reply.tokens for reply in replies])


def theirs_answer(model: Any, tokens: Tensor, lengths: list[int], new: int, pixels: Tensor | None = None) -> Tensor:
    left = torch.zeros_like(tokens)  # transformers pads on the left
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        left[row, tokens.shape[1] - length :] = tokens[row, :length]
        mask[row, tokens.shape[1] - length :] = 1
    media = {} if pixels is None else {"pixel_values": pixels[None]}
    found = model.generate(input_ids=left, attention_mask=mask, max_new_tokens=new, do_sample=False, **media)
    return found[:, -new:]


def at_ends(logits: Tensor, lengths: list[int]) -> Tensor:
    """B T V -> B V, where each prompt ends; what is padded behind it changes nothing there."""
    return logits[torch.arange(len(lengths)), torch.tensor(lengths) - 1]


def bound(dtype: str) -> dict[str, float]:
    return {"relative": RELATIVE} if dtype == "fp32" else {"cosine": COSINE[dtype]}


def behind(logits: Tensor, chosen: Tensor) -> float:
    """How far, at worst, a chosen token is behind the best one, in standard deviations of its logits.

    logits ... V   chosen ...
    """
    logits = logits.float()
    gap = logits.amax(-1) - logits.gather(-1, chosen[..., None])[..., 0]
    return float((gap / logits.std(-1)).max())


def look_up(plain: Any, batch: Batch, found: Mapping[str, Tensor], new: int) -> dict[str, dict[str, float]]:
    """How far the tokens of each answer (B new) are behind the best ones of the plain model after the same tokens;
    AssertionError beyond what the dtype that the name ends in explains."""
    table = {}
    for name, written in found.items():
        assert written.shape == (len(batch.lengths), new), f"{name}: {tuple(written.shape)} tokens"
        whole = F.pad(batch.tokens, (0, new))
        for row, length in enumerate(batch.lengths):
            whole[row, length : length + new] = written[row]
        before = torch.tensor(batch.lengths)[:, None] - 1 + torch.arange(new)  # B new
        logits = plain(whole)[torch.arange(len(whole))[:, None], before]
        far, allowed = behind(logits, written), most_behind(name.split()[-1])
        assert far <= allowed, f"{name}: a token is {far:.3g} standard deviations behind; {allowed:.3g} are explained"
        table[name] = {"tokens behind, std": float(f"{far:.3g}")}
    return table


def most_behind(dtype: str) -> float:
    """A logit's error has the relative error's size, in standard deviations of all; two of them, at worst 4 times that
    size each among so many near ties, may change places."""
    error = RELATIVE if dtype == "fp32" else (2 * (1 - COSINE[dtype])) ** 0.5
    return 4 * 2**0.5 * error


def weight_bytes(config: PlmConfig, bits: float) -> float:
    """Of one token: every matrix of the blocks, and the output's."""
    d = config.decoder
    block = d.width * d.head_dim * (2 * d.heads + 2 * d.kv_heads) + 3 * d.width * d.mlp_width
    return (d.depth * block + d.vocab * d.width) * bits / 8


def answers(chosen: Options, threads: int, rows: int) -> dict:
    """Decoding, batch 1 or a ragged batch of 8."""
    torch.set_num_threads(threads)
    config, plain = slice_of_1b(1 if chosen.quick else DEPTH)
    g = torch.Generator().manual_seed(1)
    lengths = [PROMPT] if rows == 1 else [2 + 2 * row for row in range(rows)]
    tokens = torch.randint(0, 128_000, (rows, max(lengths)), generator=g)
    batch, new = batch_of(tokens, lengths), 8 if chosen.quick or rows > 1 else NEW
    theirs = transformers_model(config, plain)
    wanted = at_ends(plain(tokens), lengths)
    differences = agree(
        wanted, {"transformers fp32": at_ends(theirs(input_ids=tokens).logits, lengths)}, **bound("fp32")
    )
    half = copy.deepcopy(plain).bfloat16()
    twins = {
        "fp32": (plain, None, 32),
        "bf16": (half, None, 16),
        "int8": (half, "int8", 8.1),
        "int4": (half, "int4", 4.5),
    }
    calls: dict[str, Callable[[], Tensor]] = {"transformers fp32": lambda: theirs_answer(theirs, tokens, lengths, new)}
    skipped = ("bf16", "int4") if chosen.quick else ("int4",) if rows > 1 else ()
    if not chosen.quick:
        theirs_half = transformers_model(config, half)  # its angles stay in float32, as its own loading leaves them
        calls["transformers bf16"] = lambda: theirs_answer(theirs_half, tokens, lengths, new)
        found = at_ends(theirs_half(input_ids=tokens).logits, lengths)
        differences |= agree(wanted, {"transformers bf16": found}, cosine=ROUGH)
    work = {}
    for name, (model, quantize, bits) in twins.items():
        if name in skipped:
            continue
        fast = optimize(model, quantize)
        differences |= agree(wanted, {f"ours {name}": at_ends(fast(tokens), lengths)}, **bound(name))
        calls[f"ours {name}"] = lambda fast=fast: answer(fast, batch, new)
        work[f"ours {name}"] = new * weight_bytes(config, bits)
    work |= {
        f"transformers {name}": new * weight_bytes(config, bits) for name, (_, _, bits) in twins.items() if bits > 9
    }
    for name, row in look_up(plain, batch, {name: call() for name, call in calls.items()}, new).items():
        differences[name] = differences.get(name, {}) | row
    raced = race(calls, read_sweep(), work=work, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    peer = ("transformers bf16",)
    what = f"decoding, batch {rows}" + (", ragged" if rows > 1 else "")
    gates = [
        Gate(what=f"{what}, bf16 / transformers", ours="ours bf16", peers=peer, least=2.3, aim=3.1, needs=BF16),
        Gate(what=f"{what}, bf16: share of bandwidth", ours="ours bf16", least=0.6, aim=0.8, needs=BF16),
        Gate(what=f"{what}, int8 / transformers bf16", ours="ours int8", peers=peer, least=4, aim=6, needs=VNNI),
        Gate(what=f"{what}, int4 / transformers bf16", ours="ours int4", peers=peer, least=5, aim=8, needs=VNNI),
    ]
    if rows > 1:
        padded = f"{what}, bf16 / transformers padded"
        gates = [Gate(what=padded, ours="ours bf16", peers=peer, least=2, aim=2.3, needs=BF16)]
    per_token = {
        name: round(1e3 * sorted(raced.seconds[name])[len(raced.seconds[name]) // 2] / new, 2) for name in calls
    }
    more = {"ms a token": per_token, "differences": differences}
    return describe(raced, [] if chosen.quick else gates, threads, **more)


def work_of_a_picture(config: PlmConfig, model: PerceptionLM, length: int) -> float:
    """FLOPs of the layers up to the first token, attention's own products left aside."""
    layers = sum(parameters(block) for block in model.decoder.blocks)
    return 2.0 * (parameters(model.encoder) * config.vision.grid**2 + layers * length)


def picture_prompt(config: PlmConfig, seed: int) -> Tensor:
    """A tile's slots between a few tokens, then a question of 24 tokens."""
    slots = (config.vision.grid // config.projector.pool) ** 2
    head = torch.arange(8)
    question = torch.randint(0, 128_000, (24,), generator=torch.Generator().manual_seed(seed))
    media = torch.full((slots,), config.decoder.vocab - 254)
    return torch.cat([head, media, torch.tensor([9]), question])[None]


def pictures(chosen: Options, threads: int, what: str, dtype: str) -> dict:
    """The first token after a picture, or after another question on the same one."""
    torch.set_num_threads(threads)
    depths = (DEPTH, TOWER)
    config, plain = slice_of_1b(*depths)
    if forecast(work_of_a_picture(config, plain, 300), DTYPES[dtype]) > TOO_SLOW:
        depths = (1, 4)
        config, plain = slice_of_1b(*depths)
    plain = plain.to(DTYPES[dtype])
    theirs = transformers_model(config, plain)
    pixels = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(2)).to(DTYPES[dtype])
    prompts = [picture_prompt(config, seed) for seed in (3, 4)]
    length, fast = prompts[0].shape[1], optimize(plain)
    batches = [batch_of(prompt, [length], pixels) for prompt in prompts]
    truth = theirs if dtype == "fp32" else transformers_model(config, copy.deepcopy(plain).float())
    wanted = truth(input_ids=prompts[0], pixel_values=pixels[None].float()).logits[:, -1]
    del truth
    differences = agree(wanted, {"ours": fast(prompts[0], pixels)[:, -1]}, **bound(dtype))
    if dtype != "fp32":
        logits = theirs(input_ids=prompts[0], pixel_values=pixels[None]).logits[:, -1]
        differences |= agree(wanted, {"transformers": logits}, cosine=ROUGH)
    calls: dict[str, Callable[[], Tensor]] = {
        "transformers": lambda: theirs_answer(theirs, prompts[0], [length], 1, pixels)
    }
    if what == "prefill":
        calls["ours"] = lambda: answer(fast, batches[0], 1)
        if dtype == "bf16":
            small = optimize(plain, "int8")
            differences |= agree(wanted, {"ours int8": small(prompts[0], pixels)[:, -1]}, cosine=0.999)
            calls["ours int8"] = lambda: answer(small, batches[0], 1)
        for name, call in calls.items():
            far = behind(wanted, call()[:, 0])
            assert far <= most_behind("int8" if "int8" in name else dtype), f"{name}: its token is {far:.3g} std behind"
    else:
        session, turn = generation.Session(), [0]

        def second() -> Tensor:
            turn[0] = 1 - turn[0]  # never the question that the cache holds
            return answer(fast, batches[turn[0]], 1, reuse=session)

        calls["ours"] = second
        same_answers(plain, fast, batches, session)
    limit: Limit = gemm(DTYPES[dtype], 1024, config.vision.width, config.vision.mlp_width)
    found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    peer = ("transformers",)
    if what == "prefill":
        gates = [
            Gate(
                what="prefill with one tile, bf16 / transformers",
                ours="ours",
                peers=peer,
                least=1.35,
                aim=1.6,
                needs=BF16,
            )
        ]
        gates.append(
            Gate(
                what="prefill with one tile, int8 / transformers bf16",
                ours="ours int8",
                peers=peer,
                least=1.9,
                aim=2.4,
                needs=VNNI,
            )
        )
        gates = gates if dtype == "bf16" else []
    else:
        gates = [
            Gate(what="second question on the same picture / transformers", ours="ours", peers=peer, least=10, aim=30)
        ]
    return describe(found, gates, threads, differences=differences, layers={"decoder": depths[0], "tower": depths[1]})


def same_answers(plain: Any, fast: Any, batches: list[Batch], session: generation.Session, new: int = 4) -> None:
    """AssertionError unless a session answers each question as the plain model does that saw no other."""
    wanted = [answer(plain, batch, new) for batch in batches]
    for turn in (0, 1, 0):  # the first fills the cache, each after it goes on from another question's
        assert torch.equal(answer(fast, batches[turn], new, reuse=session), wanted[turn]), f"question {turn} differs"


CASES = {
    "answer, batch 1": lambda chosen, threads: answers(chosen, threads, 1),
    "answer, batch 8": lambda chosen, threads: answers(chosen, threads, 8),
    "prefill fp32": lambda chosen, threads: pictures(chosen, threads, "prefill", "fp32"),
    "prefill bf16": lambda chosen, threads: pictures(chosen, threads, "prefill", "bf16"),
    "second question": lambda chosen, threads: pictures(chosen, threads, "second question", "fp32"),
}


@torch.inference_mode()
def main() -> None:
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for name, run in CASES.items():
            case = f"{name}, {threads} threads"
            if chosen.wants(case) and not (chosen.quick and name != "answer, batch 1"):
                cases[case] = run(chosen, threads)
                show(case, cases[case])
                save("decode", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
