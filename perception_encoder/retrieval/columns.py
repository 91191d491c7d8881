"""What is known of each row beside its vector, as plain arrays that map into memory.

A column of text is laid out as Arrow lays it out (columnar format, "variable-size binary"): the UTF-8 bytes of all
values end to end, and N + 1 offsets. So a part of 10^5 rows opens without reading a single string, and Arrow filters it
in place.

N rows
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perception.errors import CheckpointError

Value = str | int | float | bool | None
_INT = range(-(2**63), 2**63)


@dataclass(frozen=True)
class Column:
    """One value a row, or none.

    values   N numbers; of texts, the uint8 bytes of all
    offsets  N + 1 positions in the bytes; None for numbers
    valid    N, False where there is no value; None when all have one
    """

    values: np.ndarray
    offsets: np.ndarray | None = None
    valid: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values) if self.offsets is None else len(self.offsets) - 1

    def __getitem__(self, row: int) -> Value:
        if self.valid is not None and not self.valid[row]:
            return None
        if self.offsets is None:
            return self.values[row].item()
        start, stop = int(self.offsets[row]), int(self.offsets[row + 1])
        return self.values[start:stop].tobytes().decode("utf-8", "surrogatepass")

    def to_list(self) -> list[Value]:
        return [self[row] for row in range(len(self))]

    def take(self, rows: Sequence[int] | np.ndarray) -> "Column":
        if self.offsets is not None:
            return column([self[int(row)] for row in rows], like=self)
        return Column(self.values[rows], None, None if self.valid is None else self.valid[rows])

    def arrow(self) -> Any:
        """The same memory as an Arrow array."""
        import pyarrow as pa
        import pyarrow.compute as pc

        absent = None if self.valid is None else ~self.valid.astype(bool)
        if self.offsets is None:
            return pa.array(self.values, mask=absent)
        if (np.diff(self.offsets) < 0).any():  # Arrow would follow them out of the memory there is
            raise CheckpointError("the offsets of a column of text do not rise; the file is damaged")
        buffers = [pa.py_buffer(np.ascontiguousarray(self.offsets)), pa.py_buffer(np.ascontiguousarray(self.values))]
        array = pa.LargeStringArray.from_buffers(len(self), *buffers)
        return array if absent is None else pc.if_else(pa.array(absent), pa.scalar(None, pa.large_string()), array)


def column(values: Iterable[Any], like: Column | None = None) -> Column:
    """A column of Python values: all bool, all whole numbers, all numbers, or else text (JSON for lists and tables)."""
    listed = [value.item() if isinstance(value, np.generic) else value for value in values]
    given = [value for value in listed if value is not None]
    valid = None if len(given) == len(listed) else np.array([value is not None for value in listed])
    kinds = {type(value) for value in given}
    if like is None or like.offsets is None:
        if kinds == {bool}:
            return Column(np.array([bool(value) for value in listed]), None, valid)
        if kinds == {int} and all(value in _INT for value in given):
            return Column(np.array([value or 0 for value in listed], np.int64), None, valid)
        if kinds and kinds <= {int, float}:
            return Column(np.array([np.nan if v is None else float(v) for v in listed], np.float64), None, valid)
    data = [b"" if value is None else _text(value) for value in listed]
    offsets = np.zeros(len(data) + 1, np.int64)
    np.cumsum([len(item) for item in data], out=offsets[1:])
    return Column(np.frombuffer(b"".join(data), np.uint8), offsets, valid)


def _text(value: Any) -> bytes:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return text.encode("utf-8", "surrogatepass")


def id_hashes(ids: Sequence[str]) -> np.ndarray:
    """N int64: eight bytes of BLAKE2b of each id; a sorted array of them finds one among 10^9 without the strings."""
    joined = b"".join(hashlib.blake2b(_text(i), digest_size=8).digest() for i in ids)
    return np.frombuffer(joined, "<i8")


# --- as tensors, for safetensors -------------------------------------------------------------------------------------

_PARTS = {"column": "values", "offsets": "offsets", "valid": "valid"}


def to_tensors(columns: Mapping[str, Column]) -> dict[str, Tensor]:
    """`column/NAME`, and where they are needed `offsets/NAME` and `valid/NAME`."""
    found = {}
    for name, one in columns.items():
        for prefix, field in _PARTS.items():
            array = getattr(one, field)
            if array is not None:
                found[f"{prefix}/{name}"] = torch.from_numpy(np.array(array, copy=not array.flags.writeable))
    return found


def from_tensors(tensors: Mapping[str, Tensor], rows: int, where: str) -> dict[str, Column]:
    """Raises CheckpointError when a column has another number of rows, or offsets beyond its text."""
    columns = {}
    for key, tensor in tensors.items():
        prefix, _, name = key.partition("/")
        if prefix != "column":
            continue
        extra = [tensors[f"{p}/{name}"].numpy() if f"{p}/{name}" in tensors else None for p in ("offsets", "valid")]
        one = Column(tensor.numpy(), *extra)
        if len(one) != rows or (one.valid is not None and len(one.valid) != rows):
            raise CheckpointError(f"{where}: column {name!r} has {len(one)} rows, the vectors {rows}")
        if (offsets := one.offsets) is not None and (
            offsets.dtype != np.int64
            or offsets[0] != 0
            or offsets[-1] > len(one.values)
            or (np.diff(offsets) < 0).any()
        ):
            raise CheckpointError(f"{where}: the offsets of column {name!r} do not rise from 0 to the end of its text")
        columns[name] = one
    return columns
