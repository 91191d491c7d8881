"""What does it cost to turn a JPEG into the square of numbers a tower sees?

    python benchmarks/pixels.py

A picture of 1632 x 1224 pixels, noise of several octaves, as a JPEG of 746 kB within 5 %, and three photographs that
come with the package; to 224, 336 and 448 pixels. The peer is the published transform: Pillow's decoder, Pillow's
bilinear resize of the whole picture, to float, minus mean, by deviation. "decoding alone" is Pillow's decoder and
nothing else.
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from harness import Gate, Options, describe, options, race, save, show
from peers import gemm
from PIL import Image

import perception_encoder
from perception.pixels import PixelSpec

PHOTOS = Path(perception_encoder.__file__).parent / "samples" / "photos"
BYTES, OFF = 746_000, 0.05  # of the large JPEG, and how far from it an encoder may end: decoding costs what bytes cost


def noise_picture(width: int = 1632, height: int = 1224, seed: int = 0, weaker: float = 0.62) -> Image.Image:
    """Octaves of noise, each finer one weaker: about as much detail at every scale as a photograph has."""
    rng, total = np.random.default_rng(seed), np.zeros((height, width, 3), np.float32)
    for octave in range(2, 11):
        n = 2**octave
        small = rng.integers(0, 256, (max(1, n * height // width), n, 3), dtype=np.uint8)
        resized = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(resized, np.float32) * weaker ** (octave - 2)
    total -= total.min()
    return Image.fromarray((total * (255 / total.max())).astype(np.uint8))


def large_jpeg(seed: int = 0) -> bytes:
    """2 megapixels that weigh what a camera's weigh."""
    file = io.BytesIO()
    noise_picture(seed=seed, weaker=0.803).save(file, "JPEG", quality=96)
    data = file.getvalue()
    assert abs(len(data) / BYTES - 1) <= OFF, f"{len(data)} bytes; another encoder wants another quality"
    return data


def pictures() -> Iterator[tuple[str, bytes]]:
    yield "noise, 2 MP", large_jpeg()
    for name in ("retina", "hubble", "china"):
        yield f"{name}.jpg", (PHOTOS / f"{name}.jpg").read_bytes()


def published(data: bytes, side: int) -> torch.Tensor:
    """The published transform, written the way a dataset class would."""
    image = Image.open(io.BytesIO(data)).convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
    mean = std = torch.tensor([0.5, 0.5, 0.5])[:, None, None]
    return pixels.sub_(mean).div_(std)


def measure(data: bytes, side: int, name: str, threads: int, chosen: Options) -> dict:
    torch.set_num_threads(threads)
    spec = PixelSpec(size=side)
    whole, scaled = spec.fast(), spec.fast("scaled")
    assert torch.equal(spec(data, orient=False), published(data, side))
    codes, wanted = {}, spec.codes(data).int()
    for rule, fast in {"fast": whole, "fast, scaled": scaled}.items():
        off = (fast.codes(data).int() - wanted).abs()
        codes[rule] = {"most": int(off.max()), "mean": round(float(off.float().mean()), 4)}
    assert codes["fast"]["most"] <= 1, codes
    calls = {
        "ours": lambda: spec(data),
        "ours, fast": lambda: whole(data),
        "ours, fast, scaled": lambda: scaled(data),
        "published transform": lambda: published(data, side),
        "decoding alone": lambda: Image.open(io.BytesIO(data)).load(),
    }
    limit = gemm(torch.float32, 512, 1024, 1024)
    found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    gates = []
    if name.startswith("noise") and side in (224, 336):
        peer = ("published transform",)
        what = f"2 MP JPEG to {side} pixels"
        gates = [
            Gate(what=f"{what}, within 1 level", ours="ours, fast", peers=peer, least=1.5, aim=1.7),
            Gate(what=f"{what}, scaled decoding", ours="ours, fast, scaled", peers=peer, least=1.9, aim=2.2),
        ]
    return describe(found, gates, threads, **{"off by codes": codes, "bytes": len(data)})


def main() -> None:
    chosen, cases = options(__doc__), {}
    for threads in chosen.threads:
        for name, data in pictures():
            for side in (224, 336, 448):
                case = f"{name} to {side}, {threads} threads"
                if chosen.wants(case) and not (chosen.quick and (side != 224 or not name.startswith("noise"))):
                    cases[case] = measure(data, side, name, threads, chosen)
                    show(case, cases[case])
    save("pixels", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
