"""`device="auto"` and `dtype="auto"`, resolved when somebody asks and never at import; models without memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from perception.errors import ConfigError

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def available_devices() -> list[str]:
    """What `device=` may be here, best first: `cuda:0`, ..., `mps`, `cpu`."""
    found = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device asked for, or the best one here for "auto".

    Raises ConfigError, listing the devices, when it is not here.
    """
    here = available_devices()
    if device == "auto":
        return torch.device(here[0])
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device {device!r} is no device name; devices here: {', '.join(here)}") from error
    known = asked.type in {name.split(":")[0] for name in here} and (
        asked.type != "cuda" or str(asked) in ("cuda", *here)
    )
    if not known and asked.type != "meta":
        raise ConfigError(f"device {str(asked)!r} is not available; devices here: {', '.join(here)}")
    return asked


def pick_dtype(
    dtype: str | torch.dtype = "auto", device: str | torch.device = "cpu", stored: torch.dtype = torch.float32
) -> torch.dtype:
    """The dtype asked for; for "auto" float32 on a CPU, where half precision is slow, and the stored one elsewhere.

    "stored" is the stored one everywhere, for conversions that must not change a bit.

    Raises ConfigError for a dtype a model cannot run in.
    """
    if dtype == "stored":
        return stored
    if dtype == "auto":
        half = stored in (torch.float16, torch.bfloat16)
        return stored if half and torch.device(device).type != "cpu" else torch.float32
    picked = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if picked not in DTYPES.values():
        raise ConfigError(f"dtype {dtype!r} is not one a model runs in; choose from auto, {', '.join(DTYPES)}")
    return picked


@contextmanager
def shapes_only() -> Iterator[None]:
    """Models built inside are on the meta device: parameters have shapes and no memory, and are not initialised."""
    with torch.device("meta"), _Uninitialised():
        yield


class _Uninitialised(TorchFunctionMode):
    """Leaves alone what `torch.nn.init` would fill. Filling a meta tensor at random does nothing but import torch's
    compiler, which takes longer than loading a small model."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.__name__ in ("normal_", "uniform_", "trunc_normal_", "erfinv_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
