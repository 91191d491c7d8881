"""Linear maps whose weights take four bits, for GPUs: what a token of a decoder reads is a quarter of half precision.

M rows  K inputs  N outputs  G groups of inputs

    w  ~  code * scale + offset      codes 0 to 15, scale and offset of each group of an output

Few rows are multiplied with the codes as they are read; for many the weights become numbers again, which costs little
beside the product. The rounding is that of `perception.kernels.matvec`, so a CPU's answers are a GPU's.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.kernels.matvec import GROUPS, round4
from perception.kernels.triton.language import check, jit, launch, runs_on, tl

FEW = 16  # rows up to which the codes are read once a row; the device's cache serves all rows but the first
OUTPUTS = 16  # of one program
BYTES = 128  # of each output in one step of it
WHAT = "x is M K, codes N K/2, scale and offset N G, contiguous"


class Product4:
    """x @ weight.T, the weights in four bits.

    weight  N K, for which `takes` is true; not kept
    """

    def __init__(self, weight: Tensor):
        self.dtype = weight.dtype
        self.codes, self.scale, self.offset = pack(weight)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= FEW:
            y = few_rows(rows, self.codes, self.scale, self.offset)
        else:
            y = F.linear(rows, unpack(self.codes, self.scale, self.offset, self.dtype))
        return y.unflatten(0, x.shape[:-1])

    def release(self) -> None:
        """Nothing to give up: the weight was never kept."""


def takes(weight: Tensor) -> bool:
    """Whether a group divides the inputs."""
    return any(weight.shape[1] % group == 0 for group in GROUPS)


def pack(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """N K -> codes N K/2 uint8, scale and offset N G bfloat16.

    A byte holds an input of the first half of its group in its lower bits, and the one half a group on in the upper:
    neighbours in memory stay neighbours, whichever half is read.
    """
    check(weight.ndim == 2 and takes(weight), f"weight is N K, K a multiple of {min(GROUPS)}", weight=weight)
    group = next(size for size in GROUPS if weight.shape[1] % size == 0)
    rounded, scale, offset = round4(weight, group)
    halves = rounded.unflatten(1, (-1, 2, group // 2))  # N G 2 group/2
    return (halves[:, :, 0] | halves[:, :, 1] << 4).flatten(1), scale, offset


def few_rows(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """M K by `pack`ed weights -> M N in the dtype of x, summed in float32.

    Raises ValueError for shapes that do not fit.
    """
    x = x.contiguous()
    check(_fits(codes, scale, offset) and x.ndim == 2 and x.shape[1] == 2 * codes.shape[1], WHAT, x=x, codes=codes)
    if not runs_on(x):
        return few_rows_plain(x, codes, scale, offset)
    (M, K), N = x.shape, len(codes)
    y = x.new_empty(M, N)
    half = K // scale.shape[1] // 2
    # Rows are the faster axis of the grid: programs that read the same codes run at the same time.
    grid = (M, -(-N // OUTPUTS))
    launch(_few_rows, grid, x, codes, scale, offset, y, K, N, HALF=half, OUTPUTS=OUTPUTS, BLOCK=BYTES, num_warps=4)
    return y


def few_rows_plain(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The twin of `few_rows`."""
    return F.linear(x.float(), unpack_plain(codes, scale, offset, torch.float32)).to(x.dtype)


def unpack(codes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """What packed weights stand for: N K. Raises ValueError for shapes that do not fit."""
    check(_fits(codes, scale, offset), WHAT, codes=codes, scale=scale, offset=offset)
    if not runs_on(codes):
        return unpack_plain(codes, scale, offset, dtype)
    N, K = len(codes), 2 * codes.shape[1]
    weight = codes.new_empty(N, K, dtype=dtype)
    half = K // scale.shape[1] // 2
    launch(_unpack, (N, -(-codes.shape[1] // BYTES)), codes, scale, offset, weight, K, HALF=half, BLOCK=BYTES)
    return weight


def unpack_plain(codes: Tensor, scale: Tensor, offset: Tensor, dtype: torch.dtype) -> Tensor:
    """The twin of `unpack`."""
    bytes_ = codes.unflatten(1, (scale.shape[1], -1))  # N G group/2
    values = torch.cat([bytes_ & 15, bytes_ >> 4], dim=-1).float()
    return (values * scale.float()[..., None] + offset.float()[..., None]).flatten(1).to(dtype)


def _fits(codes: Tensor, scale: Tensor, offset: Tensor) -> bool:
    fits = codes.ndim == scale.ndim == 2 and len(codes) == len(scale) and scale.shape == offset.shape
    fits = fits and codes.is_contiguous() and scale.is_contiguous() and offset.is_contiguous()
    return fits and scale.shape[1] > 0 and codes.shape[1] % scale.shape[1] == 0


@jit
def _few_rows(  # type: ignore[no-untyped-def]
    x, codes, scale, offset, y, width, outputs, HALF: tl.constexpr, OUTPUTS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    there = n < outputs
    total = tl.zeros((OUTPUTS,), tl.float32)
    for start in range(0, width // 2, BLOCK):
        byte = start + tl.arange(0, BLOCK)
        group = byte // HALF
        inside = byte < width // 2
        at = x + row * width + byte + group * HALF  # the input of the lower bits
        a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
        both = there[:, None] & inside[None, :]
        code = tl.load(codes + n[:, None] * (width // 2) + byte[None, :], mask=both, other=0)
        line = n[:, None] * (width // 2 // HALF) + group[None, :]
        step = tl.load(scale + line, mask=both, other=0.0).to(tl.float32)
        base = tl.load(offset + line, mask=both, other=0.0).to(tl.float32)
        low = (code & 15).to(tl.float32) * step + base
        high = (code >> 4).to(tl.float32) * step + base
        total += tl.sum(low * a[None, :] + high * b[None, :], axis=1)
    tl.store(y + row * outputs + n, total.to(y.dtype.element_ty), mask=there)


@jit
def _unpack(  # type: ignore[no-untyped-def]
    codes, scale, offset, weight, width, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = byte < width // 2
    group = byte // HALF
    code = tl.load(codes + n * (width // 2) + byte, mask=inside, other=0)
    line = n * (width // 2 // HALF) + group
    step = tl.load(scale + line, mask=inside, other=0.0).to(tl.float32)
    base = tl.load(offset + line, mask=inside, other=0.0).to(tl.float32)
    at = weight + n * width + byte + group * HALF
    low = (code & 15).to(tl.float32) * step + base
    high = (code >> 4).to(tl.float32) * step + base
    tl.store(at, low.to(weight.dtype.element_ty), mask=inside)
    tl.store(at + HALF, high.to(weight.dtype.element_ty), mask=inside)
