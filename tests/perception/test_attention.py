"""Every kernel equals the formula; what cannot be is refused."""

import pytest
import torch

from perception.attention import KERNELS, attend, attend_packed, attention_kernel

HEAD_DIMS = [8, 24, 64, 96, 192]


def qkv(n: int, s: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32):
    g = torch.Generator().manual_seed(n * 31 + s)
    return [
        torch.randn(2, length, h, head_dim, generator=g).to(dtype)
        for length, h in ((n, heads), (s, kv_heads), (s, kv_heads))
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n", "s"), [(7, 7), (3, 9), (1, 9)])
def test_kernels_agree(kernel: str, head_dim: int, causal: bool, n: int, s: int) -> None:
    q, k, v = qkv(n, s, heads=4, kv_heads=2, head_dim=head_dim)
    with attention_kernel(kernel):
        got = attend(q, k, v, causal=causal)
    scores = torch.einsum("bnhd,bshd->bhns", q, k.repeat_interleave(2, 2)) / head_dim**0.5
    if causal:  # query i of n is the (s - n + i)-th token, and sees that many keys and itself
        hidden = torch.arange(s)[None] > torch.arange(n)[:, None] + s - n
        scores = scores.masked_fill(hidden, -torch.inf)
    wanted = torch.einsum("bhns,bshd->bnhd", scores.softmax(-1), v.repeat_interleave(2, 2))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
def test_mask_means_may_look(kernel: str) -> None:
    q, k, v = qkv(4, 6, heads=2, kv_heads=2, head_dim=8)
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    mask[..., 2:] = False
    with attention_kernel(kernel):
        got = attend(q, k, v, mask=mask)
        torch.testing.assert_close(got, attend(q, k[:, :2], v[:, :2]))
        assert (got - attend(q, k, v)).abs().max() > 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("causal", [False, True])
def test_packed_equals_each_alone(kernel: str, causal: bool) -> None:
    lengths, key_lengths = [3, 1, 5], [4, 1, 7]
    q = torch.randn(9, 4, 8)
    k, v = torch.randn(12, 2, 8), torch.randn(12, 2, 8)
    with attention_kernel(kernel):
        got = attend_packed(q, k, v, lengths, key_lengths=key_lengths, causal=causal)
        start = key_start = 0
        for n, s in zip(lengths, key_lengths, strict=True):
            part = slice(key_start, key_start + s)
            alone = attend(q[None, start : start + n], k[None, part], v[None, part], causal=causal)[0]
            torch.testing.assert_close(got[start : start + n], alone)
            start, key_start = start + n, key_start + s


def test_half_precision_keeps_its_dtype() -> None:
    q, k, v = qkv(5, 5, 2, 2, 16, torch.bfloat16)
    with attention_kernel("reference"):
        wanted = attend(q.float(), k.float(), v.float())
        assert attend(q, k, v).dtype == torch.bfloat16
        torch.testing.assert_close(attend(q, k, v).float(), wanted, rtol=2e-2, atol=2e-2)


def test_refusals() -> None:
    q, k, v = qkv(5, 3, 4, 4, 8)
    with pytest.raises(ValueError, match="5 queries over 3 keys"):
        attend(q, k, v, causal=True)
    with pytest.raises(ValueError, match="not both"):
        attend(k, k, v, causal=True, mask=torch.ones(3, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="give bool"):
        attend(q, k, v, mask=torch.ones(5, 3))
    with pytest.raises(ValueError, match="3 key heads cannot be shared by 4"):
        attend(q, k[:, :, :3], v[:, :, :3])
    with pytest.raises(ValueError, match="do not fit"):
        attend(q, k, v[:, :2])
    with pytest.raises(ValueError, match="B N heads head_dim"):
        attend(q[0], k, v)
    with pytest.raises(ValueError, match="no attention kernel named 'flash9'"), attention_kernel("flash9"):
        pass
    with pytest.raises(ValueError, match="add up to 4 queries"):
        attend_packed(q[0], k[0], v[0], [4], key_lengths=[3])
    with pytest.raises(ValueError, match="1 query lengths and 2 key"):
        attend_packed(q[0], k[0], v[0], [5], key_lengths=[1, 2])


def test_kernel_choice_ends_with_the_block() -> None:
    q, k, v = qkv(2, 2, 1, 1, 8)
    calls = []
    KERNELS["spy"] = lambda *args: calls.append(1) or KERNELS["reference"](*args)
    try:
        with pytest.raises(ValueError, match="B N heads"), attention_kernel("spy"):  # noqa: PT012  leaves by an error
            attend(q, k, v)
            attend(q[0], k, v)
        attend(q, k, v)
    finally:
        del KERNELS["spy"]
    assert calls == [1]
