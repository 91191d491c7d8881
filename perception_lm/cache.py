"""Keys and values of the tokens a decoder has seen: a value that is passed, never an attribute that is found.

B batch  T new tokens  S tokens kept  E decoder width

A row's slot number is its position, so rows of different length live side by side:

    row 0   a b c d e .        a query at position p sees the slots 0 to p of its row;
    row 1   f g - - - .        what padding or a rejected guess left in later slots (-) is written over
                               before any query is far enough to see it
"""

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from perception.attention import attend, attend_packed
from perception.errors import LimitError


@runtime_checkable
class Cache(Protocol):
    """What generation needs of a decoder's memory; a foreign decoder brings its own."""

    lengths: list[int]  # tokens kept, of each row

    def crop(self, lengths: Sequence[int]) -> None: ...  # forget what comes after
    def select(self, rows: Sequence[int]) -> "Cache": ...  # these rows, in this order; repeats are copies
    def resized(self, capacity: int) -> "Cache": ...  # the same tokens with room for `capacity`; may be itself


class Past:
    """What came before the T new tokens of one pass through the decoder: here, nothing.

    positions  B T     where the new tokens stand
    mask       what they may see, as `perception.attention.attend` takes it; None: causal
    """

    def __init__(self, positions: Tensor, mask: Tensor | None = None):
        self.positions, self.mask = positions, mask

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values of a layer, the new ones among them: B S kv_heads head_dim."""
        return k, v

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the new tokens read: B T heads head_dim.  q as many, k and v B T kv_heads head_dim, the new ones"""
        k, v = self.extend(layer, k, v)
        return attend(q, k, v, causal=self.mask is None, mask=self.mask)


class Packed(Past):
    """Documents laid end to end in one row: each starts at position 0, and sees nothing of the others.

    lengths  of each; they sum to T, and B is 1

    Given to the decoder as `cache=`; nothing is kept, so one value may serve any number of passes. Raises ValueError
    when the lengths are not positive, or do not add up to the tokens.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str | None = None):
        self.batch, self.lengths = 1, list(lengths)
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"documents of {self.lengths} tokens; give at least one, of at least one token each")
        super().__init__(torch.cat([torch.arange(n) for n in self.lengths])[None].to(device or "cpu"))

    def past(self, new: int) -> "Packed":
        if new != sum(self.lengths):
            raise ValueError(f"documents of {self.lengths} tokens are {sum(self.lengths)}, but {new} were given")
        return self

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend_packed(q[0], k[0], v[0], self.lengths, causal=True)[None]


class KVCache:
    """Room for `capacity` tokens in each of `batch` rows, taken at once.

    keys, values  depth x (B capacity kv_heads head_dim)
    lengths       tokens kept, of each row

    A pass through the decoder appends its T tokens to every row; `crop` takes back those that were padding.
    """

    def __init__(
        self,
        batch: int,
        capacity: int,
        *,
        depth: int,
        kv_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        self.batch, self.capacity, self.lengths = batch, capacity, [0] * batch
        room = partial(self._room, batch, capacity, kv_heads, head_dim, device=device, dtype=dtype)
        self.keys, self.values = [room() for _ in range(depth)], [room() for _ in range(depth)]

    @staticmethod
    def _room(batch: int, capacity: int, kv_heads: int, head_dim: int, **options: Any) -> Tensor:
        """B capacity kv_heads head_dim, in whatever order in memory"""
        # zeros, not empty: a slot that is masked counts 0 times its value, and 0 times NaN is NaN
        return torch.zeros(batch, capacity, kv_heads, head_dim, **options)

    def past(self, new: int) -> "KVPast":
        """Make `new` tokens part of every row; their keys and values follow layer by layer.

        Raises LimitError when they do not fit.
        """
        past = KVPast(self, new)
        self.lengths = [length + new for length in self.lengths]
        return past

    def crop(self, lengths: Sequence[int]) -> None:
        """Forget all but the first `lengths[b]` tokens of each row b."""
        if len(lengths) != self.batch or any(not 0 <= n <= m for n, m in zip(lengths, self.lengths, strict=True)):
            raise ValueError(f"rows of {self.lengths} tokens cannot be cropped to {list(lengths)}")
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> Self:
        """These rows in this order, as a copy; a row named twice is there twice."""
        return self._copy(list(rows), self.capacity)

    def resized(self, capacity: int) -> Self:
        """The same tokens with room for `capacity` a row; itself when there is."""
        return self if capacity <= self.capacity else self._copy(list(range(self.batch)), capacity)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.keys + self.values)

    def _copy(self, rows: list[int], capacity: int) -> Self:
        kv_heads, head_dim = self.keys[0].shape[2:]
        new = type(self)(
            len(rows),
            capacity,
            depth=len(self.keys),
            kv_heads=kv_heads,
            head_dim=head_dim,
            device=self.keys[0].device,
            dtype=self.keys[0].dtype,
        )
        new.lengths = [self.lengths[row] for row in rows]
        used = max(new.lengths, default=0)
        for ours, theirs in zip(new.keys + new.values, self.keys + self.values, strict=True):
            ours[:, :used] = theirs[rows, :used]
        return new


class HeadCache(KVCache):
    """The same with the tokens of a head side by side in memory: what one new token reads is contiguous.

    by_head  depth x (keys, values), each B kv_heads capacity head_dim, the same memory
    """

    @staticmethod
    def _room(batch: int, capacity: int, kv_heads: int, head_dim: int, **options: Any) -> Tensor:
        return torch.zeros(batch, kv_heads, capacity, head_dim, **options).transpose(1, 2)

    @cached_property
    def by_head(self) -> list[tuple[Tensor, Tensor]]:
        return [(k.transpose(1, 2), v.transpose(1, 2)) for k, v in zip(self.keys, self.values, strict=True)]

    def places(self, new: int) -> Tensor:
        """Make `new` tokens part of every row. Returns row and slot of each, 2 B*new int64; LimitError as `past`."""
        check_room(self, new)
        slots = [[row, length + i] for row, length in enumerate(self.lengths) for i in range(new)]
        self.lengths = [length + new for length in self.lengths]
        return torch.tensor(slots).t().contiguous()


class KVPast(Past):
    """The rows of a `KVCache` before, and with, the new tokens of one pass."""

    def __init__(self, cache: KVCache, new: int):
        starts, end = cache.lengths, check_room(cache, new)
        device = cache.keys[0].device
        positions = torch.tensor(starts, device=device)[:, None] + torch.arange(new, device=device)  # B T
        super().__init__(positions, None if len(set(starts)) == 1 else visible(positions, end))
        self.cache, self.start, self.end, self.rows = (
            cache,
            end - new,
            end,
            torch.arange(cache.batch, device=device)[:, None],
        )

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        if self.mask is None:  # all rows at the same place: one copy
            keys[:, self.start : self.end], values[:, self.start : self.end] = k, v
        else:
            keys[self.rows, self.positions] = k.to(keys.dtype)
            values[self.rows, self.positions] = v.to(values.dtype)
        return keys[:, : self.end].to(k.dtype), values[:, : self.end].to(v.dtype)


class Replay:
    """For decoders that keep nothing: the embeddings so far, all of which run again at each step.

    Slow and plain; also what cached decoding is tested against.
    """

    def __init__(self, batch: int):
        self.lengths = [0] * batch
        self.x: Tensor | None = None  # B S E

    def extend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """B T E -> all embeddings B S E, and where in S the new ones are, B T."""
        B, T, E = x.shape
        at = torch.tensor(self.lengths, device=x.device)[:, None] + torch.arange(T, device=x.device)  # B T
        whole = x.new_zeros(B, max(self.lengths) + T, E)
        if self.x is not None:
            kept = max(self.lengths)
            whole[:, :kept] = self.x[:, :kept]
        whole[torch.arange(B, device=x.device)[:, None], at] = x
        self.x, self.lengths = whole, [length + T for length in self.lengths]
        return whole, at

    def crop(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def select(self, rows: Sequence[int]) -> "Replay":
        new = Replay(len(rows))
        new.lengths = [self.lengths[row] for row in rows]
        new.x = None if self.x is None else self.x[list(rows)]
        return new

    def resized(self, capacity: int) -> "Replay":
        return self


def check_room(cache: KVCache, new: int) -> int:
    """Tokens of the longest row with `new` more; LimitError when they do not fit."""
    end = max(cache.lengths, default=0) + new
    if end > cache.capacity:
        raise LimitError(f"{end} tokens do not fit into a cache of {cache.capacity}; make a larger one")
    return end


def visible(positions: Tensor, end: int) -> Tensor:
    """B 1 T S bool: a query at position p sees the slots 0 to p.  positions B T, S = end"""
    return (torch.arange(end, device=positions.device) <= positions[..., None])[:, None]
