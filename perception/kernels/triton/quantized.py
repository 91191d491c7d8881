"""Linear maps in eight bits, for GPUs: rows of both matrices scaled to the range of the code.

M rows  K inputs  N outputs

    x @ w.T  ~  (codes of x @ codes of w.T) * scale of x's row * scale of w's row

Weights are coded once, inputs at each call. A map stays in its own dtype when eight bits move its output too far, and
further maps do until the model's own output stays near (`settle`).
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception.errors import ConfigError
from perception.kernels.triton.language import check, jit, launch, power_of_two, runs_on, tl

log = logging.getLogger(__name__)

Code = Literal["int8", "fp8"]
DTYPES: dict[str, tuple[torch.dtype, float]] = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
GATE = 0.999  # cosine of a map's outputs
WHOLE = {"int8": 0.999, "fp8": 0.995}  # and of a model's; a float of 8 bits has four that count
STEPS = 8  # in which maps go back to their own dtype until the model's output is near enough
SAMPLE = 512  # rows an input is remembered by
LEAST_ROWS = 32  # the integer product takes more than 16
BLOCK = 1024


class Product:
    """x @ weight.T + bias. `settle` makes it eight bits where that is close enough.

    weight  N K, shared, not copied
    bias    N or None
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        self.weight, self.bias = weight, bias
        self.code: Code | None = None
        self.codes = self.scale = None  # type: Tensor | None
        self.sample: Tensor | None = None
        self.watching = False

    def __call__(self, x: Tensor) -> Tensor:
        if self.watching:
            self.sample = x.flatten(0, -2)[:SAMPLE].clone()
        return F.linear(x, self.weight, self.bias) if self.code is None else self._coded(x)

    def settle(self, code: Code) -> float:
        """Choose eight bits if they keep the output of the input last watched; returns the cosine.

        Raises ConfigError for a code this device does not compute with.
        """
        check_code(code, self.weight.device)
        assert self.sample is not None, "run the model with watching=True first"
        sample, self.sample, self.watching = self.sample, None, False
        wanted = F.linear(sample, self.weight, self.bias).float()
        K, N = self.weight.shape[1], self.weight.shape[0]
        if K % 16 or N % 16:  # what the matrix units take
            return 0.0
        self.codes, self.scale = quantize_rows(self.weight, code)
        self.code = code
        cosine = similarity(self._coded(sample), wanted)
        if not cosine >= GATE:
            log.debug("a map of %d x %d stays in %s: cosine %.5f in %s", N, K, self.weight.dtype, cosine, code)
            self.restore()
        return cosine

    def restore(self) -> None:
        """Back to the weights, which are still there."""
        self.code = self.codes = self.scale = None

    def release(self) -> None:
        """Give the weight up where its codes do."""
        if self.code is not None:
            self.weight = self.weight.new_empty(0)

    def _coded(self, x: Tensor) -> Tensor:
        assert self.codes is not None
        assert self.scale is not None
        assert self.code is not None
        rows = x.flatten(0, -2)
        codes, scale = quantize_rows(rows, self.code)
        if self.code == "int8":
            y = int8_product(codes, self.codes, scale, self.scale, self.bias, x.dtype)
        else:
            y = fp8_product(codes, self.codes, scale, self.scale, self.bias, x.dtype)
        return y.unflatten(0, x.shape[:-1])


def settle(products: Sequence[Product], run: Callable[[], Tensor], code: Code) -> list[float]:
    """Eight bits for the products that they do not harm, each by itself and all together; the cosine of each.

    run  a pass of the model on a fixed input -> ... C, what is to stay near (`WHOLE`). The products that eight bits
         cost most go back to their own dtype, an eighth of all at a time, until it does

    Raises ConfigError for a code this device does not compute with.
    """
    for product in products:
        product.watching = True
    wanted = run().float()
    cosines = [product.settle(code) for product in products]
    coded = [product for _, product in sorted(zip(cosines, products, strict=True), key=lambda pair: pair[0])]
    coded = [product for product in coded if product.code is not None]
    step = -(-len(coded) // STEPS)
    while coded and not (cosine := similarity(run(), wanted)) >= WHOLE[code]:
        log.debug("%d maps in %s leave the model a cosine of %.5f; %d fewer", len(coded), code, cosine, step)
        for product in coded[:step]:
            product.restore()
        coded = coded[step:]
    return cosines


def similarity(found: Tensor, wanted: Tensor) -> float:
    """The mean cosine of two tensors ... C"""
    return float(F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean())


class Holder(Protocol):
    """Something that can release the memory of weights it no longer needs."""

    def release(self) -> None: ...


def give_up(model: nn.Module, products: Iterable[Holder]) -> None:
    """Empty a model whose weights `products` hold, and the weights that their codes stand for."""
    for product in products:
        product.release()
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def check_code(code: str, device: torch.device) -> None:
    """ConfigError for a code that `device` has no units for."""
    if code not in DTYPES:
        raise ConfigError(f"no code {code!r} of eight bits; there are: {', '.join(DTYPES)}")
    if code == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        raise ConfigError(
            f"fp8 needs a GPU of capability 9.0; {torch.cuda.get_device_name(device)} is older; take int8"
        )


def quantize_rows(x: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Each row scaled so that its largest value is the code's largest: codes M K, and scales M float32.

    Integers are rounded half up.
    """
    check(x.ndim == 2, "rows are M K", x=x)
    x = x.contiguous()
    if code == "fp8" or not runs_on(x):
        return quantize_rows_plain(x, code)
    codes, scale = torch.empty_like(x, dtype=torch.int8), x.new_empty(len(x), dtype=torch.float32)
    launch(_quantize, (len(x),), x, codes, scale, x.shape[1], BLOCK=power_of_two(x.shape[1]), num_warps=8)
    return codes, scale


def quantize_rows_plain(x: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """The twin of `quantize_rows`."""
    dtype, top = DTYPES[code]
    values = x.float()
    scale = values.abs().amax(-1).clamp(min=1e-12) / top
    values = values / scale[:, None]
    return (torch.floor(values + 0.5) if code == "int8" else values.clamp(-top, top)).to(dtype), scale


def int8_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """M K and N K int8 with their scales -> M N: whole numbers, exact, then scaled once."""
    M = len(x)
    if M < LEAST_ROWS:
        x = F.pad(x, (0, 0, 0, LEAST_ROWS - M))
    total = torch._int_mm(x, weight.T)[:M]  # M N int32
    if not runs_on(total):
        return rescale_plain(total, x_scale, scale, bias, dtype)
    y = total.new_empty(total.shape, dtype=dtype)
    launch(
        _rescale,
        (M, -(-total.shape[1] // BLOCK)),
        total,
        x_scale,
        scale,
        scale if bias is None else bias,
        y,
        total.shape[1],
        BIAS=bias is not None,
        BLOCK=BLOCK,
    )
    return y


def rescale_plain(total: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The twin of the last step of `int8_product`."""
    y = total.float() * x_scale[:, None] * scale
    return (y if bias is None else y + bias.float()).to(dtype)


def fp8_product(
    x: Tensor, weight: Tensor, x_scale: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """M K and N K fp8 with their scales -> M N; summed in float32 on GPUs that know fp8, spelled out elsewhere."""
    if x.is_cuda:
        out = dtype if dtype != torch.float32 else torch.bfloat16
        y = torch._scaled_mm(x, weight.T, scale_a=x_scale[:, None], scale_b=scale[None], out_dtype=out).to(dtype)
        return y if bias is None else y + bias
    return rescale_plain(x.float() @ weight.float().T, x_scale, scale, bias, dtype)


@jit
def _quantize(x, codes, scale, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * width + i, mask=i < width, other=0.0).to(tl.float32)
    step = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12) / 127.0
    tl.store(codes + row * width + i, tl.floor(value / step + 0.5).to(tl.int8), mask=i < width)
    tl.store(scale + row, step)


@jit
def _rescale(  # type: ignore[no-untyped-def]
    total, x_scale, scale, bias, y, width, BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(total + row * width + i, mask=i < width, other=0).to(tl.float32)
    value = value * tl.load(x_scale + row) * tl.load(scale + i, mask=i < width, other=0.0)
    if BIAS:
        value += tl.load(bias + i, mask=i < width, other=0.0).to(tl.float32)
    tl.store(y + row * width + i, value.to(y.dtype.element_ty), mask=i < width)
