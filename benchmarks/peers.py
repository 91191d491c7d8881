"""Other libraries on our weights, and the kernels that say what the machine can do.

Nothing is downloaded: a model of ours is filled with seeded random numbers and converted by the tables that read and
write the published files, so every contender computes the same function.
"""

from collections.abc import Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from harness import Call, Limit
from shim import shim
from torch import Tensor, nn

from perception.checkpoint import convert
from perception_encoder.checkpoints import OPEN_CLIP_CLIP, TIMM_TOWER
from perception_encoder.clip import CLIP
from perception_encoder.vision import VisionTransformer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# --- models ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Seeded numbers of a trained model's order of size: nothing is exactly 0 or 1. The memory may be uninitialised."""
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.empty(parameter.shape).normal_(generator=g)
        if parameter.ndim > 1:
            parameter.copy_(noise.mul_(parameter[0].numel() ** -0.5))
        elif parameter.ndim == 1:
            middle = 0.1 if name.endswith("gamma") else float("norm" in name and name.endswith("weight"))
            parameter.copy_(noise.mul_(0.02).add_(middle))
        else:
            parameter.fill_(4.6)  # the scale of a trained pair, exp(4.6) = 100
    return model.eval()


def tower(name: str) -> VisionTransformer:
    from perception_encoder.zoo import MODELS

    with torch.device("meta"):
        model = VisionTransformer(MODELS.get(name).vision)
    return randomise(model.to_empty(device="cpu"))  # type: ignore[return-value]


def clip(name: str) -> CLIP:
    from perception_encoder.text import TextTransformer
    from perception_encoder.zoo import MODELS

    entry = MODELS.get(name)
    with torch.device("meta"):
        model = CLIP(VisionTransformer(entry.vision), TextTransformer(entry.text))
    return randomise(model.to_empty(device="cpu"))  # type: ignore[return-value]


def timm_tower(model: VisionTransformer) -> nn.Module:
    """timm's model with our weights. open_clip wraps this very module for the same names. LookupError where it has
    none of these sizes."""
    from perception_encoder.zoo import timm_name

    if (name := timm_name(model.config)) is None:
        raise LookupError(f"timm has no tower of width {model.config.width} and depth {model.config.depth}")
    shim()
    import timm

    theirs = timm.create_model(name, pretrained=False)
    return fill(theirs, convert(model.state_dict(), TIMM_TOWER, back=True))


def open_clip_model(model: CLIP, name: str = "PE-Core-B-16") -> nn.Module:
    """open_clip's model of both towers with our weights."""
    shim()
    import open_clip

    theirs = open_clip.create_model(name, pretrained=None, load_weights=False)
    return fill(theirs, convert(model.state_dict(), OPEN_CLIP_CLIP, back=True))


def fill(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Strictly, without a second copy: what both sides call a parameter is one tensor."""
    missing, extra = model.load_state_dict(dict(state), strict=False, assign=True)
    computed = {name for name, _ in model.named_buffers()}
    if extra or set(missing) - computed:
        raise AssertionError(f"the conversion does not fit: missing {sorted(missing)[:3]}, extra {sorted(extra)[:3]}")
    return model.eval()


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@contextmanager
def onednn_fp32() -> Any:
    """The public switch that sends float32 products through oneDNN. Where the processor has bfloat16, it rounds."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


# --- limits ---------------------------------------------------------------------------------------------------------


def gemm(dtype: torch.dtype, m: int, k: int, n: int, quantize: Literal["int8"] | None = None) -> Limit:
    """One product of a model's shape in the form that is fastest here, of all that a twin may use, and PyTorch's own.

    Where bfloat16 is slow a twin of such weights computes in float32, inputs and all: that product is a form too, or
    the twin would reach more than the limit.
    """
    from perception.kernels.linear import pack, renew
    from perception.kernels.probe import seconds

    renew()  # a model packed before has used up the time in which layouts may race
    x, weight, bias = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    forms: list[Call] = [partial(nn.functional.linear, x, weight, bias)]
    for wide in dict.fromkeys((dtype, torch.float32)):
        for bits in dict.fromkeys((quantize, None)):
            forms.append(partial(pack(weight.to(wide), bias.to(wide), quantize=bits, rows=m), x.to(wide)))
    return Limit(min(forms, key=lambda form: seconds(form, budget=0.3)), 2.0 * m * k * n)


def forecast(work: float, dtype: torch.dtype) -> float:
    """About how many seconds a model of plain layers takes for so many FLOPs: what a small product says."""
    from perception.kernels.probe import seconds

    m, k, n = 256, 1024, 1024
    x, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
    return work / (2.0 * m * k * n) * seconds(lambda: nn.functional.linear(x, weight), budget=0.3)


def read_sweep(size: int = 512 << 20) -> Limit:
    """Reading memory: far more than any cache holds."""
    block = torch.ones(size // 8, dtype=torch.int64)
    return Limit(lambda: block.sum(), float(block.nbytes), "GB/s")


# --- equality -------------------------------------------------------------------------------------------------------


def agree(
    wanted: Tensor, found: Mapping[str, Tensor], *, relative: float | None = None, cosine: float | None = None
) -> dict[str, dict[str, float]]:
    """How far the worst row of each is from `wanted`'s; AssertionError beyond the bound. Nothing is timed that computes
    something else."""
    wanted = wanted.float().flatten(1)
    table = {}
    for name, value in found.items():
        value = value.float().flatten(1)
        error = float(((value - wanted).norm(dim=1) / wanted.norm(dim=1)).max())
        likeness = float(nn.functional.cosine_similarity(value, wanted).min())
        table[name] = {"relative error": float(f"{error:.3g}"), "cosine": round(likeness, 6)}
        if (relative is not None and not error <= relative) or (cosine is not None and not likeness >= cosine):
            raise AssertionError(f"{name} computes something else: {table[name]}; expected {relative=} {cosine=}")
    return table
