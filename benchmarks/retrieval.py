"""Folder to index, and queries: this library against the loop people write around open_clip. One run, in turns.

    python benchmarks/retrieval.py                 # PE-Core-B16-224's sizes with random weights; minutes
    python benchmarks/retrieval.py --model nano    # PE-Core-nano; open_clip cannot load it: the loop runs our own tower

The loop: PIL, open_clip's own transform for each picture, a batch, `model.encode_image`, numpy, `IndexFlatIP`. Both
sides get the same weights, and their vectors are compared before anything is timed. Queries are measured on synthetic
vectors in clusters: the same exact search by faiss's flat index and by ours, and an inverted index of ours.
"""

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from record import record, spread

sys.path.insert(0, str(Path(__file__).parents[1]))
import perception_encoder as pe
from perception.optimize import optimize
from perception_encoder.retrieval.faiss_store import FaissStore
from perception_encoder.zoo import MODELS, export


def photographs(folder: Path, count: int, size: tuple[int, int] = (1632, 1224)) -> list[str]:
    """JPEG files of 2 megapixels that weigh what photographs weigh: noise of several scales."""
    files = []
    for seed in range(count):
        random = torch.Generator().manual_seed(seed)
        layers = [
            F.interpolate(
                torch.rand(1, 3, size[1] // s, size[0] // s, generator=random), (size[1], size[0]), mode="bilinear"
            )
            for s in (2, 16, 96)
        ]
        codes = (255 * (0.15 * layers[0] + 0.35 * layers[1] + 0.5 * layers[2])).to(torch.uint8)[0].permute(1, 2, 0)
        files.append(str(folder / f"{seed:04d}.jpg"))
        Image.fromarray(codes.numpy()).save(files[-1], quality=90)
    return files


def theirs(folder: Path, model: str, ours: Any) -> tuple[str, Any, Callable[[Any], torch.Tensor]]:
    """What the loop runs: open_clip with the same weights, or, where it has no such model, our own plain model."""
    if model != "PE-Core-B16-224":
        return "our plain model", ours, lambda image: ours.preprocess(image)
    for name in ("nms", "qnms"):  # a CUDA build of torchvision beside a CPU build of torch cannot be imported otherwise
        if "+cpu" in torch.__version__:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import open_clip

    export(ours, folder / "open_clip.safetensors", layout="open_clip")
    clip, _, transform = open_clip.create_model_and_transforms(
        "PE-Core-B-16",
        pretrained=str(folder / "open_clip.safetensors"),
        # Its own default for a local file is another mean, another filter and a crop, and nothing says so.
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
        image_interpolation="bilinear",
        image_resize_mode="squash",
    )
    return "open_clip", clip.eval(), transform


@torch.inference_mode()
def loop(files: list[str], model: Any, transform: Any, batch_size: int) -> tuple[np.ndarray, Any]:
    """The script of a hundred notebooks."""
    rows = []
    for start in range(0, len(files), batch_size):
        pixels = torch.stack([transform(Image.open(f).convert("RGB")) for f in files[start : start + batch_size]])
        features = model.encode_image(pixels)
        rows.append((features / features.norm(dim=-1, keepdim=True)).numpy())
    vectors = np.concatenate(rows)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return vectors, index


def folder_to_index(model: str, count: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """Seconds of both, in turns, on the same files."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        files = photographs(folder / "in", count)
        if model == "nano":
            plain = pe.load_clip("PE-Core-nano", device="cpu")
        else:
            torch.manual_seed(0)
            entry = MODELS.get(model)
            plain = pe.CLIP(
                pe.VisionTransformer(entry.vision, entry.pixels), pe.TextTransformer(entry.text), entry.pixels
            ).eval()
        who, other, transform = theirs(folder, model, plain)
        fast = optimize(plain)
        wanted, _ = loop(files[:batch_size], other, transform, batch_size)
        got = pe.embed(fast, files[:batch_size], batch_size=batch_size).numpy()
        cosine = float((wanted * got).sum(axis=1).min())
        assert cosine > 0.9999, f"the vectors differ: cosine {cosine}"
        times: dict[str, list[float]] = {"loop": [], "ours, plain": [], "ours, fast": []}
        for number in range(rounds):
            started = time.perf_counter()
            loop(files, other, transform, batch_size)
            times["loop"].append(time.perf_counter() - started)
            for label, clip in (("ours, plain", plain), ("ours, fast", fast)):
                started = time.perf_counter()
                pe.Index.build(folder / "in", clip, folder / f"{label}{number}", batch_size=batch_size)
                times[label].append(time.perf_counter() - started)
        rates = {label: spread([count / t for t in some], 3) for label, some in times.items()}
        for label, rate in rates.items():
            print(
                f"{label:<12} {rate['median']:8.2f} pictures/s ({rate['median'] / rates['loop']['median']:.2f}x)",
                flush=True,
            )
        return {
            "model": model,
            "the loop runs": who,
            "pictures": count,
            "of": "JPEG, 1632x1224",
            "batch_size": batch_size,
            "least cosine between the two": round(cosine, 6),
            "pictures a second": rates,
            "times the loop": {k: round(v["median"] / rates["loop"]["median"], 3) for k, v in rates.items()},
        }


def queries(rows: int, width: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of a query alone and of 64: faiss's flat index, our exact search, an inverted index of ours."""
    random = torch.Generator().manual_seed(0)
    middle = torch.randn(rows // 100, width, generator=random)
    vectors = F.normalize(
        middle[torch.randint(0, len(middle), (rows,), generator=random)] + torch.randn(rows, width, generator=random),
        dim=1,
    )
    asked = F.normalize(vectors[:64] + 0.02 * torch.randn(64, width, generator=random), dim=1)
    flat = faiss.IndexFlatIP(width)
    flat.add(vectors.numpy())
    with tempfile.TemporaryDirectory() as name:
        store = FaissStore.create(Path(name) / "flat", width)
        approximate = FaissStore.create(Path(name) / "ivf", width)
        for start in range(0, rows, 50_000):
            ids = [str(i) for i in range(start, min(start + 50_000, rows))]
            for one in (store, approximate):
                one.add(ids, vectors[start : start + 50_000])
        report = approximate.optimize(kind="ivf-flat", target_recall=0.95)
        wanted = flat.search(asked.numpy(), 10)[1]
        runs: dict[str, Callable[[int], Any]] = {
            "faiss flat": lambda q: flat.search(asked[:q].numpy(), 10),
            "ours, exact": lambda q: store.search(asked[:q], 10),
            "ours, ivf-flat": lambda q: approximate.search(asked[:q], 10),
        }
        exact = np.array([[int(match.id) for match in row] for row in store.search(asked, 10)])
        assert (np.sort(exact) == np.sort(wanted)).mean() > 0.999
        found: dict[str, Any] = {}
        for count in (1, 64):
            times: dict[str, list[float]] = {label: [] for label in runs}
            for _ in range(rounds):
                for label, run in runs.items():
                    started = time.perf_counter()
                    run(count)
                    times[label].append(1000 * (time.perf_counter() - started))
            found[f"ms for {count}"] = {label: spread(some, 3) for label, some in times.items()}
            for label, some in found[f"ms for {count}"].items():
                print(f"{label:<16} {count:3} queries: {some['median']:9.2f} ms", flush=True)
        ivf = np.array([[int(match.id) for match in row] for row in approximate.search(asked, 10)])
        shares = [len(set(a) & set(b)) / 10 for a, b in zip(ivf, wanted, strict=True)]
        return {
            "rows": rows,
            "width": width,
            **found,
            "recall@10 of ivf-flat on these queries": round(float(np.mean(shares)), 4),
            "recall@10 it reports": report["measured"]["recall"],
            "nprobe": report["index"]["effort"],
            "lists": report["index"]["lists"],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="PE-Core-B16-224")
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", choices=["folder", "queries"])
    parser.add_argument("--no-record", action="store_true")
    given = parser.parse_args()
    logging.getLogger("perception_encoder").setLevel(logging.ERROR)
    torch.set_num_threads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    result: dict[str, Any] = {"threads": given.threads}
    if given.only != "queries":
        result["folder to index"] = folder_to_index(given.model, given.pictures, given.batch_size, given.rounds)
    if given.only != "folder":
        result["queries"] = queries(given.rows, given.width, max(5, given.rounds))
    if not given.no_record:
        name = "retrieval" + (f"_{given.only}" if given.only else "") + ("_nano" if given.model == "nano" else "")
        print(record(name, result, ("torch", "numpy", "pillow", "faiss-cpu", "open-clip-torch")))


if __name__ == "__main__":
    main()
