"""What is minimised.

B batch  T tokens  E width  V vocabulary  A positions that are learned
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100  # a label that asks for nothing


def answer_loss(
    hidden: Tensor, labels: Tensor, head_weight: Tensor, *, chunk: int = 2048, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of the learned positions, in float32, without ever holding the logits of all of them.

    hidden       ... E         after the final norm
    labels       ... int64     what each position should say next, -100 where nothing is asked; shifted already
    head_weight  V E
    chunk        positions whose logits exist at a time; the backward pass makes them again
    reduction    "mean" over the A learned positions, or "sum"
    return       []            0, not NaN, when nothing is learned

    Raises ValueError for another reduction and for shapes that do not fit.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; expected 'mean' or 'sum'")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != head_weight.shape[-1]:
        shapes = f"hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, head {tuple(head_weight.shape)}"
        raise ValueError(f"{shapes}; expected ... E, ... and V E")
    learned = labels != IGNORE
    hidden, labels = hidden[learned], labels[learned]  # A E, A
    total = hidden.new_zeros((), dtype=torch.float32) + hidden.sum().float() * 0  # the graph reaches `hidden` at A = 0
    for part, wanted in zip(hidden.split(chunk), labels.split(chunk), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_cross_entropy, part, wanted, head_weight, use_reentrant=False)
        else:
            total = total + _cross_entropy(part, wanted, head_weight)
    return total / max(1, len(labels)) if reduction == "mean" else total


def _cross_entropy(hidden: Tensor, labels: Tensor, head_weight: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, head_weight).float(), labels, reduction="sum")
