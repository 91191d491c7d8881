"""Which sample comes when, by arithmetic: the k-th of a run is a function of k, so a run can start anywhere.

Nothing is drawn and remembered: a saved position is one number, and neither the workers nor the processes that share
the work have a say in the order.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from perception.errors import ConfigError

BLOCK = 1024  # positions in which every source has its share, to one sample


@dataclass(frozen=True)
class Place:
    """Where a sample is: which source, which of its samples, and for the how many-th time."""

    source: int
    index: int
    epoch: int


class Order:
    """An endless sequence of samples from several sources.

    sizes    samples of each source
    weights  how much of the sequence each gets; their sum does not matter
    shuffle  False: each source from its first to its last sample, again and again

    `order[k]` is the k-th place. Every source is gone through whole, in another order each time, before it begins anew.
    Raises ConfigError for sources without samples and weights that are not above 0.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None = None, *, seed: int = 0, shuffle: bool = True
    ):
        weights = [1.0] * len(sizes) if weights is None else weights
        if not sizes or len(sizes) != len(weights) or min(sizes) < 1:
            raise ConfigError(f"sources of {list(sizes)} samples with weights {list(weights)}: nothing to learn from")
        if not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"weights {list(weights)}; expected numbers above 0")
        self.sizes, self.seed, self.shuffle = list(sizes), seed, shuffle
        self._ends = np.cumsum(np.asarray(weights, dtype=np.float64) / sum(weights))
        self._block = -1  # the block whose sources are known, and what every source gave before it
        self._before = np.zeros(len(sizes), dtype=np.int64)
        self._sources = np.zeros(0, dtype=np.int64)

    def __getitem__(self, position: int) -> Place:
        if position < 0:
            raise IndexError(position)
        if len(self.sizes) == 1:
            return self._place(0, position)
        block, at = divmod(position, BLOCK)
        self._seek(block)
        source = int(self._sources[at])
        return self._place(source, int(self._before[source]) + int((self._sources[:at] == source).sum()))

    def span(self, start: int, stop: int) -> Iterator[Place]:
        return (self[position] for position in range(start, stop))

    def _place(self, source: int, count: int) -> Place:
        epoch, at = divmod(count, self.sizes[source])
        if self.shuffle:
            at = shuffled(at, self.sizes[source], mix(self.seed, source, epoch))
        return Place(source, at, epoch)

    def _seek(self, block: int) -> None:
        if block == self._block:
            return
        here = max(self._block, 0)  # a long run asks for neighbours, and never again for all from the start
        self._before = self._before.copy()
        for earlier in range(here, block):
            self._before += np.bincount(self._draw(earlier), minlength=len(self.sizes))
        for later in range(block, here):
            self._before -= np.bincount(self._draw(later), minlength=len(self.sizes))
        self._block, self._sources = block, self._draw(block)

    def _draw(self, block: int) -> np.ndarray:
        """The sources of a block: as many of each as its weight asks for, to one, in any order."""
        generator = np.random.default_rng([self.seed & 0xFFFFFFFF, 7, block])
        points = (np.arange(BLOCK) + generator.random()) / BLOCK
        sources = np.searchsorted(self._ends, points, side="right").clip(max=len(self.sizes) - 1)
        generator.shuffle(sources)
        return sources


def shuffled(index: int, size: int, key: int) -> int:
    """Where `index` goes in the key-th permutation of 0 .. size-1, without making the permutation.

    A Feistel network (Luby & Rackoff 1988) over the next even power of two, walked until it is back in range.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(4):
            left, right = right, left ^ (mix(key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


def mix(*values: int) -> int:
    """64 well-stirred bits of some numbers (splitmix64, Steele et al. 2014)."""
    state = 0
    for value in values:
        state = (state + 0x9E3779B97F4A7C15 + value) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state
