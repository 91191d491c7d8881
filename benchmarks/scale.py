"""How does cost grow with batch, resolution, tiles, frames, context and prompts?

    python benchmarks/scale.py --threads 2
    python benchmarks/scale.py --threads 2 --only resolution

Each curve is measured on a model with random weights, optimised (`perception.optimize`), the median of a few calls a
point, smallest point first, then again from the largest. The law is the least-squares fit of a + b n + c n^2 with no
negative term, weighted so that every point counts by its relative error; "linear to" is where c n^2 reaches a tenth of
the whole. Curves are written to `results/scale.json`, and the tables between the marks of `scale.md` are made from it.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import answer, batch_of
from harness import conditions, options, save
from peers import randomise
from pixels import noise_picture

from perception.optimize import optimize
from perception.pixels import PixelSpec
from perception.tiling import tile_image
from perception_encoder.config import TextConfig
from perception_encoder.text import TextTransformer
from perception_encoder.vision import VisionTransformer
from perception_encoder.zoo import MODELS
from perception_lm.checkpoints import builder
from perception_lm.generation import prefill
from perception_lm.zoo import MODELS as LANGUAGE_MODELS

PAGE = Path(__file__).parent / "scale.md"
Point = tuple[int, Callable[[], object]]


def tower(image_size: int = 224) -> Any:
    config = replace(MODELS.get("PE-Core-B16-224").vision, image_size=image_size)
    return optimize(randomise(VisionTransformer(config)))


def batch() -> Iterator[Point]:
    """PE-Core-B16-224, pictures at once."""
    model = tower()
    for n in (1, 2, 4, 8, 16):
        yield n, partial(model.pooled, torch.randn(n, 3, 224, 224))


def resolution() -> Iterator[Point]:
    """PE-Core-B16's tower on one picture; n is the number of patches, from 112 to 896 pixels a side."""
    model = tower(448)
    for side in (112, 224, 336, 448, 672, 896):
        yield (side // 16) ** 2, partial(model, torch.randn(1, 3, side, side))


def tiles() -> Iterator[Point]:
    """A decoded picture to tiles of 448 pixels, thumbnail among them, by the fast rule."""
    rule = PixelSpec(size=448, interpolation="bicubic").fast()
    for side, most in ((400, 1), (560, 2), (800, 4), (1200, 9), (1600, 16), (2000, 25), (2400, 36)):
        size = (side, side // 2) if most == 2 else (side, side)
        picture = noise_picture(*size)
        yield len(tile_image(picture, 448, most, spec=rule)), lambda p=picture, m=most: tile_image(p, 448, m, spec=rule)


def frames() -> Iterator[Point]:
    """Frames of a clip of 640 x 360 to pixels of 224, then through PE-Core-B16-224."""
    model, rule = tower(), PixelSpec(size=224).fast()
    for n in (1, 2, 4, 8, 16):
        clip = torch.randint(0, 256, (n, 3, 360, 640), dtype=torch.uint8)
        yield n, lambda c=clip: model.pooled(rule.frames(c))


def quarter_of_1b() -> Any:
    """Perception-LM-1B with every width, head count and the vocabulary a quarter, and four layers: the proportions of
    the whole, at a sixteenth of the work a layer."""
    config = LANGUAGE_MODELS.get("Perception-LM-1B").config
    d = config.decoder
    decoder = replace(
        d,
        width=d.width // 4,
        depth=4,
        heads=d.heads // 4,
        kv_heads=d.kv_heads // 4,
        mlp_width=d.mlp_width // 4,
        vocab=d.vocab // 4,
    )
    vision = replace(config.vision, width=64, depth=1, heads=1, mlp_width=64)
    projector = replace(config.projector, in_width=64, width=decoder.width)
    config = replace(config, decoder=decoder, vision=vision, projector=projector)
    return optimize(randomise(builder(config, decoder.vocab - 254)))


def prompt() -> Iterator[Point]:
    """The first token after a prompt of n tokens: four layers of a quarter of Perception-LM-1B's widths."""
    model = quarter_of_1b()
    for n in (64, 256, 512, 1024, 2048, 4096):
        tokens = torch.randint(0, 30_000, (1, n))
        yield n, lambda t=tokens, n=n: prefill(model, batch_of(t, [n]), n + 1)


def context() -> Iterator[Point]:
    """Eight more tokens after n, whose keys and values are kept from the call before: the model of the prompt."""
    from perception_lm.generation import Session

    model = quarter_of_1b()
    for n in (64, 512, 1024, 2048, 4096, 8192):
        tokens, session = torch.randint(0, 30_000, (1, n)), Session()
        yield n, lambda t=tokens, n=n, s=session: answer(model, batch_of(t, [n]), 8, reuse=s)


def answers() -> Iterator[Point]:
    """Eight more tokens for each of n prompts of 32 tokens in one batch: the model of the prompt."""
    model = quarter_of_1b()
    for n in (1, 2, 4, 8, 16, 32):
        tokens = torch.randint(0, 30_000, (n, 32))
        yield n, lambda t=tokens, n=n: answer(model, batch_of(t, [32] * n), 8)


def prompts() -> Iterator[Point]:
    """Class prompts of 8 to 12 tokens through PE-Core-B16-224's text tower."""
    config: TextConfig = MODELS.get("PE-Core-B16-224").text
    model = optimize(randomise(TextTransformer(config)))
    for n in (1, 4, 16, 64):
        tokens = torch.zeros(n, config.context, dtype=torch.int64)
        for row in range(n):
            length = 8 + row % 5
            tokens[row, :length] = torch.randint(1, 49_000, (length,))
            tokens[row, 0], tokens[row, length - 1] = 49_406, 49_407
        yield n, lambda t=tokens: model(t)


CURVES = {
    "Batch": batch,
    "Resolution": resolution,
    "Tiles": tiles,
    "Frames": frames,
    "Prompt": prompt,
    "Context": context,
    "Answers": answers,
    "Prompts": prompts,
}


def measure(points: Sequence[Point], least: float) -> dict[int, float]:
    """Milliseconds a call of each point."""
    seconds: dict[int, list[float]] = {n: [] for n, _ in points}
    for _, call in points[:2]:
        call()
    for turn in (points, points[::-1], points):
        for n, call in turn:
            if not seconds[n]:
                call()
            start, used = time.perf_counter(), 0.0
            calls = 0
            while used < least:
                call()
                calls, used = calls + 1, time.perf_counter() - start
            seconds[n].append(used / calls)
    return {n: 1e3 * statistics.median(values) for n, values in seconds.items()}


def law(curve: Mapping[int, float]) -> dict[str, float]:
    """a, b and c of a + b n + c n^2, none below 0, and the largest relative error of the fit."""
    n = np.array(list(curve), float)
    y = np.array(list(curve.values()))
    columns, best = np.stack([n**0, n, n**2], 1) / y[:, None], None
    for used in range(1, 8):  # the few subsets of three terms: the least error with none negative
        take = [index for index in range(3) if used >> index & 1]
        found, *_ = np.linalg.lstsq(columns[:, take], np.ones(len(n)), rcond=None)
        if (found < 0).any():
            continue
        terms = np.zeros(3)
        terms[take] = found
        error = float(((columns @ terms - 1) ** 2).sum())
        if best is None or error < best[0] * 0.999:
            best = error, terms
    assert best is not None
    a, b, c = (float(term) for term in best[1])
    worst = float(np.abs(columns @ best[1] - 1).max())
    linear = (b + (b * b + 36 * a * c) ** 0.5) / (18 * c) if c > 0 else float("inf")
    found = {"a": a, "b": b, "c": c, "worst error": worst}
    return {**{k: float(f"{v:.3g}") for k, v in found.items()}, **({"linear to": round(linear)} if c > 0 else {})}


def table(case: Mapping[str, Any]) -> str:
    """A curve and its law in Markdown."""
    points, found = case["ms"], case["law"]
    names = {"a": "", "b": " n", "c": " n²"}
    terms = [f"{found[key]:g}{name}" for key, name in names.items() if found[key]]
    linear = f"; linear to about n = {found['linear to']}" if "linear to" in found else "; linear as far as measured"
    return "\n".join(
        [
            f"{case['what']} {case['threads']} threads.",
            "",
            "| n | " + " | ".join(points) + " |",
            "|---|" + "--:|" * len(points),
            "| ms | " + " | ".join(f"{value:.4g}" for value in points.values()) + " |",
            "| ms / n | " + " | ".join(f"{value / int(n):.3g}" for n, value in points.items()) + " |",
            "",
            f"ms ≈ {' + '.join(terms)} (within {found['worst error']:.0%}{linear}).",
        ]
    )


def in_page(page: str, cases: Mapping[str, Mapping[str, Any]]) -> str:
    """`scale.md` with each curve's table between its marks."""
    for name, case in cases.items():
        start, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if start in page:
            head, rest = page.split(start, 1)
            page = f"{head}{start}\n{table(case)}\n{end}{rest.split(end, 1)[1]}"
    return page


@torch.inference_mode()
def main() -> None:
    chosen, cases = options(__doc__), {}
    torch.set_num_threads(chosen.threads[-1])
    for name, points in CURVES.items():
        if chosen.wants(name) and not (chosen.quick and name != "Tiles"):
            curve = measure(list(points()), 0.02 if chosen.quick else 0.1)
            what = (points.__doc__ or "").strip()
            shown = {str(n): float(f"{value:.4g}") for n, value in curve.items()}
            cases[name] = {
                "what": what[0].upper() + what[1:],
                **conditions(chosen.threads[-1]),
                "ms": shown,
                "law": law(curve),
            }
            print(f"\n{name}\n{table(cases[name])}", flush=True)
            save("scale", __doc__, cases, chosen)
    if chosen.save:
        from perception.files import atomic_write

        with atomic_write(PAGE) as temporary:
            temporary.write_text(in_page(PAGE.read_text("utf-8"), cases), "utf-8")


if __name__ == "__main__":
    main()
