"""How fast is the text tower on short prompts, beside open_clip's on the same weights?

    python benchmarks/text.py --only prompts --threads 2

"prompts": one prompt for each of 64 classes, tokens to embeddings; every position of 32 is computed there, here those
up to the longest prompt's end. "classifier": class names and templates to a zero-shot classifier, tokenizer and all,
against `open_clip.build_zero_shot_classifier`; 5 classes x 8 templates stand for 1000 x 80. Where a plain product says
that the peer takes longer than 10 s for all prompts, fewer run, and how many is written down. All are compared with
open_clip in float32 before anything is timed.
"""

import torch
from harness import Call, Gate, Options, describe, options, race, save, show
from peers import DTYPES, agree, clip, forecast, gemm, open_clip_model

from perception.optimize import optimize
from perception_encoder.zero_shot import ZeroShotClassifier

MODEL, QUICK = ("PE-Core-B16-224", "PE-Core-B-16"), ("PE-Core-S16-384", "PE-Core-S-16-384")  # here, there
TOO_SLOW = 10.0
NAMES = (  # noqa: SIM905
    "airplane apple armchair backpack bakery banana beach bear bicycle bird boat book bottle bridge bus butterfly cake "
    "camel camera castle cat chair clock cloud coffee cup cow crab dolphin door drum duck elephant farm ferry fire "
    "flower forest fountain fox frog garden giraffe glove goat guitar hammer harbour hat helicopter horse house island "
    "kettle kite ladder lamp lighthouse lion mountain motorcycle newspaper orange steam_locomotive"
).split()
CLASSES = [name.replace("_", " ") for name in NAMES]
TEMPLATES = (
    *("a photo of a {}.", "a photo of the {}.", "a bad photo of a {}.", "a photo of many {}.", "a drawing of a {}."),
    *(
        "a close-up photo of a {}.",
        "a bright photo of the {}.",
        "a photo of one {}.",
        "a {} in a video game.",
        "art of {}.",
    ),
)
NEEDS = {"fp32": ("AMD", "avx512f"), "bf16": ("avx512_bf16",)}


@torch.inference_mode()
def measure(what: str, dtype: str, threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    ours_name, their_name = QUICK if chosen.quick else MODEL
    plain = clip(ours_name)
    truth, theirs = (open_clip_model(plain, their_name) for _ in range(2))
    theirs, plain = theirs.to(DTYPES[dtype]), plain.to(DTYPES[dtype])
    if what == "prompts":
        count, layers = 8 if chosen.quick else 64, plain.text.blocks.parameters()
        work = 2.0 * plain.config.text.context * sum(parameter.numel() for parameter in layers)
        while count > 4 and dtype != "fp32" and forecast(count * work, DTYPES[dtype]) > TOO_SLOW:
            count //= 2
        prompts = [f"a photo of a {name}" for name in CLASSES[:count]]
        tokens, fast = plain.tokenize(prompts), optimize(plain.text)
        calls: dict[str, Call] = {
            "ours": lambda: fast(tokens),
            "open_clip": lambda: theirs.encode_text(tokens),
        }
        wanted = truth.encode_text(tokens)
    else:
        from open_clip import SimpleTokenizer, build_zero_shot_classifier

        fast = optimize(plain)
        names, templates, tokenizer = CLASSES[:5], TEMPLATES[:8], SimpleTokenizer(context_length=32)
        count = len(names) * len(templates)
        calls = {
            "ours": lambda: ZeroShotClassifier(fast, names, templates).weights,
            "open_clip": lambda: build_zero_shot_classifier(theirs, tokenizer, names, templates).T,
        }
        wanted = calls["open_clip"]()
    differences = {}
    for name, call in calls.items():  # a peer rounds to bfloat16 after every operator
        bound = {"relative": 1e-5} if dtype == "fp32" else {"cosine": 0.9999 if name == "ours" else 0.999}
        differences |= agree(wanted, {name: call()}, **bound)
    config = plain.config.text
    limit = gemm(DTYPES[dtype], 1024, config.width, 4 * config.width)
    found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    titles = {
        "prompts": f"text tower, {count} class prompts {dtype}",
        "classifier": "zero-shot classifier, prompts to weights",
    }
    least, aim = {"classifier": (4, 8), "prompts": {"fp32": (4.5, 7), "bf16": (2.5, 4)}.get(dtype)}[what]
    gate = Gate(
        what=f"{titles[what]} / open_clip", ours="ours", peers=("open_clip",), least=least, aim=aim, needs=NEEDS[dtype]
    )
    return describe(found, [gate], threads, differences=differences, prompts=count)


def main() -> None:
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for what, dtype in (("prompts", "fp32"), ("prompts", "bf16"), ("classifier", "fp32")):
            case = f"{what} {dtype}, {threads} threads"
            if chosen.wants(case) and not (chosen.quick and case[:12] != "prompts fp32"):
                cases[case] = measure(what, dtype, threads, chosen)
                show(case, cases[case])
                save("text", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
