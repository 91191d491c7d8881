"""Attention of one new token a row against a cache, split along the keys.

B rows  S slots of the cache  G query heads that share a key head  heads  kv_heads  head_dim

One query leaves most of a GPU idle, so the keys of a row are cut into pieces that run side by side; a second kernel
weighs the pieces together (flash decoding, Dao et al. 2023). A key head is read once for all its query heads.
"""

import torch
from torch import Tensor

from perception.kernels.triton.language import INTERPRETED, check, jit, launch, power_of_two, runs_on, tl

BLOCK = 64  # keys of one step
MAX_PIECES = 64


def attend_decode(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor, *, pieces: int | None = None) -> Tensor:
    """Softmax attention of one query a row over the first `lengths[b]` slots of row b.

    q             B heads head_dim
    keys, values  B S kv_heads head_dim, contiguous; kv_heads divides heads
    lengths       B int64; more than S counts as S; nothing to see gives zeros
    pieces        how often a row is cut; enough to fill the device by default
    return        B heads head_dim

    Nothing is read back from the device, so a recorded graph follows the lengths. Raises ValueError for shapes that do
    not fit.
    """
    fits = q.ndim == 3 and keys.ndim == 4 and keys.shape == values.shape and lengths.shape == q.shape[:1]
    fits = fits and len(keys) == len(q) and keys.shape[3] == q.shape[2] and q.shape[1] % keys.shape[2] == 0
    fits = fits and keys.is_contiguous() and values.is_contiguous() and q.stride(2) == 1
    check(fits, "q is B heads head_dim, keys B S kv_heads head_dim", q=q, keys=keys, values=values, lengths=lengths)
    if not runs_on(q):
        return attend_decode_plain(q, keys, values, lengths)
    B, heads, head_dim = q.shape
    S, kv_heads = keys.shape[1:3]
    pieces = pieces or _pieces(q.device, B * kv_heads, S)
    partial = q.new_empty(B * heads, pieces, head_dim, dtype=torch.float32)
    weight = q.new_empty(B * heads, pieces, 2, dtype=torch.float32)
    channels, group = max(power_of_two(head_dim), 16), heads // kv_heads
    launch(
        _piece,
        (B * kv_heads, pieces),
        q,
        keys,
        values,
        lengths,
        partial,
        weight,
        q.stride(0),
        q.stride(1),
        S,
        kv_heads,
        group,
        head_dim,
        head_dim**-0.5,
        PIECES=pieces,
        GROUP=max(power_of_two(group), 16),  # a matrix product has at least 16 rows
        BLOCK=BLOCK,
        CHANNELS=channels,
        WIDEN=INTERPRETED,  # whose matrix product takes bfloat16 for integers
        num_warps=4,
        num_stages=2,
    )
    out = q.new_empty(B, heads, head_dim)
    launch(
        _combine, (B * heads,), partial, weight, out, head_dim, pieces, PIECES=power_of_two(pieces), CHANNELS=channels
    )
    return out


def attend_decode_plain(q: Tensor, keys: Tensor, values: Tensor, lengths: Tensor) -> Tensor:
    """The twin of `attend_decode`."""
    q = q.float().unflatten(1, (keys.shape[2], -1))  # B kv_heads G head_dim
    scores = torch.einsum("bkgd,bskd->bkgs", q, keys.float()) * q.shape[-1] ** -0.5
    seen = torch.arange(keys.shape[1], device=q.device) < lengths[:, None]  # B S
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    weights = scores.softmax(-1).nan_to_num()  # nothing to see: zeros
    return torch.einsum("bkgs,bskd->bkgd", weights, values.float()).flatten(1, 2).to(values.dtype)


def _pieces(device: torch.device, programs: int, S: int) -> int:
    """Pieces that give each multiprocessor two programs, of a block of keys at least."""
    wanted = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8
    return max(1, min(-(-wanted // max(programs, 1)), -(-S // BLOCK), MAX_PIECES))


@jit
def _piece(  # type: ignore[no-untyped-def]
    q,
    keys,
    values,
    lengths,
    partial,
    weight,
    q_row,
    q_head,
    slots,
    kv_heads,
    group,
    head_dim,
    scale,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDEN: tl.constexpr,
):
    row = (tl.program_id(0) // kv_heads).to(tl.int64)
    kv_head = tl.program_id(0) % kv_heads
    piece = tl.program_id(1)
    length = tl.minimum(tl.load(lengths + row), slots).to(tl.int32)
    size = tl.cdiv(tl.cdiv(length, PIECES), BLOCK) * BLOCK  # by this row's own length: all pieces work
    start = piece * size
    stop = tl.minimum(start + size, length)
    member, channel, place = tl.arange(0, GROUP), tl.arange(0, CHANNELS), tl.arange(0, BLOCK)
    head = kv_head * group + member
    mine = (member[:, None] < group) & (channel[None, :] < head_dim)
    queries = tl.load(q + row * q_row + head[:, None] * q_head + channel[None, :], mask=mine, other=0.0)
    if WIDEN:
        queries = queries.to(tl.float32)
    best = tl.full((GROUP,), -float("inf"), tl.float32)
    total = tl.zeros((GROUP,), tl.float32)
    found = tl.zeros((GROUP, CHANNELS), tl.float32)
    for first in range(start, stop, BLOCK):
        slot = first + place
        at = ((row * slots + slot[:, None]) * kv_heads + kv_head) * head_dim + channel[None, :]
        seen = (slot[:, None] < stop) & (channel[None, :] < head_dim)
        k = tl.load(keys + at, mask=seen, other=0.0).to(queries.dtype)
        v = tl.load(values + at, mask=seen, other=0.0)
        if WIDEN:
            v = v.to(tl.float32)
        scores = tl.dot(queries, tl.trans(k), input_precision="ieee") * scale  # GROUP BLOCK
        scores = tl.where(slot[None, :] < stop, scores, -float("inf"))
        higher = tl.maximum(best, tl.max(scores, axis=1))  # finite: the first key of a block is always seen
        shrink = tl.exp(best - higher)
        share = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(share, axis=1)
        found = found * shrink[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        best = higher
    line = ((row * kv_heads + kv_head) * group + member) * PIECES + piece
    tl.store(partial + line[:, None] * head_dim + channel[None, :], found, mask=mine)
    tl.store(weight + line * 2, best, mask=member < group)
    tl.store(weight + line * 2 + 1, total, mask=member < group)


@jit
def _combine(  # type: ignore[no-untyped-def]
    partial, weight, out, head_dim, pieces, PIECES: tl.constexpr, CHANNELS: tl.constexpr
):
    line = tl.program_id(0).to(tl.int64)
    piece, channel = tl.arange(0, PIECES), tl.arange(0, CHANNELS)
    there = piece < pieces
    best = tl.load(weight + (line * pieces + piece) * 2, mask=there, other=-float("inf"))
    total = tl.load(weight + (line * pieces + piece) * 2 + 1, mask=there, other=0.0)
    share = tl.exp(best - tl.maximum(tl.max(best, axis=0), -1e30))  # 0, not NaN, where a row has nothing to see
    inside = there[:, None] & (channel[None, :] < head_dim)
    at = (line * pieces + piece[:, None]) * head_dim + channel[None, :]
    found = tl.sum(tl.load(partial + at, mask=inside, other=0.0) * share[:, None], axis=0)
    sum_ = tl.sum(total * share, axis=0)
    found = tl.where(sum_ > 0, found / tl.maximum(sum_, 1e-30), 0.0)
    tl.store(out + line * head_dim + channel, found.to(out.dtype.element_ty), mask=channel < head_dim)
