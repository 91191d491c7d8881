"""A residual sum and the normalisation after it, in one pass over the row.

D width

    x <- x + gain * branch;  y = norm(x)

All of it in float32, rounded once where x is stored and once where y is.
"""

import torch.nn.functional as F
from torch import Tensor

from perception.kernels.triton.language import check, jit, launch, power_of_two, runs_on, tl


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """LayerNorm (Ba et al. 2016) of x + gain * branch, which is left in `x`.

    x       ... D, contiguous; written to when a branch is given
    branch  ... D, the residual branch; None: nothing is added
    gain    D, LayerScale of the branch; None: 1
    return  ... D

    Raises ValueError for shapes that do not fit.
    """
    _check(x, weight, branch, gain)
    check(bias.shape == weight.shape, "the bias has the shape of the weight", weight=weight, bias=bias)
    if not runs_on(x):
        return layer_norm_plain(x, weight, bias, eps, branch, gain)
    return _run(x, weight, bias, eps, branch, gain)


def rms_norm(x: Tensor, weight: Tensor, eps: float, branch: Tensor | None = None, gain: Tensor | None = None) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) of x + gain * branch, which is left in `x`; shapes as in `layer_norm`."""
    _check(x, weight, branch, gain)
    if not runs_on(x):
        return rms_norm_plain(x, weight, eps, branch, gain)
    return _run(x, weight, None, eps, branch, gain)


def layer_norm_plain(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, branch: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """The twin of `layer_norm`."""
    _add(x, branch, gain)
    return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)


def rms_norm_plain(
    x: Tensor, weight: Tensor, eps: float, branch: Tensor | None = None, gain: Tensor | None = None
) -> Tensor:
    """The twin of `rms_norm`."""
    y = _add(x, branch, gain).float()
    y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (y * weight.float()).to(x.dtype)


def _add(x: Tensor, branch: Tensor | None, gain: Tensor | None) -> Tensor:
    if branch is None:
        return x
    scaled = branch.float() if gain is None else branch.float() * gain.float()
    return x.copy_(x.float() + scaled)


def _check(x: Tensor, weight: Tensor, branch: Tensor | None, gain: Tensor | None) -> None:
    given = {"x": x, "weight": weight}
    given |= {name: t for name, t in (("branch", branch), ("gain", gain)) if t is not None}
    fits = weight.shape == x.shape[-1:] and x.is_contiguous()
    fits &= branch is None or (branch.shape == x.shape and branch.is_contiguous())
    fits &= gain is None or (gain.shape == weight.shape and branch is not None)
    check(fits, "x and the branch are ... D, contiguous; weight, bias and gain are D; a gain needs a branch", **given)


def _run(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, branch: Tensor | None, gain: Tensor | None
) -> Tensor:
    y, D = x.new_empty(x.shape), x.shape[-1]
    block = power_of_two(D)
    launch(
        _add_norm,
        (x.numel() // D if D else 0,),
        x,
        y,
        weight,
        weight if bias is None else bias,
        x if branch is None else branch,
        weight if gain is None else gain,
        D,
        eps,
        MEAN=bias is not None,
        BRANCH=branch is not None,
        GAIN=gain is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 8),
    )
    return y


@jit
def _add_norm(  # type: ignore[no-untyped-def]
    x,
    y,
    weight,
    bias,
    branch,
    gain,
    width,
    eps,
    MEAN: tl.constexpr,
    BRANCH: tl.constexpr,
    GAIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * width
    i = tl.arange(0, BLOCK)
    inside = i < width
    row = tl.load(x + start + i, mask=inside, other=0.0)
    value = row.to(tl.float32)
    if BRANCH:
        added = tl.load(branch + start + i, mask=inside, other=0.0).to(tl.float32)
        if GAIN:
            added *= tl.load(gain + i, mask=inside, other=0.0).to(tl.float32)
        stored = (value + added).to(row.dtype)  # the norm sees what the next block will read
        tl.store(x + start + i, stored, mask=inside)
        value = stored.to(tl.float32)
    if MEAN:
        value = tl.where(inside, value - tl.sum(value, axis=0) / width, 0.0)
    value *= tl.rsqrt(tl.sum(value * value, axis=0) / width + eps)
    value *= tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    if MEAN:
        value += tl.load(bias + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + start + i, value.to(row.dtype), mask=inside)
