"""Frozen dataclasses from files nobody vouches for: unknown keys, missing keys and wrong types are errors."""

import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from perception.errors import ConfigError

T = TypeVar("T")


def read_settings(kind: type[T], data: object, where: str = "config") -> T:
    """A dataclass from parsed JSON or TOML.

    Raises ConfigError naming the key and what it must be. Nothing is coerced but int to float and list to tuple, so a
    value that reads back is the value that was written.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"{where} is {_show(data)}; expected a table with the keys of {kind.__name__}")
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    strange = sorted(str(key) for key in data if key not in known)
    if strange:
        raise ConfigError(f"{where} has unknown keys {strange}; {kind.__name__} has {sorted(known)}")
    needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
    if missing := sorted(needed - set(data)):
        raise ConfigError(f"{where} lacks the keys {missing}")
    hints = get_type_hints(kind)
    return kind(**{key: _value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def is_number(value: object) -> bool:
    """A finite one. What a file says may be text or anything else."""
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def check_range(where: str, value: int | float, low: int | float, high: int | float) -> None:
    """ConfigError unless low <= value <= high. Upper bounds are far above any real model: they stop a hostile file."""
    if not low <= value <= high:
        raise ConfigError(f"{where} is {value}; expected {low} to {high}")


def _value(hint: Any, value: object, where: str) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _value(option, value, where)
            except ConfigError:
                continue
        tables = [option for option in arguments if is_dataclass(option)]
        if isinstance(value, Mapping) and len(tables) == 1:
            return _value(tables[0], value, where)  # its error says which key; "expected one of these" does not
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple and isinstance(value, list | tuple):
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) == len(value):
            return tuple(_value(i, v, f"{where}[{n}]") for n, (i, v) in enumerate(zip(inner, value, strict=True)))
    elif origin is dict and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif hint is Any:
        return value
    elif is_dataclass(hint):
        return read_settings(hint, value, where)  # type: ignore[arg-type]
    elif hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{where} is {_show(value)}; expected {_name(hint)}")


def _name(hint: Any) -> str:
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join("None" if option is type(None) else _name(option) for option in get_args(hint))
    plain = isinstance(hint, type) and get_origin(hint) is None
    return hint.__name__ if plain else str(hint).replace("typing.", "")


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
