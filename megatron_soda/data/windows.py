"""Which window is sample n: a pure function of (seed, n), so nothing is stored, shared or built.

Window i of a store is its tokens [length * i, length * i + length), plus one more token as the last label. Each epoch
is a different permutation of the windows, computed by a Feistel network.

Aligned windows are length - (codebooks - 1) tokens apart, and one that would begin inside an audio frame begins at the
frame's first token instead. A window counts its labels up to the start of the next one.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from ..errors import SodaError
from .store import Store

_ROUNDS = 4
_MASK64 = (1 << 64) - 1


def _mix(value: int) -> int:
    """SplitMix64's finaliser (Steele et al., 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)


def permute(index: int, count: int, key: int) -> int:
    """The place of `index` in a pseudo-random permutation of range(count): O(1), no table."""
    half = max(1, ((count - 1).bit_length() + 1) // 2)
    mask, keys = (1 << half) - 1, _round_keys(key)
    while True:  # cycle walking: the network permutes 4**half values; repeat until the result is below count
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < count:
            return index


@lru_cache(maxsize=256)
def _round_keys(key: int) -> list[int]:
    return [_mix(key + turn) for turn in range(_ROUNDS)]


@dataclass(frozen=True, eq=False)
class Window:
    """`ids` are length + 1 tokens of a store; the label of position p is ids[p + 1].

    Labels from `count` on only fill the window: the next window counts them, so their loss weight here is 0.
    """

    ids: np.ndarray  # int32 (length + 1,)
    count: int
    weights: np.ndarray | None = None  # float32 (length,): factors for the labels' losses; None: all 1


class Samples(Protocol):
    """Windows by sample number."""

    def __getitem__(self, sample: int) -> Window: ...


class Corpus(Samples, Protocol):
    """The shuffled, endless stream of a store's windows: Windows, or Packed (packed.py)."""

    @property
    def store(self) -> Store: ...
    @property
    def length(self) -> int:
        """Labels of a window."""
        ...

    @property
    def count(self) -> int:
        """Windows per epoch."""
        ...


def place_in_epoch(sample: int, count: int, seed: int) -> int:
    """Which of `count` windows is sample `sample`: every epoch has an order of its own."""
    epoch, index = divmod(sample, count)
    return permute(index, count, _mix(seed) + epoch)


@dataclass(frozen=True)
class Windows:
    """The shuffled, endless stream of a store's windows. Every label counts in at most one window.

    `length` is in tokens. With `aligned`, no window begins inside an audio frame. Raises SodaError if not even one
    window fits.
    """

    store: Store
    length: int
    seed: int
    aligned: bool = False

    def __post_init__(self) -> None:
        shortest = 2 * self.store.space.codebooks - 1
        if self.aligned and self.length < shortest:
            raise SodaError(
                f"data.sequence_length={self.length} is too short for data.align_windows: with "
                f"{self.store.space.codebooks} codebooks it must be at least {shortest}."
            )
        if self.count < 1:
            raise SodaError(
                f"{self.store.path}: its {self.store.size} tokens do not fill one window of {self.length} and its "
                "label: the store is too small. Prepare more data or lower data.sequence_length."
            )

    @property
    def stride(self) -> int:
        """Tokens from one window to the next, before alignment."""
        return self.length - (self.store.space.codebooks - 1 if self.aligned else 0)

    @property
    def count(self) -> int:
        """Windows per epoch: those whose length + 1 tokens all exist."""
        return (self.store.size - 1 - self.length) // self.stride + 1

    def __getitem__(self, sample: int) -> Window:
        """The window that is sample `sample`, counted from the start of training."""
        window = place_in_epoch(sample, self.count, self.seed)
        start = self._start(window)
        return Window(self.store.read(start, self.length + 1), self._start(window + 1) - start)

    def _start(self, window: int) -> int:
        """The first token of a window. Moving back to a frame's first token uses at most what the stride left over."""
        start = window * self.stride
        if not self.aligned:
            return start
        token = int(self.store.read(start, 1)[0])
        known = 0 <= token < len(self._slots)  # the damaged token is also in the window, and the Batcher reports it
        return max(0, start - int(self._slots[token])) if known else start

    @cached_property
    def _slots(self) -> np.ndarray:
        """int8 (ids,): the slot of a frame that an id belongs to; 0 for text and markers."""
        return np.maximum(self.store.space.class_table().astype(np.int8) - 2, 0)
