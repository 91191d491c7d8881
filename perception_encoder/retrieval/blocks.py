"""faiss indexes as files: trained once, filled in blocks, merged on disk, mapped into memory, distrusted when read.

n rows  C width  L lists
"""

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import IndexError_, missing_extra
from perception.files import atomic_write
from perception_encoder.retrieval.choice import LINKS, Choice

# How faiss begins a file of each kind (index_write.cpp): an index of inverted lists, or ids around a graph.
FOURCC = {"ivf-flat": b"IwFl", "ivf-sq8": b"IwSq", "ivf-pq": b"IwPQ", "hnsw": b"IxMp"}
SEED = 1234
COPY = 2**24  # bytes of a list copied at once
Fill = Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]  # (ids, vectors) of a few rows at a time


def faiss_module() -> ModuleType:
    """faiss, or the error that says how to install it."""
    try:
        import faiss
    except ImportError as error:
        raise missing_extra("faiss", "retrieval", str(error)) from error
    return faiss


def train(choice: Choice, sample: np.ndarray, width: int) -> Any:
    """An empty index of that kind; what has to be learnt is learnt from the sample, always in the same way."""
    faiss = faiss_module()
    if choice.kind == "hnsw":
        graph = faiss.IndexHNSWFlat(width, LINKS, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efConstruction = 80
        index = faiss.IndexIDMap(graph)
        graph.this.disown()
        index.own_fields = True
        return index
    plain = replace(choice, kind="ivf-flat") if choice.kind == "ivf-pq" else choice
    index = faiss.index_factory(width, plain.factory(width), faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter = SEED, 10
    index.cp.min_points_per_centroid, index.cp.max_points_per_centroid = 1, 64
    index.train(sample)
    return _product_quantized(index, choice, sample) if choice.kind == "ivf-pq" else index


def _product_quantized(lists: Any, choice: Choice, sample: np.ndarray) -> Any:
    """An index of the same lists that keeps each residual in `choice.code` bytes (Jegou et al. 2011).

    The codebooks are learnt here: faiss's own training takes minutes for narrow sub-vectors on some processors.
    """
    faiss = faiss_module()
    index = faiss.IndexIVFPQ(lists.quantizer, lists.d, choice.lists, choice.code, 8, faiss.METRIC_INNER_PRODUCT)
    index.own_fields, lists.own_fields = True, False
    lists.quantizer.this.disown()
    some = sample[: 64 * 256]
    _, nearest = lists.quantizer.search(some, 1)
    centres = lists.quantizer.reconstruct_n(0, choice.lists)
    pieces = torch.from_numpy(some - centres[nearest[:, 0]]).unflatten(1, (choice.code, -1))  # n M C/M
    books = [k_means(pieces[:, m].contiguous(), 256) for m in range(choice.code)]
    faiss.copy_array_to_vector(torch.stack(books).flatten().numpy(), index.pq.centroids)
    index.is_trained = True
    return index


def k_means(points: Tensor, k: int, *, rounds: int = 10, seed: int = SEED, unit: bool = False) -> Tensor:
    """k centres of n points (Lloyd's algorithm), always the same: n C -> k C

    unit  centres of length 1, for points on the sphere

    A centre that loses all its points moves to the point that is farthest from its own.
    """
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:k]
    centres = points[chosen].clone()
    for _ in range(rounds):
        nearest, score = assign(points, centres)
        counts = torch.bincount(nearest, minlength=k)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = sums / counts.clamp_min(1)[:, None]
        if empty := (counts == 0).nonzero().flatten().tolist():
            centres[empty] = points[score.argsort()[: len(empty)]]
        centres = F.normalize(centres, dim=1) if unit else centres
    return centres


def assign(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and how near: n each. Larger is nearer."""
    half = 0.5 * centres.square().sum(dim=1)
    found = [(some @ centres.T - half).max(dim=1) for some in points.split(max(1, 2**24 // len(centres)))]
    score = torch.cat([one.values for one in found]) - 0.5 * points.square().sum(dim=1)
    return torch.cat([one.indices for one in found]), score


def fill(index: Any, rows: Iterator[tuple[np.ndarray, np.ndarray]]) -> Any:
    for ids, vectors in rows:
        if len(ids):
            index.add_with_ids(np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(ids, np.int64))
    return index


def write(index: Any, path: Path) -> None:
    faiss = faiss_module()
    with atomic_write(path) as temporary:
        faiss.write_index(index, str(temporary))


def merge(trained: Path, blocks: Sequence[Path], out: Path) -> None:
    """One index of several that were filled apart from one trained index, list by list, through a little memory.

    The file is faiss's own format for inverted lists (`write_InvertedLists`, "ilar"), the same bytes as when all had
    been filled in memory in that order; unlike faiss's on-disk lists it names no other file, so it may be moved.
    """
    faiss = faiss_module()
    opened = [faiss.read_index(str(block), faiss.IO_FLAG_MMAP) for block in blocks]
    empty = faiss.serialize_index(faiss.read_index(str(trained))).tobytes()
    lists, code_size = opened[0].nlist, opened[0].code_size
    tail = b"ilar" + struct.pack("<QQ", lists, code_size) + b"sprs" + struct.pack("<Q", 0)
    if not empty.endswith(tail):
        raise IndexError_(f"this release of faiss ({faiss.__version__}) writes lists in a way that is not known here")
    total = sum(index.ntotal for index in opened)
    sizes = np.array([sum(index.invlists.list_size(i) for index in opened) for i in range(lists)], np.uint64)
    with atomic_write(out) as temporary, temporary.open("wb") as file:
        head = bytearray(empty[: -len(tail)])
        head[8:16] = struct.pack("<q", total)
        file.write(head + tail[:20])
        if int((sizes > 0).sum()) > lists // 2:
            file.write(b"full" + struct.pack("<Q", lists) + sizes.tobytes())
        else:
            pairs = np.array([(i, n) for i, n in enumerate(sizes.tolist()) if n], np.uint64)
            file.write(b"sprs" + struct.pack("<Q", pairs.size) + pairs.tobytes())
        for number in range(lists):
            _copy_list(file, opened, number, code_size)


def _copy_list(file: Any, opened: Sequence[Any], number: int, code_size: int) -> None:
    faiss = faiss_module()
    for what, size in (("codes", code_size), ("ids", 8)):
        for index in opened:
            lists = index.invlists
            count = lists.list_size(number)
            if not count:
                continue
            pointer = getattr(lists, f"get_{what}")(number)
            array = faiss.rev_swig_ptr(pointer, count * (size if what == "codes" else 1))
            data = memoryview(array).cast("B")
            for start in range(0, len(data), COPY):
                file.write(data[start : start + COPY])
            getattr(lists, f"release_{what}")(number, pointer)


def rows_in(path: Path) -> int:
    """How many rows a file of faiss says it holds. Raises IndexError_ for one that is cut short."""
    with path.open("rb") as file:
        head = file.read(16)
    if len(head) < 16:
        raise IndexError_(f"{path} is cut short; remove it and build again")
    return int(struct.unpack("<q", head[8:16])[0])


def read(path: Path, kind: str, width: int, rows: int, *, mapped: bool = True) -> Any:
    """An index of that kind and size, mapped into memory where faiss can.

    The first bytes are compared with what is expected before faiss sees the file: a length that a damaged or hostile
    file claims is never allocated. Raises IndexError_ naming the file.
    """
    faiss = faiss_module()
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise IndexError_(f"{path} cannot be read: {error.strerror}") from error
    if len(head) < 16 or head[:4] != FOURCC[kind]:
        raise IndexError_(f"{path} is no {kind} index of faiss; build the index again")
    d, total = struct.unpack("<iq", head[4:16])
    if d != width or total != rows:
        raise IndexError_(f"{path} says {total} vectors of {d}; expected {rows} of {width}. Build the index again")
    flag = (faiss.IO_FLAG_MMAP_IFC if kind == "hnsw" else faiss.IO_FLAG_MMAP) if mapped else 0
    try:
        index = faiss.read_index(str(path), flag)
    except (RuntimeError, MemoryError, OSError) as error:
        raise IndexError_(f"{path} cannot be read as an index: {str(error).splitlines()[0][:200]}") from error
    if index.ntotal != rows or index.d != width or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise IndexError_(f"{path} does not hold what it says; build the index again")
    return index


def search(
    index: Any, kind: str, effort: int, queries: np.ndarray, k: int, allowed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and rows, Q k each, -1 where there are no more.

    allowed  n bool, the rows that may be found
    """
    faiss = faiss_module()
    selector, bits = None, None
    if allowed is not None:
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(len(allowed), faiss.swig_ptr(bits))
    settings: dict[str, Any] = {} if selector is None else {"sel": selector}
    if kind == "hnsw":
        parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), **settings)
    else:
        parameters = faiss.SearchParametersIVF(nprobe=max(1, effort), **settings)
    scores, rows = index.search(np.ascontiguousarray(queries, np.float32), k, params=parameters)
    del bits  # faiss pointed into it until here
    return scores, rows
