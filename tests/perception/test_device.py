"""Devices, dtypes, registries and settings: what is picked, and what is refused."""

from dataclasses import dataclass
from typing import Literal

import pytest
import torch

from perception.device import available_devices, pick_device, pick_dtype
from perception.errors import ConfigError
from perception.registry import Registry
from perception.settings import read_settings


def test_auto_is_the_best_device_here() -> None:
    assert str(pick_device("auto")) == available_devices()[0]
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_f07_absent_device_lists_those_here(device: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{device}' is not available; devices here: .*cpu"):
        pick_device(device)


def test_nonsense_device() -> None:
    with pytest.raises(ConfigError, match="no device name; devices here: "):
        pick_device("warp9")


def test_dtype() -> None:
    assert pick_dtype("auto", "cpu", torch.float16) == torch.float32
    assert pick_dtype("auto", "cuda", torch.float16) == torch.float16
    assert pick_dtype("auto", "cuda", torch.float32) == torch.float32
    assert pick_dtype("bf16") == pick_dtype(torch.bfloat16) == torch.bfloat16
    for bad in ("int8", torch.int8, "float"):
        with pytest.raises(ConfigError, match="choose from auto"):
            pick_dtype(bad)


def test_registry() -> None:
    registry: Registry[int] = Registry("encoder")
    registry.add("PE-Core-B16-224", 1)
    assert registry.get("PE-Core-B16-224") == 1
    assert "PE-Core-B16-224" in registry
    with pytest.raises(ValueError, match="already registered"):
        registry.add("PE-Core-B16-224", 2)
    with pytest.raises(LookupError, match="no encoder named 'pe-core-b16-242'; did you mean 'PE-Core-B16-224'"):
        registry.get("pe-core-b16-242")
    with pytest.raises(LookupError, match="there are: PE-Core-B16-224"):
        registry.get("zzz")


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner
    rate: float = 0.5
    kind: Literal["a", "b"] | None = None
    mean: tuple[float, float] = (0.0, 0.0)


def test_settings_round_trip() -> None:
    got = read_settings(Outer, {"inner": {"size": 3}, "rate": 1, "kind": "b", "mean": [1, 2.5]})
    assert got == Outer(inner=Inner(size=3), rate=1.0, kind="b", mean=(1.0, 2.5))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"inner": {"size": 3}, "rat": 1}, r"unknown keys \['rat'\]; Outer has"),
        ({"inner": {"size": 3, "x": 1}}, r"config.inner has unknown keys \['x'\]"),
        ({}, r"lacks the keys \['inner'\]"),
        ({"inner": {"size": "3"}}, "config.inner.size is '3'; expected int"),
        ({"inner": {"size": True}}, "config.inner.size is True; expected int"),
        ({"inner": {"size": 3.0}}, "config.inner.size is 3.0; expected int"),
        ({"inner": {"size": 3}, "kind": "c"}, "config.kind is 'c'; expected"),
        ({"inner": {"size": 3}, "mean": [1]}, r"config.mean is \[1\]; expected tuple"),
        ([1], r"config is \[1\]; expected a table with the keys of Outer"),
    ],
)
def test_settings_refusals(data: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_settings(Outer, data)
