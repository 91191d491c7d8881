"""What does it cost to cut a picture into tiles of 448 pixels for the language model?

    python benchmarks/tiling.py

A decoded picture of 1632 x 1224 becomes 35 tiles and a thumbnail, one of 4032 x 3024 becomes 12 and a thumbnail. Peers:
transformers' PerceptionLM image processor, and the published algorithm as one writes it with Pillow (resize, crop each
tile, to float, stack, normalise). transformers resizes with the kernel that the fast rule uses; both are within two
codes of Pillow's bicubic.
"""

import numpy as np
import torch
from harness import Gate, Options, describe, options, race, save, show
from peers import gemm, shim
from PIL import Image
from pixels import noise_picture

from perception.pixels import PixelSpec
from perception.tiling import choose_grid, tile_codes, tile_image

TILE = 448


def with_pillow(image: Image.Image) -> torch.Tensor:
    """The published algorithm, step by step."""
    cols, rows = choose_grid(*image.size)
    large = image.resize((cols * TILE, rows * TILE), Image.Resampling.BICUBIC)
    pieces = [image.resize((TILE, TILE), Image.Resampling.BICUBIC)]
    for row in range(rows):
        for col in range(cols):
            left, top = col * TILE, row * TILE
            pieces.append(large.crop((left, top, left + TILE, top + TILE)))
    tensors = [torch.from_numpy(np.array(piece)).permute(2, 0, 1).contiguous().float().div(255) for piece in pieces]
    mean = std = torch.tensor([0.5, 0.5, 0.5])[:, None, None]
    return torch.stack([(tensor - mean) / std for tensor in tensors])


def transformers_processor() -> object:
    shim()
    from transformers.models.perception_lm.image_processing_perception_lm import PerceptionLMImageProcessor

    return PerceptionLMImageProcessor(
        vision_input_type="thumb+tile",
        tile_size=TILE,
        max_num_tiles=36,
        size={"height": TILE, "width": TILE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        resample=3,
        do_rescale=True,
        do_normalize=True,
        do_resize=True,
    )


def measure(size: tuple[int, int], threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    image, rule = noise_picture(*size), PixelSpec(size=TILE, interpolation="bicubic")
    fast, processor = rule.fast(), transformers_processor()
    theirs = processor(image, return_tensors="pt").pixel_values.squeeze(0)  # type: ignore[operator]
    pillow = with_pillow(image)
    assert torch.equal(tile_image(image), pillow)
    off = {
        "ours, fast / transformers": (tile_image(image, spec=fast) - theirs).abs().max() * 127.5,
        "ours, fast / Pillow": (tile_image(image, spec=fast) - pillow).abs().max() * 127.5,
        "transformers / Pillow": (theirs - pillow).abs().max() * 127.5,
    }
    assert max(off.values()) < 3.01, off
    calls = {
        "ours": lambda: tile_image(image),
        "ours, fast": lambda: tile_image(image, spec=fast),
        "ours, fast, bf16 tiles": lambda: tile_image(image, spec=fast, dtype=torch.bfloat16),
        "ours, fast, uint8 tiles": lambda: tile_codes(image, spec=fast),
        "transformers": lambda: processor(image, return_tensors="pt"),  # type: ignore[operator]
        "plain Pillow": lambda: with_pillow(image),
    }
    limit = gemm(torch.float32, 512, 1024, 1024)
    found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    what, gates = f"{len(theirs)} tiles", []
    if len(theirs) == 36:
        gates = [
            Gate(what=f"{what} / transformers", ours="ours, fast", peers=("transformers",), least=1.5, aim=2),
            Gate(what=f"{what} / plain Pillow", ours="ours, fast", peers=("plain Pillow",), least=4, aim=6),
        ]
    levels = {name: round(float(value), 2) for name, value in off.items()}
    return describe(found, gates, threads, **{"tiles": len(theirs), "off by codes, most": levels})


def main() -> None:
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for size in ((1632, 1224),) if chosen.quick else ((1632, 1224), (4032, 3024)):
            case = f"{size[0]} x {size[1]}, {threads} threads"
            if chosen.wants(case):
                cases[case] = measure(size, threads, chosen)
                show(case, cases[case])
    save("tiling", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
