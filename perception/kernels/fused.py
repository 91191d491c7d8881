"""What stands between the products of a transformer block: norm, attention, GELU, each with the bias before it.

B batch  N tokens  D width  T nodes of a tree of texts
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.attention import attend
from perception.kernels.cpp import kernels
from perception.kernels.linear import Late, finish
from perception.kernels.probe import race
from perception.rope import Rope, rope_2d, rotate

TOLERANCE = 1e-5


@dataclass(frozen=True)
class Operators:
    """The operators of one block; `late`, or a bias, is what the product before left to them.

    norm        (x, norm, bias) -> LayerNorm(x + bias); the bias is added to x itself, which is the residual stream
    attention   (qkv, heads, rope, late) -> B N D from a packed qkv B N 3D, which may be written over
    gelu        (x, late) -> GELU(x * scale + bias); x may be written over
    tree        (q, kv, path, lengths, heads, bias) -> R D, see `tree_torch`
    """

    norm: Callable[[Tensor, nn.LayerNorm, Tensor | None], Tensor]
    attention: Callable[[Tensor, int, Rope | None, Late], Tensor]
    gelu: Callable[[Tensor, Late], Tensor]
    tree: Callable[[Tensor, Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


def operators(dtype: torch.dtype, device: torch.device, head_dim: int, *, build: bool = True) -> Operators:
    """The fastest that are right for this dtype and head_dim: compiled ones, or torch's. Measured once a process."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16) or kernels(build) is None:
        return TORCH
    return _choose(dtype, head_dim, torch.get_num_threads())


def norm_torch(x: Tensor, norm: nn.LayerNorm, bias: Tensor | None) -> Tensor:
    if bias is not None:
        x.add_(bias)
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def attention_torch(qkv: Tensor, heads: int, rope: Rope | None, late: Late) -> Tensor:
    parts = finish(qkv, late).unflatten(-1, (3, heads, -1))  # B N 3 heads head_dim
    if rope is not None and qkv.dtype == torch.float32:
        turn = torch.complex(*rope)[:, None, None]  # N 1 1 head_dim/2
        torch.view_as_complex(parts.unflatten(-1, (-1, 2)))[:, :, :2].mul_(turn)  # in place: no copies of q, k and v
    q, k, v = parts.unbind(2)
    if rope is not None and qkv.dtype != torch.float32:
        q, k = rotate(q, rope), rotate(k, rope)
    return attend(q, k, v).flatten(2)


def gelu_torch(x: Tensor, late: Late) -> Tensor:
    return F.gelu(finish(x, late))


def tree_torch(q: Tensor, kv: Tensor, path: Tensor, lengths: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """Attention in which each query looks at rows named one by one.

    q        R D        queries
    kv       T 2D       keys and values of all rows
    path     R L int32  the rows that each query looks at
    lengths  R int32    how many of the L count
    bias     3D, of q, k and v
    return   R D
    """
    if bias is not None:
        q, kv = q + bias[: q.shape[1]], kv + bias[q.shape[1] :]
    seen = (torch.arange(path.shape[1], device=q.device) < lengths[:, None])[:, None, None]  # R 1 1 L
    out = []
    for some, rows, mask in zip(q.split(256), path.long().split(256), seen.split(256), strict=True):
        k, v = kv[rows].unflatten(-1, (2, heads, -1)).unbind(2)  # R L heads head_dim
        out.append(attend(some.unflatten(-1, (heads, -1))[:, None], k, v, mask=mask).flatten(1))
    return torch.cat(out)


def norm_compiled(x: Tensor, norm: nn.LayerNorm, bias: Tensor | None) -> Tensor:
    return torch.ops.perception.norm(x, bias, norm.weight, norm.bias, norm.eps)


def attention_compiled(qkv: Tensor, heads: int, rope: Rope | None, late: Late) -> Tensor:
    cos, sin = rope or (None, None)
    return torch.ops.perception.attention(qkv, heads, late.bias, late.scale, cos, sin, False)


def gelu_compiled(x: Tensor, late: Late) -> Tensor:
    torch.ops.perception.gelu_(x, late.bias, late.scale)
    return x


def tree_compiled(q: Tensor, kv: Tensor, path: Tensor, lengths: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    return torch.ops.perception.attention_paths(q, kv, path, lengths, heads, bias)


TORCH = Operators(norm_torch, attention_torch, gelu_torch, tree_torch)


@functools.cache
@torch.inference_mode()
def _choose(dtype: torch.dtype, head_dim: int, threads: int) -> Operators:
    heads, D, N, R = 4, 4 * head_dim, 197, 64
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0))
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-2
    chosen: dict[str, Any] = {}

    def pick(name: str, x: Tensor, call: Callable[[Any, Tensor], Tensor], compiled: Any) -> None:
        plain = getattr(TORCH, name)
        rivals: Mapping[str, Any] = {"compiled": lambda x: call(compiled, x)}
        won = race(("torch", lambda x: call(plain, x)), rivals, x, tolerance=tolerance)
        chosen[name] = compiled if won == "compiled" else plain

    rope = rope_2d(14, 14, head_dim, prefix=1) if head_dim % 4 == 0 else None
    bias = draw(3 * D) if dtype == torch.float32 else None
    if head_dim % 2 == 0 and head_dim <= 128:
        qkv = draw(2, N, 3 * D).to(dtype)
        pick("attention", qkv, lambda f, x: f(x.clone(), heads, rope, Late(bias)), attention_compiled)
    if dtype == torch.float32:
        norm, x = nn.LayerNorm(D), draw(1024, D)
        pick("norm", x, lambda f, x: f(x.clone(), norm, bias[:D]), norm_compiled)  # type: ignore[index]
        pick("gelu", x, lambda f, x: f(x.clone(), Late(bias[:D])), gelu_compiled)  # type: ignore[index]
        path = torch.randint(0, R, (R, 9), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
        lengths = torch.arange(R, dtype=torch.int32) % 9 + 1
        if head_dim <= 128:
            kv = draw(R, 2 * D)
            pick(
                "tree", draw(R, D), lambda f, q: f(q, kv, path[: len(q)], lengths[: len(q)], heads, bias), tree_compiled
            )
    return Operators(**{field: chosen.get(field, getattr(TORCH, field)) for field in Operators.__dataclass_fields__})
