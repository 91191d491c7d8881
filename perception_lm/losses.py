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
    total = _CrossEntropy.apply(hidden, labels, head_weight, chunk)
    return total / max(1, len(labels)) if reduction == "mean" else total


class _CrossEntropy(torch.autograd.Function):
    """The sum over positions, with its gradients made while a chunk's logits exist: they are never made twice, and the
    head's gradient is one matrix that chunks add to."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, labels: Tensor, head_weight: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        x, weight = hidden.detach().to(compute), head_weight.detach().to(compute)
        d_hidden = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        # float32: many small chunks would be lost in a half-precision sum
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[2] else None
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
                    d_weight.addmm_(d.T, rows)
                elif d_weight is not None:
                    d_weight += d.T @ rows
        ctx.gradients = d_hidden, d_weight
        ctx.dtypes = hidden.dtype, head_weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("answer_loss: a second backward pass over the same graph; compute the loss again")
        found = (
            None if gradient is None else gradient.mul_(d).to(dtype)
            for gradient, dtype in zip(ctx.gradients, ctx.dtypes, strict=True)
        )
        d_hidden, d_weight = found
        ctx.gradients = None  # scaled in place: there is nothing left for a second pass
        return d_hidden, None, d_weight, None
