"""Products with few rows, y = x W^T, whose time is that of reading W: one token of a decoder, or a handful.

R rows  K inputs  N outputs  P panels of 16 outputs

Weights stay as they are in memory (the model's own rows, shared with it) or are rounded into panels (8 or 4 bits).
Each class has a form of its own and two ways to use it: `few` rows, where W is read once, and `many`, where it becomes
float32 (or stays half precision, where the processor computes in it) block by block for an ordinary product.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from perception.errors import ConfigError
from perception.kernels.cpp import kernels
from perception.kernels.linear import FORMS, choose
from perception.kernels.probe import agrees, seconds

log = logging.getLogger(__name__)

PANEL = 16  # outputs side by side
GROUP = 32  # inputs of x that share a scale; the least that share one in int4
GROUPS = (64, 32)  # inputs that share scale and offset in int4: the first that divides K
FEW = 48  # rows beyond which weights in rows are better turned into a block for an ordinary product
BLOCK = 1 << 21  # weights of such a block
LOSS = 2.0  # a compiled product may be so much slower than torch's on one layer: in a block it saves many calls


class Streamed:
    """y = x W^T.

    x       R K float32
    return  R N float32
    """

    weight: Tensor
    scale: Tensor
    in_features: int
    out_features: int

    def __call__(self, x: Tensor) -> Tensor:
        return self.few(x) if len(x) <= FEW else self.many(x)

    def few(self, x: Tensor) -> Tensor:
        return torch.ops.perception.matvec(x.contiguous(), self.weight, self.scale, self.out_features)

    def many(self, x: Tensor) -> Tensor:
        """Block by block through `dense`."""
        y = x.new_empty(len(x), self.out_features)
        step = max(PANEL, BLOCK // self.in_features // PANEL * PANEL)
        for start in range(0, self.out_features, step):
            end = min(start + step, self.out_features)
            torch.mm(x, self.dense(start, end).t(), out=y[:, start:end])
        return y

    def dense(self, start: int, end: int) -> Tensor:
        """Outputs `start` to `end` as float32, end-start K"""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + self.scale.nbytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_features} -> {self.out_features})"


class Rows(Streamed):
    """N K as the model has them, and in the same memory: float32 or half precision, computed with in float32."""

    def __init__(self, weight: Tensor):
        self.weight, self.scale = weight.detach().contiguous(), torch.empty(0)
        self.out_features, self.in_features = weight.shape

    def many(self, x: Tensor) -> Tensor:
        dtype = self.weight.dtype
        form = _form(dtype)
        if form == "float32":
            return super().many(x)
        if form == "plain":
            return F.linear(x.to(dtype), self.weight).float()
        # packed for this call alone: against many rows it is soon done
        return FORMS[form](self.weight, None, dtype)(x.to(dtype)).float()

    def dense(self, start: int, end: int) -> Tensor:
        return self.weight[start:end].float()


class TorchRows(Rows):
    """The same without compiled kernels."""

    def few(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight).float()


class TorchPacked(Streamed):
    """oneDNN's layout, which holds the weights once more and reads them at the speed of memory. No compiler needed."""

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        self.scale, self.dtype = torch.empty(0), weight.dtype
        self.layer = FORMS["onednn"](weight.detach(), None, weight.dtype)
        self.weight = self.layer.weight

    def few(self, x: Tensor) -> Tensor:
        return self.layer(x.to(self.dtype)).float()

    many = few

    @property
    def nbytes(self) -> int:
        return self.out_features * self.in_features * self.dtype.itemsize


class Panels8(Streamed):
    """8 bits, one scale an output (symmetric).

    weight  P K/4 64 int8     16 outputs side by side, four inputs of each
    scale   16P float32
    """

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        rounded, scale = round8(weight)
        panels = F.pad(rounded, (0, -self.in_features % GROUP, 0, -self.out_features % PANEL))
        self.weight = panels.unflatten(0, (-1, PANEL)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2).contiguous()
        self.scale = F.pad(scale, (0, -self.out_features % PANEL))

    def many(self, x: Tensor) -> Tensor:
        return self.few(x) if _stays(8) else super().many(x)

    def dense(self, start: int, end: int) -> Tensor:
        return torch.ops.perception.unpack(self.weight, self.scale, self.in_features, start, end)


class Panels4(Streamed):
    """4 bits, a scale and an offset for each `group` inputs of an output: w is about scale * q + offset, q 0 to 15.

    weight  P K/8 64 uint8    inputs 8i to 8i+3 in the low halves of four bytes, 8i+4 to 8i+7 in the high ones
    scale   P K/group 16 int32    two bfloat16: the scale below, the offset above
    """

    def __init__(self, weight: Tensor, group: int):
        self.out_features, self.in_features = weight.shape
        rounded, scale, offset = round4(weight, group)
        more = -self.out_features % PANEL
        q = F.pad(rounded, (0, 0, 0, more)).unflatten(0, (-1, PANEL)).unflatten(2, (-1, 2, 4))  # P 16 K/8 2 4
        self.weight = (q[..., 0, :] | (q[..., 1, :] << 4)).transpose(1, 2).flatten(2).contiguous()
        pairs = torch.stack([scale, offset], dim=-1).view(torch.int32)[..., 0]  # N K/group
        self.scale = F.pad(pairs, (0, 0, 0, more)).unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()

    def many(self, x: Tensor) -> Tensor:
        return self.few(x) if _stays(4) else super().many(x)

    def dense(self, start: int, end: int) -> Tensor:
        return torch.ops.perception.unpack(self.weight, self.scale, self.in_features, start, end)


class Torch8(Streamed):
    """8 bits through torch's own kernel: the same weights as `Panels8`, in rows."""

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = round8(weight)

    def few(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int8pack_mm(x.contiguous(), self.weight, self.scale)

    def dense(self, start: int, end: int) -> Tensor:
        return self.weight[start:end].float() * self.scale[start:end, None]


class Torch4(Streamed):
    """4 bits through torch's own kernel: the same weights as `Panels4`, in torch's order."""

    def __init__(self, weight: Tensor, group: int):
        self.out_features, self.in_features = weight.shape
        rounded, scale, offset = (F.pad(t, (0, 0, 0, -len(weight) % PANEL)) for t in round4(weight, group))
        # torch means (q - 8) * scale + zero
        pairs = torch.stack([scale.float(), offset.float() + 8 * scale.float()], dim=-1)  # N K/group 2
        self.group, self.scale = group, pairs.transpose(0, 1).contiguous()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(rounded.int(), 1)

    def few(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.contiguous(), self.weight, self.group, self.scale)
        return y[:, : self.out_features]

    many = few


class Rounded(Streamed):
    """Rounded weights kept as floats: the plain twin of the others, slow and large, where nothing else runs."""

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        self.weight, self.scale = weight, torch.empty(0)

    def few(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    many = few


def stream(weight: Tensor, quantize: Literal["int8", "int4"] | None = None, *, build: bool = True) -> Streamed:
    """A linear map for few rows at a time.

    weight    N K on a CPU, float32 or half precision. Without `quantize` it may be shared, so it must not change
    quantize  "int8", or "int4"; a matrix whose K no group divides takes int8 in place of int4
    build     compiled kernels may be built

    Compiled kernels where they are to be had and right and not slow here; else torch's own. Raises ConfigError for
    weights that are no floats in memory.
    """
    if not weight.is_floating_point() or hasattr(weight, "__tensor_flatten__"):
        raise ConfigError("these weights are quantised already; start from the full ones")
    if weight.device.type != "cpu" or weight.ndim != 2:
        raise ConfigError(f"a matrix on a CPU is expected; given {tuple(weight.shape)} on {weight.device}")
    group = next((size for size in GROUPS if weight.shape[1] % size == 0), None)
    with torch.no_grad():
        if quantize is None:
            return _rows(weight, build)
        if quantize == "int4" and group is not None:
            return _first([lambda: Panels4(weight, group)] if compiled("int4", build) else [], weight, group)
        return _first([lambda: Panels8(weight)] if compiled("int8", build) else [], weight, None)


def together(
    weights: Sequence[Tensor], quantize: Literal["int8", "int4"] | None = None, *, build: bool = True
) -> list[Streamed]:
    """Maps that read the same input, arguments and errors as `stream`'s: one map whose outputs lie end to end, where
    torch's operators take copies of the weights; else one each. Compiled kernels take several maps in one call, and
    rows that the model lends stay where they are.
    """
    form = stream(weights[0][:PANEL], quantize, build=build)
    if isinstance(form, Rows | Panels8 | Panels4):
        return [stream(weight, quantize, build=build) for weight in weights]
    return [stream(torch.cat(list(weights)), quantize, build=build)]


def _rows(weight: Tensor, build: bool) -> Streamed:
    if weight.dtype in (torch.float32, torch.bfloat16) and compiled(str(weight.dtype).removeprefix("torch."), build):
        return Rows(weight)
    form = choose(weight.dtype, rows=1)
    return TorchPacked(weight) if form == "onednn" else TorchRows(weight)


def _first(compiled: list[Callable[[], Streamed]], weight: Tensor, group: int | None) -> Streamed:
    """The first that runs here and gives what the rounded weights give."""
    torch_own: Callable[[], Streamed] = (lambda: Torch8(weight)) if group is None else lambda: Torch4(weight, group)
    if compiled:
        return compiled[0]()
    name = "torch int8" if group is None else f"torch int4 {group} {weight.shape[0] % PANEL}"
    if _torch_runs(name, group):
        return torch_own()
    return Rounded(unround(*round8(weight)) if group is None else unround(*round4(weight, group)))


# --- Rounding: the definitions, which all forms share ----------------------------------------------------------------


def round8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """N K -> int8 N K and its scale N, float32: w is about q * scale, q -127 to 127."""
    weight = weight.float()
    scale = weight.abs().amax(dim=1).clamp_min(1e-30) / 127
    return (weight / scale[:, None]).round_().to(torch.int8), scale


def round4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """N K -> uint8 N K of 0 to 15, and scale and offset of each `group` of a row, N K/group bfloat16.

    Scale and offset are rounded before the weights are, so their own rounding costs next to nothing.
    """
    parts = weight.float().unflatten(1, (-1, group))  # N K/group group
    low, high = parts.aminmax(dim=-1)
    scale, offset = ((high - low) / 15).clamp_min(1e-30).bfloat16(), low.bfloat16()
    rounded = (parts - offset.float()[..., None]) / scale.float()[..., None]
    return rounded.round_().clamp_(0, 15).to(torch.uint8).flatten(1), scale, offset


def unround(rounded: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """What the rounded weights stand for: N K float32."""
    if offset is None:
        return rounded.float() * scale[:, None]
    parts = rounded.float().unflatten(1, (scale.shape[1], -1))
    return (parts * scale.float()[..., None] + offset.float()[..., None]).flatten(1)


def round_rows(x: Tensor) -> Tensor:
    """x as the compiled kernels see it beside rounded weights: each 32 of a row in 8 bits.  R K -> R K float32"""
    padded = F.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    scale = padded.abs().amax(dim=-1, keepdim=True) / 127
    back = torch.where(scale > 0, 1 / scale, 0.0)
    return ((padded * back).round() * scale).flatten(1)[:, : x.shape[1]]


# --- What runs here --------------------------------------------------------------------------------------------------


def compiled(kind: str, build: bool = True) -> bool:
    """Whether the compiled product for weights of this kind is here, right, and not slower than torch's.

    kind  "float32", "bfloat16", "int8", "int4"
    """
    return kernels(build) is not None and _compiled(kind, torch.get_num_threads())


@functools.cache
@torch.inference_mode()
def _compiled(kind: str, threads: int) -> bool:
    weight, x = _sample(2048, 1024)
    few = x[:3]
    ours: Streamed
    twin: Streamed
    if kind == "int8":
        ours, wanted = Panels8(weight), round_rows(few) @ unround(*round8(weight)).t()
        twin = Torch8(weight)
    elif kind == "int4":
        ours, wanted = Panels4(weight, 64), round_rows(few) @ unround(*round4(weight, 64)).t()
        twin = Torch4(weight, 64)
    else:
        weight = weight.to(getattr(torch, kind))
        ours, twin, wanted = Rows(weight), TorchRows(weight), few @ weight.float().t()
    if not agrees(f"compiled {kind}", lambda: ours.few(few), wanted, 1e-5):
        return False
    try:
        twin.few(x[:1])
    except Exception as error:
        log.debug("torch has no %s product to compare with: %s", kind, error)
        return True
    return _faster(lambda: ours.few(x[:1]), lambda: twin.few(x[:1]), LOSS)


@functools.cache
@torch.inference_mode()
def _torch_runs(name: str, group: int | None) -> bool:
    weight, x = _sample(64, 256)
    wanted = x[:2] @ unround(*(round8(weight) if group is None else round4(weight, group))).t()
    return agrees(name, lambda: (Torch8(weight) if group is None else Torch4(weight, group)).few(x[:2]), wanted, 1e-2)


@functools.cache
@torch.inference_mode()
def _stays_at(bits: int, threads: int) -> bool:
    """Whether many rows, too, are better multiplied with the panels than with floats made of them."""
    weight, x = _sample(1024, 1024)
    layer = Panels8(weight) if bits == 8 else Panels4(weight, 64)
    return _faster(lambda: layer.few(x), lambda: Streamed.many(layer, x), 1.0)


def _stays(bits: int) -> bool:
    return _stays_at(bits, torch.get_num_threads())


@functools.cache
@torch.inference_mode()
def _form_at(dtype: torch.dtype, threads: int) -> str:
    """How weights in rows meet many rows of x: "plain", "float32" block by block, or a layout made for the call."""
    form = choose(dtype)
    if form in ("plain", "float32") or dtype not in (torch.float32, torch.bfloat16):
        return form if form == "plain" else "float32"
    weight, x = (t.to(dtype) for t in _sample(1024, 1024))
    return form if _faster(lambda: FORMS[form](weight, None, dtype)(x), lambda: F.linear(x, weight), 0.95) else "plain"


def _form(dtype: torch.dtype) -> str:
    return _form_at(dtype, torch.get_num_threads())


def _faster(ours: Callable[[], Any], theirs: Callable[[], Any], loss: float) -> bool:
    """Whether `ours` takes no more than `loss` times as long. In turns, so that other work meets both alike."""
    times = [(seconds(ours, budget=0.002), seconds(theirs, budget=0.002)) for _ in range(3)]
    return min(a for a, _ in times) <= loss * min(b for _, b in times)


def _sample(n: int, k: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, k, generator=generator) * k**-0.5, torch.randn(256, k, generator=generator)
