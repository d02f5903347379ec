"""Which rows of the head a position needs: those of the tokens that the grammar allows there.

Inside a frame that is one codebook of 144,644 rows, so a softmax over them costs a fraction, and it is exact: the
likelihood of a document, given that it is a legal one. Positions that need the same rows are computed together, as one
dense product over the range of rows that holds them; what else is in the range is masked.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..data.batch import Batch
from ..errors import SodaError
from ..vocab import FIRST_CODE, TEXT, Grammar
from .rows import Rows


@dataclass
class Piece:
    """Positions of a micro-batch, and the rows of the head they need."""

    index: Tensor | None  # int64 (positions,), into the flattened micro-batch; None: all of it
    width: int  # the most rows that a rank computes for them; chunks are cut by it, the same on every rank
    low: int  # this rank's are its own rows [low, high)
    high: int
    illegal: Tensor | None = None  # int64, counted from `low`: rows in between that do not compete
    others: Tensor | None = None  # int64: this rank's rows of a sample of those that are not legal
    one_in: float = 1.0  # row of them


class LegalRows:
    """For one tensor-parallel rank: of what the grammar allows, the rows that it holds.

    `slots`: the codes of a frame in every kind of store that is trained on (vocab.Grammar). Where a window cannot show
    whether text is bare or in a span, or frames have one code or all, rows of either are allowed.
    """

    def __init__(
        self, rows: Rows, slots: set[int], rank: int = 0, device: torch.device | str = "cpu", one_in: int = 0
    ) -> None:
        space = rows.space
        kinds = space.kind_table()
        allowed = np.logical_or.reduce([Grammar(space, n).following() for n in slots])
        sets, group = np.unique(allowed.reshape(-1, allowed.shape[-1]), axis=0, return_inverse=True)
        self.n_kinds = FIRST_CODE + space.codebooks
        self.kinds = torch.from_numpy(kinds.astype(np.int64)).to(device)
        self.group = torch.from_numpy(group.reshape(allowed.shape[:2])).to(device)
        self.allowed = torch.from_numpy(sets).to(device)
        of_rank = [kinds[rows.ids(r)] for r in range(rows.ranks)]
        self.sets = [_piece([np.flatnonzero(of_set[k]) for k in of_rank], rank, device) for of_set in sets]
        self.ids = torch.from_numpy(rows.ids(rank)).to(device)
        self.one_in, self.width_of_others = one_in, rows.local // one_in + 1 if one_in else 0
        self.others: dict[tuple[int, int], Tensor] = {}  # by set and turn

    def groups(self, batch: Batch) -> Tensor:
        """int64 (sequences, length), of whole sequences: which set of rows a position needs. SodaError for a label that
        is not in it and has a weight."""
        kinds = self.kinds[batch.tokens]
        place = torch.arange(kinds.shape[1], device=kinds.device).where(kinds != TEXT, -1).cummax(1).values
        context = torch.where(place >= 0, kinds.gather(1, place.clamp(min=0)), self.n_kinds)
        group = self.group[context, (kinds == TEXT).long()]
        wrong = ~self.allowed[group, self.kinds[batch.labels]] & (batch.loss_weight != 0)
        if wrong.any():
            sequence, place = wrong.nonzero()[0].tolist()
            raise SodaError(
                f"a window of the store has token {int(batch.labels[sequence, place])} after token "
                f"{int(batch.tokens[sequence, place])}, where the grammar does not allow it. `soda validate` shows "
                "where the store is damaged; training.head_rows=all trains on it as it is."
            )
        return group

    def pieces(self, group: Tensor, weight: Tensor, turn: int | None = None) -> list[Piece]:
        """Of flattened positions (positions,): those with a weight, by the rows they need. Waits for the device.

        turn: the sample of rows that are not legal; None: no sample.
        """
        counted = group.where(weight != 0, len(self.sets))
        order = counted.argsort(stable=True)
        counts = torch.bincount(counted, minlength=len(self.sets) + 1).tolist()[:-1]
        parts = order[: sum(counts)].split(counts)
        return [
            self._with_others(replace(of_set, index=part), number, turn)
            for number, (part, of_set) in enumerate(zip(parts, self.sets, strict=True))
            if len(part)
        ]

    def turn(self, batch: Batch) -> int | None:
        """Which sample a batch takes: by its tokens alone, so the same at every layout."""
        if not self.one_in:
            return None
        return int((batch.tokens * 2654435761 + batch.position_id * 97).sum() % self.one_in)

    def _with_others(self, piece: Piece, number: int, turn: int | None) -> Piece:
        if turn is None:
            return piece
        if (number, turn) not in self.others:
            sampled = (self.ids % self.one_in == turn) & ~self.allowed[number][self.kinds[self.ids]]
            self.others[number, turn] = sampled.nonzero()[:, 0]
        width = piece.width + self.width_of_others
        return replace(piece, width=width, others=self.others[number, turn], one_in=self.one_in)


def _piece(legal: list[np.ndarray], rank: int, device: torch.device | str) -> Piece:
    """The legal rows of every rank, ascending -> the piece of one of them."""
    width = max(int(rows[-1] - rows[0] + 1) if len(rows) else 1 for rows in legal)
    mine = legal[rank]
    if not len(mine):
        return Piece(None, width, 0, 0)
    low, high = int(mine[0]), int(mine[-1]) + 1
    illegal = np.setdiff1d(np.arange(low, high), mine) - low
    return Piece(None, width, low, high, torch.from_numpy(illegal).to(device) if len(illegal) else None)
