"""Folder to index, and queries: this library beside the loop people write around open_clip.

    python benchmarks/retrieval.py --only folder --threads 2
    python benchmarks/retrieval.py --only queries --threads 2

"folder": JPEG files of 2 megapixels to an index that answers. The loop: Pillow, open_clip's own transform for each
picture, a batch, `encode_image`, numpy, `IndexFlatIP`. Ours is `pe.Index.build`, which also writes what it found to
disk, with hashes. Both sides have the same weights, and all vectors are compared with the float32 loop's before
anything is timed. A loop whose products alone would take longer than 20 s is left out, and said so.

"queries": the 10 nearest of 200,000 synthetic vectors of 1024 in clusters, for 1 query and for 64. "matrix product" is
`queries @ vectors.T` and `topk`. All exact searches give the same rows, or nothing is timed; "ours, as it lies" is ours
before it has copied anything, as in a process that searches once. The inverted index is tuned for a recall of 0.95.
"""

import itertools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
import torch.nn.functional as F
from harness import Call, Gate, Options, describe, options, race, save, show
from peers import agree, clip, forecast, gemm, open_clip_model, read_sweep
from PIL import Image
from pixels import large_jpeg
from record import versions
from torch import Tensor

import perception_encoder as pe
from perception.kernels.cpp import kernels
from perception.optimize import optimize
from perception_encoder.retrieval import exact
from perception_encoder.retrieval.faiss_store import FaissStore
from perception_encoder.speed import flops

MODEL, QUICK = ("PE-Core-B16-224", "PE-Core-B-16"), ("PE-Core-T16-384", "PE-Core-T-16-384")  # here, there
PICTURES, BATCH = 16, 8
ROWS, WIDTH, K = 200_000, 1024, 10
TOO_SLOW = 20.0  # seconds of a loop
BF16 = ("avx512_bf16",)


# --- folder to index -------------------------------------------------------------------------------------------------


def photographs(folder: Path, count: int) -> list[str]:
    """JPEG files of 1632 x 1224 that weigh what photographs weigh."""
    files = [folder / f"{seed:04d}.jpg" for seed in range(count)]
    for seed, file in enumerate(files):
        file.write_bytes(large_jpeg(seed))
    return [str(file) for file in files]


@torch.inference_mode()
def loop(files: list[str], model: Any, transform: Any, *, half: bool = False) -> np.ndarray:
    """The script of a hundred notebooks; it gives back what it put into its index."""
    rows = []
    for start in range(0, len(files), BATCH):
        pixels = torch.stack([transform(Image.open(f).convert("RGB")) for f in files[start : start + BATCH]])
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            features = model.encode_image(pixels)
        rows.append((features / features.norm(dim=-1, keepdim=True)).float().numpy())
    vectors = np.concatenate(rows)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    return vectors


def folder_to_index(dtype: str, threads: int, chosen: Options) -> dict[str, Any]:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    (ours, theirs), count = (QUICK, 2) if chosen.quick else (MODEL, PICTURES)
    plain = clip(ours)
    peer = open_clip_model(clip(ours), theirs)
    from open_clip import image_transform  # it can be imported now

    side, middle = plain.preprocess.size, (0.5, 0.5, 0.5)
    transform = image_transform(side, False, middle, middle, resize_mode="squash", interpolation="bilinear")
    with tempfile.TemporaryDirectory() as name:
        folder, number = Path(name), itertools.count()
        (folder / "in").mkdir()
        files = photographs(folder / "in", count)

        def build(model: Any) -> Callable[[], pe.Index]:
            return lambda: pe.Index.build(folder / "in", model, folder / f"out{next(number)}", batch_size=BATCH)

        mine: dict[str, Callable[[], pe.Index]] = {}
        peers: dict[str, Call] = {"open_clip loop": lambda: loop(files, peer, transform)}
        left_out = {}
        if dtype == "fp32":
            mine = {"ours": build(optimize(plain)), "ours, plain": build(plain)}
        else:
            half = plain.to(torch.bfloat16)
            mine = {"ours": build(optimize(half)), "ours, int8": build(optimize(half, "int8"))}
            needed = forecast(count * flops(plain.config.vision), torch.bfloat16)
            if needed > TOO_SLOW:
                left_out["open_clip loop, autocast"] = f"it takes about {needed:.0f} s here"
            else:
                peers["open_clip loop, autocast"] = lambda: loop(files, peer, transform, half=True)
        wanted = torch.from_numpy(loop(files, peer, transform))
        differences: dict[str, Any] = {}
        for name, make in mine.items():
            exact = {"relative": 1e-5} if dtype == "fp32" else {"cosine": 0.999 if "int8" in name else 0.9999}
            differences |= agree(wanted, {name: vectors_of(make())}, **exact)
        if half_loop := peers.get("open_clip loop, autocast"):
            differences |= agree(wanted, {"open_clip loop, autocast": torch.from_numpy(half_loop())}, cosine=0.999)
        size = round(sum(Path(file).stat().st_size for file in files) / count)
        calls = {**mine, **peers}
        limit = gemm(torch.float32 if dtype == "fp32" else torch.bfloat16, 1576, 768, 3072)
        found = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    facts = {"differences": differences, "pictures": count, "bytes of a picture": size, "batch": BATCH}
    case = describe(found, folder_gates(dtype), threads, left_out=left_out, **facts)
    rates = {name: round(1000 * count / timed["ms"]["median"], 3) for name, timed in case["contenders"].items()}
    return {**case, "pictures a second": rates, "versions of": versions(("faiss-cpu", "pillow"))}


def vectors_of(index: pe.Index) -> Tensor:
    """All vectors of an index, in the order of their files."""
    return torch.cat([rows.vectors for rows in index.store.scan()])


def folder_gates(dtype: str) -> list[Gate]:
    what, fp32, half = "folder to index, B16", ("open_clip loop",), ("open_clip loop, autocast",)
    if dtype == "fp32":
        return [Gate(what=f"{what} fp32 / open_clip loop", ours="ours", peers=fp32, least=1.0, aim=2.2)]
    return [
        Gate(what=f"{what} bf16 / open_clip loop fp32", ours="ours", peers=fp32, least=3.5, aim=4.2, needs=BF16),
        Gate(what=f"{what} bf16 / open_clip loop autocast", ours="ours", peers=half, least=1.5, aim=1.7, needs=BF16),
        Gate(
            what=f"{what} int8 / open_clip loop autocast", ours="ours, int8", peers=half, least=2.2, aim=2.7, needs=BF16
        ),
    ]


# --- queries ---------------------------------------------------------------------------------------------------------


class Collection:
    """The same vectors in every place that is searched."""

    def __init__(self, folder: Path, rows: int, width: int):
        random = torch.Generator().manual_seed(0)
        middle = torch.randn(rows // 100, width, generator=random)
        chosen = torch.randint(0, len(middle), (rows,), generator=random)
        self.vectors = F.normalize(middle[chosen] + torch.randn(rows, width, generator=random), dim=1)
        near = self.vectors[:64] + 0.02 * torch.randn(64, width, generator=random)
        self.asked, self.folder = F.normalize(near, dim=1), folder
        self.flat = faiss.IndexFlatIP(width)
        self.flat.add(self.vectors.numpy())
        for name in ("exact", "lists"):
            store = FaissStore.create(folder / name, width)
            for start in range(0, rows, 50_000):
                some = self.vectors[start : start + 50_000]
                store.add([str(i) for i in range(start, start + len(some))], some)
        self.report = store.optimize(kind="ivf-flat", target_recall=0.95)

    def searches(self, count: int) -> dict[str, Callable[[], np.ndarray]]:
        """Each gives the rows it finds: count K. Ours has made its copies."""
        asked, vectors = self.asked[:count], self.vectors
        ours, lying, lists = (FaissStore(self.folder / name) for name in ("exact", "exact", "lists"))
        lying.snapshot().copies.most = 0
        for _ in range(exact.PATIENCE + 1 + vectors.nbytes // exact.AT_ONCE):
            ours.search(asked, K)

        def rows(store: FaissStore) -> np.ndarray:
            return np.array([[int(match.id) for match in found] for found in store.search(asked, K)])

        return {
            "ours": lambda: rows(ours),
            "ours, as it lies": lambda: rows(lying),
            "matrix product": lambda: (asked @ vectors.T).topk(K).indices.numpy(),
            "faiss flat": lambda: self.flat.search(asked.numpy(), K)[1],
            "ours, inverted lists": lambda: rows(lists),
        }


def same_products(collection: Collection, rows: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether two answers are the same, but for rows whose products float32 does not tell apart."""
    asked = collection.asked[: len(rows), None].double()
    one, other = ((collection.vectors[torch.from_numpy(r)].double() * asked).sum(dim=-1) for r in (rows, wanted))
    return bool(((one - other).abs() < 1e-6).all()) and all(len(set(row)) == K for row in rows.tolist())


def queries(collection: Collection, count: int, threads: int, chosen: Options) -> dict[str, Any]:
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    calls = collection.searches(count)
    found = {name: call() for name, call in calls.items()}
    wanted, lists = found["faiss flat"], found.pop("ours, inverted lists")
    for name, rows in found.items():
        assert same_products(collection, rows, wanted), f"{name} is not exact"
    recall = np.mean([len(set(a) & set(b)) / K for a, b in zip(lists, wanted, strict=True)])
    limit = read_sweep() if count == 1 else gemm(torch.float32, count, collection.vectors.shape[1], 8192)
    rounds = race(calls, limit, rounds=chosen.rounds, least=chosen.least, seconds=chosen.seconds)
    least, aim = {1: (3, 5.5), 64: (8, 17)}[count]
    what = f"exact search, {count} {'query' if count == 1 else 'queries'} / faiss flat"
    gate = Gate(what=what, ours="ours", peers=("faiss flat",), least=least, aim=aim, needs=BF16)
    case = describe(rounds, [gate], threads)
    rates = {name: round(1000 * count / facts["ms"]["median"], 1) for name, facts in case["contenders"].items()}
    measured, index = collection.report["measured"], collection.report["index"]
    return {
        **case,
        "rows": len(collection.vectors),
        "width": collection.vectors.shape[1],
        "queries a second": rates,
        "inverted lists": {
            "lists": index["lists"],
            "nprobe": index["effort"],
            "recall@10 it reports": measured["recall"],
            "recall@10 here": round(float(recall), 4),
        },
        "versions of": versions(("faiss-cpu",)),
    }


def main() -> None:
    chosen, cases = options(__doc__), {}
    logging.getLogger("perception_encoder").setLevel(logging.ERROR)
    for threads, dtype in itertools.product(chosen.threads, ("fp32", "bf16")):
        name = f"folder {dtype}, {threads} threads"
        if chosen.wants(name) and not (chosen.quick and dtype == "bf16"):
            cases[name] = folder_to_index(dtype, threads, chosen)
            show(f"folder {dtype}", cases[name])
            save("retrieval", __doc__, cases, chosen)
    names = {(t, q): f"queries {q} at once, {t} threads" for t in chosen.threads for q in (1, 64)}
    if not any(map(chosen.wants, names.values())):
        return
    kernels()  # compiled once a machine, as `optimize` does; a search takes them where they are
    with tempfile.TemporaryDirectory() as folder:
        collection = Collection(Path(folder), *((20_000, 256) if chosen.quick else (ROWS, WIDTH)))
        for (threads, count), name in names.items():
            if chosen.wants(name):
                cases[name] = queries(collection, count, threads, chosen)
                show(f"queries {count} at once", cases[name])
                save("retrieval", __doc__, cases, chosen)


if __name__ == "__main__":
    main()
