"""Rotary embedding on a packed projection, as it comes out of one linear map: no copy of q, k or v is made.

B batch  N tokens  T new tokens  heads  kv_heads  head_dim

Angles are float32 tables and the turn is computed in float32, whatever the dtype. Two neighbouring channels are one
rotating plane, as in `perception.rope`.
"""

import torch
from torch import Tensor

from perception.kernels.triton.language import check, jit, launch, power_of_two, runs_on, tl
from perception.rope import Rope, rotate

HEADS = 8  # heads of one program


def rotate_qk(qkv: Tensor, rope: Rope) -> Tensor:
    """Turn q and k where they lie, and leave v; returns the same tensor.

    qkv   B N 3 heads head_dim, contiguous
    rope  cos, sin, each N head_dim/2, float32

    Raises ValueError for shapes that do not fit.
    """
    cos, sin = rope
    fits = qkv.ndim == 5 and qkv.shape[2] == 3 and qkv.is_contiguous() and _table_fits(rope, qkv.shape[-1])
    check(fits and len(cos) == qkv.shape[1], "qkv is B N 3 heads head_dim, contiguous", qkv=qkv, cos=cos, sin=sin)
    if not runs_on(qkv):
        return rotate_qk_plain(qkv, rope)
    B, N, _, heads, head_dim = qkv.shape
    grid = (B * N, -(-2 * heads // HEADS))
    launch(
        _rotate_qk, grid, qkv, cos, sin, N, heads, head_dim, HEADS=HEADS, HALF=power_of_two(head_dim // 2), num_warps=2
    )
    return qkv


def rotate_qk_plain(qkv: Tensor, rope: Rope) -> Tensor:
    """The twin of `rotate_qk`."""
    for part in qkv.unbind(2)[:2]:
        part.copy_(rotate(part, rope))
    return qkv


def rotate_into_cache(qkv: Tensor, rope: Rope, positions: Tensor, keys: Tensor, values: Tensor, heads: int) -> Tensor:
    """Turn q where it lies, and turn k and lay v into their slots of the cache.

    qkv           B T heads+2*kv_heads head_dim, contiguous: all q, then all k, then all v
    rope          cos, sin, each positions head_dim/2, float32: the row of each position that may come
    positions     B T int64: where the tokens stand, ascending; one beyond the cache or the table is turned, not kept
    keys, values  B capacity kv_heads head_dim, contiguous, written to
    return        B T heads head_dim, a view of `qkv`

    Raises ValueError for shapes that do not fit.
    """
    kv_heads = keys.shape[2]
    check(
        qkv.ndim == 4
        and qkv.is_contiguous()
        and qkv.shape[2] == heads + 2 * kv_heads
        and positions.shape == qkv.shape[:2]
        and keys.shape == values.shape
        and keys.is_contiguous()
        and values.is_contiguous()
        and (len(keys), keys.shape[3]) == (len(qkv), qkv.shape[3])
        and _table_fits(rope, qkv.shape[3]),
        f"qkv is B T {heads}+2*kv_heads head_dim, keys and values B capacity kv_heads head_dim, contiguous",
        qkv=qkv,
        cos=rope[0],
        positions=positions,
        keys=keys,
        values=values,
    )
    if not runs_on(qkv):
        return rotate_into_cache_plain(qkv, rope, positions, keys, values, heads)
    B, T, total, head_dim = qkv.shape
    grid = (B * T, -(-total // HEADS))
    launch(
        _rotate_into_cache,
        grid,
        qkv,
        *rope,
        positions.contiguous(),
        keys,
        values,
        T,
        heads,
        kv_heads,
        head_dim,
        keys.shape[1],
        len(rope[0]),
        HEADS=HEADS,
        HALF=power_of_two(head_dim // 2),
        num_warps=2,
    )
    return qkv[:, :, :heads]


def rotate_into_cache_plain(
    qkv: Tensor, rope: Rope, positions: Tensor, keys: Tensor, values: Tensor, heads: int
) -> Tensor:
    """The twin of `rotate_into_cache`."""
    kv_heads, capacity = keys.shape[2], keys.shape[1]
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    at = positions.clamp(max=len(rope[0]) - 1).flatten()
    table = rope[0][at], rope[1][at]
    for part in (q, k):
        part.copy_(rotate(part.flatten(0, 1)[None], table)[0].view_as(part))
    kept = (positions < min(capacity, len(rope[0])))[..., None, None]  # B T 1 1
    # a token that is not kept stands in for the first of its row, or for what is there
    slots = torch.where(kept[..., 0, 0], positions, positions[:, :1]).clamp(max=capacity - 1)
    rows = torch.arange(len(qkv), device=qkv.device)[:, None]
    for new, cache in ((k, keys), (v, values)):
        new = torch.where(kept, new, new[:, :1]).to(cache.dtype)
        cache[rows, slots] = torch.where(kept[:, :1], new, cache[rows, slots])
    return q


def _table_fits(rope: Rope, head_dim: int) -> bool:
    cos, sin = rope
    float32 = cos.dtype == sin.dtype == torch.float32
    return float32 and cos.shape == sin.shape and cos.shape[1] * 2 == head_dim and cos.stride() == sin.stride()


@jit
def _turn(x, cos, sin, HEADS: tl.constexpr, HALF: tl.constexpr):  # type: ignore[no-untyped-def]
    """HEADS 2*HALF float32, neighbours paired, by cos, sin of HALF."""
    a, b = tl.split(tl.reshape(x, (HEADS, HALF, 2)))
    turned = tl.join(a * cos[None, :] - b * sin[None, :], a * sin[None, :] + b * cos[None, :])
    return tl.reshape(turned, (HEADS, 2 * HALF))


@jit
def _rotate_qk(  # type: ignore[no-untyped-def]
    qkv, cos, sin, tokens, heads, head_dim, HEADS: tl.constexpr, HALF: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel, plane = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    at = qkv + (row * 3 * heads + head[:, None]) * head_dim + channel[None, :]
    inside = (head[:, None] < 2 * heads) & (channel[None, :] < head_dim)
    angle = (row % tokens) * (head_dim // 2) + plane
    c = tl.load(cos + angle, mask=plane < head_dim // 2, other=1.0)
    s = tl.load(sin + angle, mask=plane < head_dim // 2, other=0.0)
    x = tl.load(at, mask=inside, other=0.0)
    tl.store(at, _turn(x.to(tl.float32), c, s, HEADS, HALF).to(x.dtype), mask=inside)


@jit
def _rotate_into_cache(  # type: ignore[no-untyped-def]
    qkv,
    cos,
    sin,
    positions,
    keys,
    values,
    tokens,
    heads,
    kv_heads,
    head_dim,
    capacity,
    angles,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel, plane = tl.arange(0, 2 * HALF), tl.arange(0, HALF)
    at = qkv + (row * (heads + 2 * kv_heads) + head[:, None]) * head_dim + channel[None, :]
    inside = (head[:, None] < heads + 2 * kv_heads) & (channel[None, :] < head_dim)
    position = tl.load(positions + row)
    angle = tl.minimum(position, angles - 1) * (head_dim // 2) + plane
    c = tl.load(cos + angle, mask=plane < head_dim // 2, other=1.0)
    s = tl.load(sin + angle, mask=plane < head_dim // 2, other=0.0)
    x = tl.load(at, mask=inside, other=0.0)
    turned = _turn(x.to(tl.float32), c, s, HEADS, HALF).to(x.dtype)
    tl.store(at, turned, mask=inside & (head[:, None] < heads))
    kept = inside & (position < tl.minimum(capacity, angles))
    slot = ((row // tokens) * capacity + position) * kv_heads
    key, value = head - heads, head - heads - kv_heads
    to = keys + (slot + key[:, None]) * head_dim + channel[None, :]
    tl.store(to, turned.to(keys.dtype.element_ty), mask=kept & (key[:, None] >= 0) & (value[:, None] < 0))
    to = values + (slot + value[:, None]) * head_dim + channel[None, :]
    tl.store(to, x.to(values.dtype.element_ty), mask=kept & (value[:, None] >= 0))
