"""Conditions on what is known of a row: one small language for every store.

    {"label": "cat"}                       equal
    {"label": ["cat", "dog"]}              one of
    {"label": None}                        not known
    {"width": {">=": 512, "<": 1024}}      compared; also !=, >, <=
    {"text": {"contains": "red"}}          part of a text

All conditions of one filter hold together. A row that does not know the column meets no condition but None; a column
that no row knows is an error.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from perception.errors import ConfigError
from perception_encoder.retrieval.columns import Column

Filter = Mapping[str, Any]
COMPARISONS = ("==", "!=", "<", "<=", ">", ">=", "in", "contains")
META = "meta."  # columns that came with the pictures, beside those every row has


class Condition(NamedTuple):
    name: str
    operator: str  # one of COMPARISONS, or "missing"
    value: Any


def parse(given: Filter | None) -> list[Condition]:
    """Raises ConfigError for what is no filter."""
    if given is None:
        return []
    if not isinstance(given, Mapping):
        raise ConfigError(f'filter={given!r}; give conditions by column, such as {{"label": "cat"}}')
    found = []
    for name, value in given.items():
        if not isinstance(name, str) or not name or len(name) > 200 or "`" in name or not name.isprintable():
            raise ConfigError(f"filter has {name!r} as a column; expected a name")
        if value is None:
            found.append(Condition(name, "missing", None))
        elif isinstance(value, Mapping):
            found += [Condition(name, operator, _checked(name, operator, v)) for operator, v in value.items()]
        elif isinstance(value, Sequence | set | frozenset) and not isinstance(value, str):
            found.append(Condition(name, "in", [_checked(name, "in", one) for one in value]))
        else:
            found.append(Condition(name, "==", _checked(name, "==", value)))
    return found


def _checked(name: str, operator: str, value: Any) -> Any:
    if operator not in COMPARISONS:
        raise ConfigError(f"filter on {name!r} has {operator!r}; choose from {', '.join(COMPARISONS)}")
    if operator == "contains" and not isinstance(value, str):
        raise ConfigError(f"filter on {name!r}: contains takes a text, given {value!r}")
    if operator == "in" and isinstance(value, list | tuple):
        return [_checked(name, "==", one) for one in value]
    if not isinstance(value, str | int | float | bool):
        raise ConfigError(f"filter on {name!r} compares with {value!r}; expected text, a number, True or False")
    return value


def check_columns(conditions: list[Condition], columns: Iterable[str]) -> None:
    """ConfigError for a condition other than None on a column that no row has: its name has a mistake in it."""
    known = dict.fromkeys(columns)
    for condition in conditions:
        if condition.operator != "missing" and find(condition.name, known) is None:
            names = ", ".join(sorted({name.removeprefix(META) for name in known}))
            raise ConfigError(f"no column {condition.name!r} to filter by; there are {names}")


def find(name: str, columns: Mapping[str, Any]) -> str | None:
    """The column a filter means: by its own name, or one that came with the pictures."""
    return next((known for known in (name, META + name) if known in columns), None)


def mask(conditions: list[Condition], columns: Mapping[str, Column], rows: int) -> np.ndarray:
    """N bool: the rows that meet all conditions. Columns may be missing here that others of the store have."""
    allowed = np.ones(rows, bool)
    for condition in conditions:
        name = find(condition.name, columns)
        if name is None:
            allowed &= condition.operator == "missing"
        else:
            allowed &= _meets(condition, columns[name])
    return allowed


def _meets(condition: Condition, one: Column) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if condition.operator == "missing":
        return np.zeros(len(one), bool) if one.valid is None else ~one.valid.astype(bool)
    operators = {
        "==": pc.equal,
        "!=": pc.not_equal,
        "<": pc.less,
        "<=": pc.less_equal,
        ">": pc.greater,
        ">=": pc.greater_equal,
        "contains": pc.match_substring,
    }
    array = one.arrow()
    try:
        if condition.operator == "in":
            met = pc.is_in(
                array, value_set=pa.array(condition.value).cast(array.type) if condition.value else array[:0]
            )
            met = pc.and_(met, pc.is_valid(array))
        else:
            met = operators[condition.operator](array, condition.value)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        raise ConfigError(
            f"filter on {condition.name!r} compares {array.type} with {condition.value!r}; they do not compare"
        ) from error
    return np.asarray(pc.fill_null(met, False).to_numpy(zero_copy_only=False), bool)


def sql(conditions: list[Condition], names: Mapping[str, str]) -> str:
    """The same conditions as SQL, of columns that `check_columns` has seen.

    names  our columns -> theirs
    """
    return " AND ".join(f"({_clause(condition, names)})" for condition in conditions)


def _clause(condition: Condition, names: Mapping[str, str]) -> str:
    name = find(condition.name, names)
    if name is None:
        return "true"  # not known of any row, as the condition says
    quoted = f"`{names[name]}`"
    if condition.operator == "missing":
        return f"{quoted} IS NULL"
    if condition.operator == "contains":
        return f"contains({quoted}, {_literal(condition.value)})"
    if condition.operator == "in":
        listed = ", ".join(_literal(value) for value in condition.value)
        return f"{quoted} IN ({listed})" if condition.value else "false"
    operator = {"==": "=", "!=": "<>"}.get(condition.operator, condition.operator)
    return f"{quoted} {operator} {_literal(condition.value)}"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return "'" + re.sub("'", "''", value) + "'"
