"""Which window is sample n: a pure function of (seed, n), so nothing is stored, shared or built.

Window i of a store is its tokens [length * i, length * i + length), and one token more as the last label. An epoch
is a permutation of the windows, by a Feistel network; each epoch has a permutation of its own.
"""

from dataclasses import dataclass

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
    mask = (1 << half) - 1
    while True:  # cycle walking: the network permutes 4**half values; step until we are back below count
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + turn)) & mask)
        index = left << half | right
        if index < count:
            return index


@dataclass(frozen=True)
class Windows:
    """The shuffled, endless stream of windows of a store."""

    store: Store
    length: int
    seed: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise SodaError(
                f"{self.store.path}: {self.store.size} tokens do not fill one window of {self.length} and its label. "
                "Prepare more data or lower data.sequence_length."
            )

    @property
    def count(self) -> int:
        return (self.store.size - 1) // self.length

    def __getitem__(self, sample: int):
        """int32 (length + 1,): the tokens of sample `sample`, counted from the start of training."""
        epoch, index = divmod(sample, self.count)
        window = permute(index, self.count, _mix(self.seed) + epoch)
        return self.store.read(window * self.length, self.length + 1)
