"""What is minimised.

B batch  T tokens  E width  V vocabulary  A positions that are learned
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a label that asks for nothing


def answer_loss(
    hidden: Tensor, labels: Tensor, head_weight: Tensor, *, chunk: int = 256, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the learned positions, in float32, without ever holding the logits of all of them.

    hidden       ... E         after the final norm
    labels       ... int64     what each position should say next, -100 where nothing is asked; shifted already
    head_weight  V E
    chunk        positions whose logits exist at a time
    reduction    "mean" over the A learned positions, or "sum"
    return       []            0, not NaN, when nothing is learned

    Raises ValueError for another reduction and for shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; expected 'mean' or 'sum'")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head_weight.shape[-1]:
        shapes = f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, head {tuple(head_weight.shape)}"
        raise ValueError(f"{shapes}; expected ... E, ... and V E")
    if not torch.is_grad_enabled():
        # Or the sum would make gradients that nobody asks for: it sees that a tensor learns, not that this is off.
        hidden, head_weight = hidden.detach(), head_weight.detach()
    learned = labels != IGNORE
    hidden, labels = hidden[learned], labels[learned]  # A E, A
    factor = 1 / max(1, len(labels)) if reduction == "mean" else 1.0
    return _CrossEntropy.apply(hidden, labels, head_weight, chunk, factor)


class _CrossEntropy(torch.autograd.Function):
    """The sum over positions times a factor, with its gradients made while a chunk's logits exist: they are never made
    twice, and the head's gradient is one matrix that chunks add to. It is as large as the head, so that each time it is
    gone over counts: the first chunk writes it, and all of them with the factor."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head_weight: Tensor, chunk: int, factor: float) -> Tensor:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, weight = hidden.detach().to(compute), head_weight.detach().to(compute)
        d_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # float32: many small chunks would be lost in a half-precision sum
        d_weight = torch.empty_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        if d_weight is not None and not len(labels):
            d_weight.zero_()
        total = hidden.new_zeros((), dtype=torch.float32)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(labels), chunk):
                rows, wanted = x[start : start + chunk], labels[start : start + chunk, None]
                logits = F.linear(rows, weight).float()  # A' V
                scale = logits.logsumexp(-1, keepdim=True)
                total += (scale - logits.gather(-1, wanted)).sum()
                if d_hidden is None and d_weight is None:
                    continue
                d = logits.sub_(scale).exp_()  # softmax, in the logits' own memory
                d.scatter_add_(-1, wanted, d.new_full((len(wanted), 1), -1.0))
                d = d.to(compute)
                if d_hidden is not None:
                    torch.mm(d, weight, out=d_hidden[start : start + chunk])
                if d_weight is not None and compute == torch.float32:
                    torch.addmm(d_weight, d.T, rows, beta=int(start > 0), alpha=factor, out=d_weight)
                elif d_weight is not None:
                    part = (d.T @ rows).float().mul_(factor)
                    d_weight = d_weight.add_(part) if start else part
        ctx.gradients, ctx.factor = (d_hidden, d_weight), factor
        ctx.dtypes = hidden.dtype, head_weight.dtype
        return total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("answer_loss: a second backward pass over the same graph; compute the loss again")
        d_hidden, d_weight = ctx.gradients
        hidden_dtype, weight_dtype = ctx.dtypes
        if d_hidden is not None:  # with all of `d` at once: in half precision the factor alone might leave nothing
            d_hidden = d_hidden.mul_(d * ctx.factor).to(hidden_dtype)
        if d_weight is not None:
            if d.device.type != "cpu" or float(d) != 1.0:  # elsewhere, to look would be to wait
                d_weight.mul_(d)
            d_weight = d_weight.to(weight_dtype)
        ctx.gradients = None  # scaled in place: there is nothing left for a second pass
        return d_hidden, None, d_weight, None, None
