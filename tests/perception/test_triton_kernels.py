"""Every kernel equals its plain twin, at sizes that are no power of two; what cannot be is refused."""

import pytest
import torch
from triton_here import DEVICE, DTYPES, randn, same

from perception.kernels.triton import decode, norm, rotary, swiglu
from perception.rope import RopeScaling, rope_1d, rope_2d, rotate

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@dtypes
@pytest.mark.parametrize(
    ("heads", "head_dim", "grid", "prefix"), [(3, 24, (2, 3), 1), (5, 64, (1, 3), 0), (2, 96, (2, 2), 0)]
)
def test_rotate_qk(dtype: torch.dtype, heads: int, head_dim: int, grid: tuple[int, int], prefix: int) -> None:
    rope = tuple(t.to(DEVICE) for t in rope_2d(*grid, head_dim, prefix=prefix))
    qkv = randn(2, prefix + grid[0] * grid[1], 3, heads, head_dim, dtype=dtype)
    wanted = rotary.rotate_qk_plain(qkv.clone(), rope)
    q, _, v = qkv.clone().unbind(2)
    got = rotary.rotate_qk(qkv, rope)
    assert got is qkv
    same(got, wanted)
    same(got[:, :, 0], rotate(q, rope))
    assert torch.equal(got[:, :, 2], v)


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (3, 3, 64), (4, 1, 96)])
@pytest.mark.parametrize("angles", [12, 9])
def test_rotate_into_cache(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, angles: int) -> None:
    """Rows stand at positions of their own; the token that does not fit is not kept, and nothing else is touched. A
    table that is too short for it is not read beyond its end."""
    rope = tuple(t.to(DEVICE)[:angles] for t in rope_1d(torch.arange(12), head_dim, scaling=RopeScaling(factor=8.0)))
    positions = torch.tensor([[4, 5, 6], [7, 8, 9]], device=DEVICE)
    keys, values = (randn(2, 9, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    qkv = randn(2, 3, heads + 2 * kv_heads, head_dim, dtype=dtype)
    wanted = [t.clone() for t in (keys, values)]
    wanted_q = rotary.rotate_into_cache_plain(qkv.clone(), rope, positions, *wanted, heads)
    before, k_new = keys.clone(), qkv[:, :, heads : heads + kv_heads].clone()
    q = rotary.rotate_into_cache(qkv, rope, positions, keys, values, heads)
    same(q, wanted_q)
    same(keys, wanted[0])
    assert torch.equal(values, wanted[1])
    same(keys[1, 8], rotate(k_new[1:, 1:2], tuple(t[8:9] for t in rope))[0, 0])
    assert torch.equal(keys[:, :4], before[:, :4])
    assert torch.equal(values[0, 4], qkv[0, 0, heads + kv_heads :])


def test_rotate_into_a_cache_of_another_dtype() -> None:
    rope = tuple(t.to(DEVICE) for t in rope_1d(torch.arange(4), 16))
    keys, values = (torch.zeros(1, 4, 1, 16, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    qkv, positions = randn(1, 1, 4, 16), torch.tensor([[2]], device=DEVICE)
    rotary.rotate_into_cache(qkv, rope, positions, keys, values, heads=2)
    same(values[0, 2, 0], qkv[0, 0, 3].bfloat16())


@dtypes
@pytest.mark.parametrize("width", [24, 100, 1536])
@pytest.mark.parametrize("adding", ["nothing", "branch", "branch and gain"])
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms(dtype: torch.dtype, width: int, adding: str, kind: str) -> None:
    x, branch = randn(3, 2, width, dtype=dtype) * 3 + 1, randn(3, 2, width, dtype=dtype, seed=1)
    weight, bias, gain = (randn(width, dtype=dtype, seed=seed) for seed in (2, 3, 4))
    extra = {"nothing": (), "branch": (branch,), "branch and gain": (branch, gain)}[adding]
    given = (weight, bias, 1e-5, *extra) if kind == "layer" else (weight, 1e-5, *extra)
    fused, plain = (norm.layer_norm, norm.layer_norm_plain) if kind == "layer" else (norm.rms_norm, norm.rms_norm_plain)
    twin = x.clone()
    wanted = plain(twin, *given)
    before = x.clone()
    same(fused(x, *given), wanted)
    same(x, twin)
    assert torch.equal(x, before) == (adding == "nothing")
    if kind == "layer":
        direct = torch.nn.functional.layer_norm(x.double(), (width,), weight.double(), bias.double(), 1e-5)
        same(wanted, direct.to(dtype))


@dtypes
@pytest.mark.parametrize("hidden", [7, 1025])
def test_swiglu(dtype: torch.dtype, hidden: int) -> None:
    x = randn(2, 3, 2 * hidden, dtype=dtype) * 3
    got = swiglu.swiglu(x)
    assert got.shape == (2, 3, hidden)
    same(got, swiglu.swiglu_plain(x))
    same(got, (torch.nn.functional.silu(x[..., :hidden].double()) * x[..., hidden:].double()).to(dtype))


@dtypes
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(6, 2, 24), (3, 3, 64), (5, 1, 96), (4, 2, 128)])
def test_attend_decode(dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int) -> None:
    """Rows of every kind: full, cut inside a block, one key, none, and one that claims more than there is."""
    lengths = torch.tensor([150, 70, 1, 0, 999], device=DEVICE)
    q = randn(5, heads, head_dim, dtype=dtype)
    keys, values = (randn(5, 150, kv_heads, head_dim, dtype=dtype, seed=seed) for seed in (1, 2))
    got = decode.attend_decode(q, keys, values, lengths, pieces=3)
    wanted = decode.attend_decode_plain(q, keys, values, lengths)
    same(got, wanted)
    assert not got[3].any()
    group = heads // kv_heads
    same(got[2], values[2, 0].repeat_interleave(group, 0))


@pytest.mark.parametrize("pieces", [None, 1, 2, 7])
def test_decode_does_not_depend_on_the_cut(pieces: int | None) -> None:
    q, lengths = randn(1, 2, 32)[:, :, :20], torch.tensor([130], device=DEVICE)  # a view: rows lie 32 apart
    keys, values = (randn(1, 200, 1, 20, seed=seed) for seed in (1, 2))
    keys *= torch.linspace(0.1, 3, 200, device=DEVICE)[:, None, None]  # the largest score comes late
    wanted = decode.attend_decode_plain(q, keys, values, lengths)
    same(decode.attend_decode(q, keys, values, lengths, pieces=pieces), wanted)


def test_nothing_in_nothing_out() -> None:
    assert swiglu.swiglu(randn(0, 8)).shape == (0, 4)
    assert norm.layer_norm(randn(0, 8), randn(8), randn(8), 1e-5).shape == (0, 8)
    lengths = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    assert decode.attend_decode(randn(0, 2, 8), randn(0, 4, 1, 8), randn(0, 4, 1, 8), lengths).shape == (0, 2, 8)


def test_refusals() -> None:
    rope = rope_1d(torch.arange(5), 8)
    with pytest.raises(ValueError, match=r"qkv is B N 3 heads head_dim.*given qkv \(2, 5, 2, 2, 8\)"):
        rotary.rotate_qk(randn(2, 5, 2, 2, 8), rope)
    with pytest.raises(ValueError, match=r"cos \(5, 4\) float64"):
        rotary.rotate_qk(randn(2, 5, 3, 2, 8), tuple(t.double() for t in rope))
    with pytest.raises(ValueError, match="contiguous"):
        rotary.rotate_qk(randn(5, 2, 3, 2, 8).transpose(0, 1), rope)
    with pytest.raises(ValueError, match=r"B T 3\+2\*kv_heads"):
        rotary.rotate_into_cache(
            randn(1, 2, 4, 8), rope, torch.zeros(1, 2, dtype=torch.int64), randn(1, 5, 1, 8), randn(1, 5, 1, 8), heads=3
        )
    with pytest.raises(ValueError, match="a gain needs a branch"):
        norm.rms_norm(randn(2, 8), randn(8), 1e-5, gain=randn(8))
    with pytest.raises(ValueError, match="shape of the weight"):
        norm.layer_norm(randn(2, 8), randn(8), randn(4), 1e-5)
    with pytest.raises(ValueError, match="side by side"):
        swiglu.swiglu(randn(2, 7))
    with pytest.raises(ValueError, match="B S kv_heads head_dim"):
        decode.attend_decode(randn(1, 3, 8), randn(1, 4, 2, 8), randn(1, 4, 2, 8), torch.tensor([1]))
