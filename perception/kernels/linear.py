"""Linear layers in the layout that is fastest on this machine.

M rows  K inputs  N outputs
"""

import functools
import logging
import time
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError
from perception.kernels.cpp import kernels
from perception.kernels.probe import agrees, race

log = logging.getLogger(__name__)

FEW = 16  # up to so many rows a product waits for the weights to arrive, beyond it for the arithmetic
ROWS = (64, 192, 576)  # row counts at which forms race: they decide far more than K and N, which are cut off at
SIDE = 1024
MANY = 384  # from so many rows on the last of them stands for a product
BUDGET = 0.1  # seconds of a race: large products are repeated less
ALLOWANCE = 1.0  # seconds for the shapes of a model, after which they take the form that is fastest in general
# What a form may lose against F.linear, norm over norm: rounding of the dtype, of 8 bits, of 8 bits less one.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
TOLERANCE_INT8 = 0.05


def pack(
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantize: Literal["int8"] | None = None,
    gain: Tensor | None = None,
    rows: int = 256,
    most: int = 0,
) -> "PackedLinear":
    """A linear layer that holds `weight` its own way. The source is neither kept nor changed.

    weight, bias  N K and N
    dtype         of what comes in and goes out; the weight's by default
    quantize      "int8": weights (one scale an output) and inputs (one scale a call) in 8 bits
    gain          N, multiplies the output: LayerScale, folded into weight and bias
    rows          M to expect
    most          M to expect at times: a second layout is held for many rows where another form is faster then

    The form is the one that won on this machine (`choose`); one that is wrong for this very shape is not used. Raises
    ConfigError for an unknown `quantize`.
    """
    if quantize not in (None, "int8"):
        raise ConfigError(f"no quantisation {quantize!r} for these layers; there is: int8")
    dtype = dtype or weight.dtype
    with torch.no_grad():
        weight, bias = fold(weight, bias, gain)
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        n, k = weight.shape
        if weight.device.type != "cpu":
            return PackedLinear(weight, bias, dtype)

        def best(rows: int) -> str:
            form = choose(dtype, quantize, rows, (k, n))
            return form if form == "plain" or _right(form, dtype, weight, bias) else "plain"

        form, form_of_many = best(rows), best(max(rows, most))
        layer = FORMS[form](weight, bias, dtype)
        if form == form_of_many or rows > MANY or most <= MANY:
            return layer
        return ByRows(layer, FORMS[form_of_many](weight, bias, dtype))


def fold(weight: Tensor, bias: Tensor | None, gain: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of gain * (weight @ x + bias).

    Exact in real arithmetic. The products are taken in float64 and come back in float32 where something was folded.
    """
    # The affine part of a norm before the layer is not folded in, though it could be: the norm is one pass over x, ours
    # or torch's, that applies gain and bias to what it writes anyway. Nothing would be saved.
    if gain is None:
        return weight, bias
    w, b = weight.double() * gain.double()[:, None], None if bias is None else bias.double() * gain.double()
    return w.float(), None if b is None else b.float()


class Late(NamedTuple):
    """What a product leaves to whoever reads it next: y * scale + bias.

    bias   N, or None
    scale  one number a row, or None
    """

    bias: Tensor | None = None
    scale: Tensor | None = None


def finish(y: Tensor, late: Late) -> Tensor:
    """y * scale + bias, in place."""
    if late.scale is not None:
        y.mul_(late.scale[..., None])
    return y if late.bias is None else y.add_(late.bias)


class PackedLinear:
    """The plain form, F.linear, and what every form offers.

    x         ... K
    residual  ... N, added to the result
    return    ... N
    """

    form = "plain"
    gelu_inside = False  # whether `gelu` costs no pass of its own

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.bias = None if bias is None else bias.to(dtype)
        self._hold(weight)

    def _hold(self, weight: Tensor) -> None:
        self.weight = weight.to(self.dtype)
        self.turned = self.weight.t()  # K N

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self._product(x, self.bias)
        return y if residual is None else y.add_(residual)

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, self.weight, bias)

    def gelu(self, x: Tensor) -> Tensor:
        """The exact (erf) GELU of the result."""
        return F.gelu(self(x))

    def unfinished(self, x: Tensor) -> tuple[Tensor, Late]:
        """The result, without what would cost a pass of its own: the caller takes that in while reading it."""
        if self.dtype != torch.float32:
            return self(x), Late()
        return self._product(x, None), Late(self.bias)

    def accumulate(self, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        """`into`, which may be written over, plus the result; and a bias that it still lacks."""
        if self.dtype != torch.float32:
            return self(x, into), None
        into.view(-1, self.out_features).addmm_(x.reshape(-1, self.in_features), self.turned)
        return into, self.bias

    def at(self, x: Tensor) -> "PackedLinear":
        """What computes `x`: itself, but for a layer that holds several layouts."""
        return self

    def __repr__(self) -> str:
        return f"PackedLinear({self.in_features} -> {self.out_features}, {self.form})"


class Transposed(PackedLinear):
    """K N in memory: the order in which MKL's product reads it without turning it round."""

    form = "transposed"

    def _hold(self, weight: Tensor) -> None:
        self.turned = weight.to(self.dtype).t().contiguous()

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        y = rows @ self.turned if bias is None else torch.addmm(bias, rows, self.turned)
        return y.view(*x.shape[:-1], self.out_features)


class OneDnn(PackedLinear):
    """oneDNN's own blocked layout, bias and residual in its epilogue. Its operators are not torch's promise: probed."""

    form = "onednn"

    def _hold(self, weight: Tensor) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(self.dtype).contiguous())

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    @property
    def gelu_inside(self) -> bool:  # type: ignore[override]
        return _epilogue(self.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        return self.gelu_fused(x) if self.gelu_inside else F.gelu(self(x))

    def gelu_fused(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "none")

    def unfinished(self, x: Tensor) -> tuple[Tensor, Late]:
        return self(x), Late()  # the epilogue adds the bias for nothing

    def accumulate(self, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        return self(x, into), None


class Float32(PackedLinear):
    """Half-precision weights held and used in float32, for processors that have no half-precision arithmetic."""

    form = "float32"

    def _hold(self, weight: Tensor) -> None:
        bias = None if self.bias is None else self.bias.float()
        self.inner = FORMS[choose(torch.float32, shape=(self.in_features, self.out_features))](
            weight.float(), bias, torch.float32
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.inner(x.float(), None if residual is None else residual.float()).to(self.dtype)

    def gelu(self, x: Tensor) -> Tensor:
        return self.inner.gelu(x.float()).to(self.dtype)

    def unfinished(self, x: Tensor) -> tuple[Tensor, Late]:
        return self(x), Late()

    def accumulate(self, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        return self(x, into), None


class Int8(PackedLinear):
    """Weights and inputs in 8 bits: one scale an output, one scale a row of the input (onednn.qlinear_pointwise)."""

    form = "int8"
    top = 127  # of the weights
    levels = 255  # of the inputs

    def _hold(self, weight: Tensor) -> None:
        weight = weight.float()
        self.scale = weight.abs().amax(dim=1).clamp_min(1e-12) / self.top  # N
        rounded = (weight / self.scale[:, None]).round_().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.zeros = torch.zeros(len(weight), dtype=torch.int32)
        self.bias = None if self.bias is None else self.bias.float()

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = finish(*self.unfinished(x)).to(self.dtype)
        return y if residual is None else y.add_(residual)

    def unfinished(self, x: Tensor) -> tuple[Tensor, Late]:
        values, scale, zero = quantize_rows(x, self.levels)
        y = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, zero, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], "none"
        )
        return y, Late(self.bias, scale)

    def accumulate(self, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        y, late = self.unfinished(x)
        if into.dtype != torch.float32:
            return into.add_(finish(y, late)), None
        return into.addcmul_(y, cast(Tensor, late.scale)[..., None]), late.bias


class Int8Narrow(Int8):
    """Weights and inputs in a little over 7 bits each: AVX2 adds two products in 16 bits, and 2 * 180 * 91 fits."""

    form = "int8-narrow"
    top = 91
    levels = 180


class ByRows(PackedLinear):
    """Two layouts of the same weights: one for up to MANY rows, one for more."""

    def __init__(self, some: PackedLinear, many: PackedLinear):
        self.some, self.many = some, many
        self.out_features, self.in_features, self.dtype = some.out_features, some.in_features, some.dtype
        self.bias, self.form = some.bias, f"{some.form} or {many.form}"

    def at(self, x: Tensor) -> PackedLinear:
        return self.some if x.numel() <= MANY * self.in_features else self.many

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.at(x)(x, residual)

    def gelu(self, x: Tensor) -> Tensor:
        return self.at(x).gelu(x)

    def unfinished(self, x: Tensor) -> tuple[Tensor, Late]:
        return self.at(x).unfinished(x)

    def accumulate(self, x: Tensor, into: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.at(x).accumulate(x, into)


FORMS: dict[str, type[PackedLinear]] = {
    form.form: form for form in (PackedLinear, Transposed, OneDnn, Float32, Int8, Int8Narrow)
}
RIVALS = {
    torch.float32: ("transposed", "onednn"),
    torch.bfloat16: ("onednn", "float32"),
    torch.float16: ("onednn", "float32"),
}


def choose(
    dtype: torch.dtype, quantize: str | None = None, rows: int = 256, shape: tuple[int, int] | None = None
) -> str:
    """The form that is fastest here for weights of `dtype` and about so many rows. Measured once a process.

    shape  K N, where it is known: layouts that win at one shape lose at another, so the race is run at this one, unless
           races have used up their ALLOWANCE since `renew`
    """
    threads = torch.get_num_threads()
    form = _choose(dtype, quantize, rows <= FEW, threads)
    if shape is None or quantize or rows <= FEW or form in ("float32", "int8", "int8-narrow"):
        return form
    kind = dtype, min(shape[0], SIDE), min(shape[1], SIDE), _about(rows), threads
    if kind not in _fastest:
        if sum(_spent) > ALLOWANCE:
            return form
        start = time.perf_counter()
        _fastest[kind] = _choose_for(*kind[:4])
        _spent.append(time.perf_counter() - start)
    return _fastest[kind]


def renew() -> None:
    """Another model may use up its ALLOWANCE."""
    _spent.clear()


_fastest: dict[tuple[torch.dtype, int, int, int, int], str] = {}  # dtype, K, N, rows, threads
_spent: list[float] = []  # seconds of the latest races for shapes


def _about(rows: int) -> int:
    """The row count that stands for `rows`."""
    return next(count for count in ROWS if rows <= 2 * count or count == ROWS[-1])


@torch.inference_mode()
def _choose_for(dtype: torch.dtype, k: int, n: int, rows: int) -> str:
    """The race of one shape, without bias and GELU: other passes take those in."""
    if dtype not in RIVALS:
        return "plain"
    weight, _, x = (t.to(dtype) for t in _sample(rows, k, n))
    rivals = tuple(form for form in RIVALS[dtype] if form != "float32")
    return _race("plain", rivals, weight, None, x, dtype, TOLERANCE[dtype])


@functools.cache
@torch.inference_mode()
def _choose(dtype: torch.dtype, quantize: str | None, few: bool, threads: int) -> str:
    if dtype not in RIVALS:
        return "plain"
    weight, bias, x = _sample(*((1, 2048, 2048) if few else (192, 768, 768)))
    if quantize is None:
        weight, bias, x = weight.to(dtype), bias.to(dtype), x.to(dtype)
        return _race("plain", RIVALS[dtype], weight, bias, x, dtype, TOLERANCE[dtype])
    plain = _choose(dtype, None, few, threads)
    return _race(plain, ("int8",) if _exact() else ("int8-narrow",), weight, bias, x.to(dtype), dtype, TOLERANCE_INT8)


def _race(
    plain: str,
    rivals: tuple[str, ...],
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    dtype: torch.dtype,
    tolerance: float,
) -> str:
    built = {form: layer for form in rivals if (layer := _try(form, weight, bias, dtype)) is not None}
    return race((plain, FORMS[plain](weight, bias, dtype)), built, x, tolerance=tolerance, budget=BUDGET)


@functools.cache
@torch.inference_mode()
def _exact() -> bool:
    """Whether the int8 product adds without saturation: it is given the worst case."""
    try:
        x, w = torch.full((4, 64), 255, dtype=torch.uint8), torch.full((16, 64), 127, dtype=torch.int8)
        ones, zeros = torch.ones(16), torch.zeros(16, dtype=torch.int32)
        packed = torch.ops.onednn.qlinear_prepack(w, None)
        y = torch.ops.onednn.qlinear_pointwise(
            x, 1.0, 0, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
    except Exception as error:
        log.debug("no int8 product here: %s", error)
        return False
    return bool((y == 255 * 127 * 64).all())


@functools.cache
@torch.inference_mode()
def _epilogue(dtype: torch.dtype) -> bool:
    """Whether oneDNN's GELU epilogue is right and faster than a GELU of its own."""
    weight, bias, x = (t.to(dtype) for t in _sample(192, 768, 768))
    layer = OneDnn(weight, bias, dtype)
    return (
        race(("apart", lambda x: F.gelu(layer(x))), {"fused": layer.gelu_fused}, x, tolerance=TOLERANCE[dtype])
        == "fused"
    )


@functools.cache
def _checked(form: str, dtype: torch.dtype, k: int, n: int) -> list[bool]:
    return []  # filled by the first layer of this shape


@torch.inference_mode()
def _right(form: str, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether a form gives what F.linear gives for this shape; looked at once a shape."""
    n, k = weight.shape
    known = _checked(form, dtype, k, n)
    if not known:
        x = torch.randn(8, k, generator=torch.Generator().manual_seed(0)).to(dtype)
        wanted = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
        tolerance = TOLERANCE_INT8 if form.startswith("int8") else TOLERANCE[dtype]
        known.append(agrees(f"{form} {k} -> {n}", lambda: FORMS[form](weight, bias, dtype)(x), wanted, tolerance))
    return known[0]


def _try(form: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> PackedLinear | None:
    try:
        return FORMS[form](weight, bias, dtype)
    except Exception as error:  # the operators behind it may be absent
        log.debug("%s cannot be packed here: %s", form, error)
        return None


def _sample(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)  # even numbers: drawn in a fraction of the time of normal ones
    weight, bias, x = (torch.empty(shape).uniform_(-1, 1, generator=generator) for shape in ((n, k), (n,), (m, k)))
    return weight.mul_(k**-0.5), bias, x


def quantize_rows(x: Tensor, levels: int = 255) -> tuple[Tensor, Tensor, int]:
    """x as whole numbers up to `levels` in uint8, one scale a row, one zero point for all.

    (values - zero) * scale is about x, and 0 is met exactly.
    """
    x = x.float()
    if (compiled := kernels(build=False)) is not None:
        return compiled.quantize(x.contiguous(), levels)
    return quantize_rows_plain(x, levels)


def quantize_rows_plain(x: Tensor, levels: int) -> tuple[Tensor, Tensor, int]:
    """The twin of the compiled `quantize`."""
    low, high = x.amin(dim=-1).clamp_max_(0.0), x.amax(dim=-1).clamp_min_(0.0)
    # Of the levels, that a row would give to what is below 0: the rows' mean, which no single one shifts.
    part = (-low / (high - low).clamp_min(1e-30)).double()
    part = part[part.isfinite()]  # a row that is no number spoils itself alone
    zero = round((levels - 2) * (float(part.mean()) if part.numel() else 0.0)) + 1  # each side has a level
    scale = torch.maximum(-low / zero, high / (levels - zero)).clamp_min_(1e-30)
    values = (x / scale[..., None]).add_(zero + 0.5).clamp_(0, levels).to(torch.uint8)  # cutting off rounds: all >= 0
    return values, scale, zero
