"""Which rows of the embedding and of the head each tensor-parallel rank holds.

Every rank holds an equal share of the text (with the markers) and of each codebook, so all ranks have work whatever the
grammar allows at a position. megatron-core cuts a table into equal ranges of rows, so rows are numbered rank by rank:
the ids of rank 0 in ascending order, its padding, the ids of rank 1, and so on. Only the model numbers them this way:
stores, checkpoints and exports are in the order of ids. On a single rank, a row's number is its id.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..vocab import TokenSpace

VOCAB_DIVISOR = 128  # tables are padded to a multiple of this times the tensor-parallel size
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


def padded_size(space: TokenSpace, ranks: int) -> int:
    divisor = VOCAB_DIVISOR * ranks
    return -(-space.size // divisor) * divisor


class Rows:
    """How the rows of a table are dealt out to `ranks` tensor-parallel ranks. `local`: rows of each, with padding."""

    def __init__(self, space: TokenSpace, ranks: int = 1) -> None:
        self.space, self.ranks = space, ranks
        self.local = padded_size(space, ranks) // ranks

    def blocks(self, rank: int) -> list[range]:
        """The ids of a rank: one range of each section, in ascending order.

        Of the first n ids rank r holds (n + r) // ranks, for every n at which a section ends. So the ranks' shares of a
        section differ by at most one row, and so do the sums.
        """
        blocks = []
        for low, high in pairwise(self.space.sections):
            counts = [(high + r) // self.ranks - (low + r) // self.ranks for r in range(rank + 1)]
            start = low + sum(counts[:-1])
            blocks.append(range(start, start + counts[-1]))
        return blocks

    def count(self, rank: int) -> int:
        """Rows of a rank, without padding."""
        return sum(map(len, self.blocks(rank)))

    def ids(self, rank: int) -> np.ndarray:
        """int64 (count,): the id of each row of a rank, ascending."""
        return np.concatenate([np.arange(block.start, block.stop) for block in self.blocks(rank)])

    def of_ids(self) -> Tensor:
        """int64 (space.size,): the number of each id's row."""
        row = torch.empty(self.space.size, dtype=torch.int64)
        for rank in range(self.ranks):
            ids = self.ids(rank)
            row[torch.from_numpy(ids)] = rank * self.local + torch.arange(len(ids))
        return row

    def cut(self, table: Tensor, rank: int) -> Tensor:
        """A table (space.size, width) in the order of ids -> a rank's part of it, (local, width), padded with zeros."""
        return self.join([table[block.start : block.stop] for block in self.blocks(rank)])

    def join(self, blocks: list[Tensor]) -> Tensor:
        """The rows of a rank's blocks -> its part of the table, (local, width), padded with zeros."""
        padding = self.local - sum(map(len, blocks))
        return torch.cat([*blocks, blocks[0].new_zeros(padding, blocks[0].shape[1])])
