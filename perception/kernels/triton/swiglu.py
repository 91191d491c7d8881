"""SwiGLU on the two halves of one projection."""

import torch.nn.functional as F
from torch import Tensor

from perception.kernels.triton.language import check, jit, launch, runs_on, tl

BLOCK = 1024  # channels of one program


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020), in float32 and rounded once.

    gate_up  ... 2*hidden, contiguous: all of the gate, then all of up
    return   ... hidden

    Raises ValueError for an odd width.
    """
    fits = gate_up.shape[-1] % 2 == 0 and gate_up.is_contiguous()
    check(fits, "gate and up lie side by side: ... 2*hidden, contiguous", gate_up=gate_up)
    if not runs_on(gate_up):
        return swiglu_plain(gate_up)
    hidden = gate_up.shape[-1] // 2
    y = gate_up.new_empty(*gate_up.shape[:-1], hidden)
    rows = y.numel() // hidden if hidden else 0
    launch(_swiglu, (rows, -(-hidden // BLOCK)), gate_up, y, hidden, BLOCK=BLOCK)
    return y


def swiglu_plain(gate_up: Tensor) -> Tensor:
    """The twin of `swiglu`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(gate_up.dtype)


@jit
def _swiglu(gate_up, y, hidden, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = i < hidden
    x = tl.load(gate_up + row * 2 * hidden + i, mask=inside, other=0.0)
    up = tl.load(gate_up + (row * 2 + 1) * hidden + i, mask=inside, other=0.0).to(tl.float32)
    gate = x.to(tl.float32)
    tl.store(y + row * hidden + i, (gate * tl.sigmoid(gate) * up).to(x.dtype), mask=inside)
