"""Triton where it is installed; where it is not, the kernels below it are defined and never called."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl

    INSTALLED = True
    INTERPRETED = bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False
except ImportError:
    triton, tl = None, SimpleNamespace(constexpr=int)
    INSTALLED = INTERPRETED = False


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function as it is."""
    return triton.jit(function) if INSTALLED else function


def runs_on(x: Tensor) -> bool:
    """Whether kernels run on the device of `x`; a compiler is shown their twins, which it fuses itself."""
    return INSTALLED and (x.is_cuda or INTERPRETED) and not torch.compiler.is_compiling()


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Start `kernel` on the device of its first argument, which need not be the current one."""
    if 0 in grid:
        return
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def power_of_two(n: int) -> int:
    """The least power of two that is n or more: the lengths Triton's blocks can have."""
    return 1 << max(n - 1, 0).bit_length()


def check(fits: bool, what: str, **tensors: Tensor) -> None:
    """ValueError with the shapes of the tensors unless they fit."""
    if not fits:
        given = ", ".join(
            f"{name} {tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for name, t in tensors.items()
        )
        raise ValueError(f"{what}; given {given}")
