"""Run files: strict TOML, and `key=value` on the command line over it."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from perception.errors import ConfigError
from perception.settings import read_settings

T = TypeVar("T")
MAX_RUN_FILE = 4 * 2**20  # bytes


def read_run(kind: type[T], path: str | Path, overrides: Iterable[str] = ()) -> T:
    """A dataclass from a TOML file, with values of the command line in place of the file's.

    overrides  "key=value" or "table.key=value"; the value is TOML, or text where it is none

    Raises ConfigError for a file that is not there or no TOML, for unknown keys, and for values of the wrong type.
    """
    data = read_toml(path)
    for override in overrides:
        set_value(data, override)
    return read_settings(kind, data, str(path))


def find_run(name: str | Path, ready: Path) -> Path:
    """The run file of a path, or of the name of one in the folder `ready`. What is here comes before what is ready.

    Raises ConfigError with the names of the ready ones where there is neither.
    """
    path = Path(name)
    packaged = ready / f"{path.name.removesuffix('.toml')}.toml"
    if path.is_file():
        return path
    if path.parent == Path() and packaged.is_file():
        return packaged
    raise ConfigError(f"no run file at {path}; those of the package are {', '.join(ready_runs(ready))}")


def ready_runs(folder: Path) -> list[str]:
    """The names of the run files in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))


def read_toml(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    try:
        if not path.is_file():
            raise ConfigError(f"no run file at {path}")
        if path.stat().st_size > MAX_RUN_FILE:
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, too many for a run file")
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path} is no TOML: {error}") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error


def set_value(data: dict[str, Any], override: str) -> None:
    """Put one "table.key=value" into a nested table. Raises ConfigError for what is no such thing."""
    key, equals, text = override.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise ConfigError(f"{override!r} is no override; expected key=value or table.key=value")
    for part in parts[:-1]:
        table = data.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{override!r}: {part!r} is {table!r}, not a table")
        data = table
    data[parts[-1]] = _value(text.strip())


def _value(text: str) -> Any:
    """What TOML says; text that is no TOML value stands for itself, so that a path needs no quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        return text


def differences(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> list[str]:
    """The dotted keys in which two nested tables differ."""
    found = []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{where}{key}.")
        elif old != new:
            found.append(f"{where}{key}")
    return found
