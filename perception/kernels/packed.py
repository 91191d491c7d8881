"""Sequences of different length, laid end to end, in one call.

N queries  S keys  L documents  heads  kv_heads  head_dim

A document is told by its number: a query sees the keys that carry the same one. With `causal`, the last query of a
document lines up with its last key.
"""

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def varlen_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor | None:
    """Flash attention's form for packed sequences (Dao 2023); None for tensors it does not take.

    q, k, v  N heads head_dim, S kv_heads head_dim, half precision
    return   N heads head_dim
    """
    varlen = _varlen()
    if varlen is None or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8 or q.shape[-1] > 256:
        return None
    known = inspect.signature(varlen).parameters
    options: dict[str, Any] = {}
    if causal:  # the name of the option changed between releases
        options |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in known:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    ends, key_ends = (offsets(tuple(n), q.device) for n in (lengths, key_lengths))
    longest, key_longest = max(lengths, default=0), max(key_lengths, default=0)
    return varlen(q.contiguous(), k.contiguous(), v.contiguous(), ends, key_ends, longest, key_longest, **options)


def flex_packed(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], key_lengths: Sequence[int], causal: bool
) -> Tensor | None:
    """FlexAttention with a mask of documents; shapes as in `varlen_packed`, any dtype. None where it cannot."""
    if not _flex_takes(q, k, v):
        return None
    mask = document_mask(tuple(lengths), tuple(key_lengths), causal, q.device)
    return _flex(q[None], k[None], v[None], mask)[0]


def flex_attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    """FlexAttention as a kernel of `perception.attention`: B N heads head_dim; "sdpa" where it cannot."""
    from perception.attention import sdpa

    if not _flex_takes(q, k, v):
        return sdpa(q, k, v, causal, mask)
    B, n, heads, _ = q.shape
    s = k.shape[1]
    rule: MaskMod | None = None
    sizes: tuple[int | None, int | None] = (None, None)
    if causal:
        rule = lambda b, h, i, j: j <= i + (s - n)  # noqa: E731
    elif mask is not None:
        seen, sizes = mask.expand(B, heads, n, s), (B, heads)
        rule = lambda b, h, i, j: seen[b, h, i, j]  # noqa: E731
    return _flex(q, k, v, None if rule is None else _block_mask(rule, n, s, q.device, sizes))


@functools.lru_cache(maxsize=8)  # all layers of a model share one
def document_mask(lengths: tuple[int, ...], key_lengths: tuple[int, ...], causal: bool, device: torch.device) -> Any:
    """The block mask of packed documents: blocks without a pair that may look are never computed."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        document, place = _labels(lengths, device)
        key_document, key_place = _labels(key_lengths, device)
        ahead = torch.tensor([s - n for n, s in zip(lengths, key_lengths, strict=True)], device=device)
        place = place + ahead[document]  # counted like the keys: the last query stands at the last key

    def same(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return document[i] == key_document[j]

    def same_and_before(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (document[i] == key_document[j]) & (key_place[j] <= place[i])

    with torch.inference_mode(False):
        return _block_mask(same_and_before if causal else same, sum(lengths), sum(key_lengths), device)


@functools.lru_cache(maxsize=16)
def offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """L+1 int32: where each document begins, and where the last one ends."""
    with torch.inference_mode(False):  # kept for later calls, which may be training
        return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def _labels(lengths: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The number of each token's document, and the token's place in it; both N int64."""
    counts = torch.tensor(lengths, device=device, dtype=torch.int64)
    document = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    starts = counts.cumsum(0) - counts
    return document, torch.arange(len(document), device=device) - starts[document]


def _flex_takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if 0 in (q.numel(), k.numel()):
        return False
    if q.is_cuda:
        return q.shape[-1] >= 16
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)))


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
    """B N heads head_dim -> B N heads head_dim"""
    shared = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")  # on a CPU, on purpose
        return _flex_function(q.is_cuda)(q, k, v, block_mask=mask, enable_gqa=shared).transpose(1, 2)


@functools.cache
def _flex_function(compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def _block_mask(
    rule: MaskMod, n: int, s: int, device: torch.device, sizes: tuple[int | None, int | None] = (None, None)
) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(rule, *sizes, n, s, device=device)


@functools.cache
def _varlen() -> Callable[..., Tensor] | None:
    """PyTorch's flash attention for packed sequences, from 2.10 on."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn
