"""Messages and media to a `Batch`: every tile cut, every slot counted, on the CPU, before a model sees anything.

B rows of the batch  T text tokens  M media items (images, tiles, frames)  S side of an item
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Prompts of different length and different media, side by side.

    tokens        B T int64, padded on the right
    lengths       B tokens of each row that are not padding
    pixels        M 3 S S, the items of all rows, row after row; None when no row has any
    media_counts  B items of each row; they sum to M
    """

    tokens: Tensor
    lengths: tuple[int, ...]
    pixels: Tensor | None = None
    media_counts: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.media_counts:
            object.__setattr__(self, "media_counts", (0,) * len(self.lengths))
        M = 0 if self.pixels is None else len(self.pixels)
        assert len(self.tokens) == len(self.lengths) == len(self.media_counts), "one length and one count a row"
        assert sum(self.media_counts) == M, "as many items as the rows have"

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> "Batch":
        """The one row, without its padding: a batch of its own."""
        row = range(len(self))[row]
        first = sum(self.media_counts[:row])
        count, length = self.media_counts[row], self.lengths[row]
        pixels = self.pixels[first : first + count] if self.pixels is not None and count else None
        tokens = self.tokens[row : row + 1, :length]
        return Batch(tokens=tokens, lengths=(length,), pixels=pixels, media_counts=(count,))

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> "Batch":
        """On another device; `dtype` is of the pixels."""
        pixels = None if self.pixels is None else self.pixels.to(device, dtype)
        return replace(self, tokens=self.tokens.to(device), pixels=pixels)
