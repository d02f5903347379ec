"""How Transformer Engine splits packed documents between context-parallel ranks.

Every document is cut into twice as many pieces as there are ranks, and rank r holds pieces r and 2 R - 1 - r of each.
So documents are padded to a multiple of 2 R tokens, at their ends, where causal attention keeps the padding from every
real token. It has no loss, and to Transformer Engine it is tokens like all others: its kernels need not write rows
between sequences, and a NaN left in one would reach the gradients of the weights.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Part:
    """What a rank holds of a batch."""

    index: Tensor  # int64 (tokens,): places in the flattened batch, in the order of the rank; -1: padding
    cu_seqlens: Tensor  # int32 (sequences + 1,): where the padded documents of the whole batch start, and its end
    longest: int  # tokens of the longest of them

    def of(self, x: Tensor) -> Tensor:
        """(sequences, length) of the whole batch -> (1, tokens) of this rank; 0 for padding."""
        return torch.where(self.index >= 0, x.reshape(-1)[self.index.clamp(min=0)], 0)[None]


def padded_tokens(cu_seqlens: Tensor, ranks: int, unit: int) -> int:
    """Of the whole batch, a multiple of `unit`; int32 (documents + 1,): where documents start, and the end."""
    each = 2 * ranks
    return -(-int((-(-cu_seqlens.diff() // each) * each).sum()) // unit) * unit


def split(cu_seqlens: Tensor, ranks: int, rank: int, unit: int, tokens: int = 0) -> Part:
    """`unit`, a multiple of 2 * ranks, divides the tokens of the batch; `tokens`: it has at least so many. A document
    of padding alone fills it up."""
    device, cu_seqlens = cu_seqlens.device, cu_seqlens.cpu().long()  # the sizes are needed here anyway
    each, lengths = 2 * ranks, cu_seqlens.diff()
    piece = -(-lengths // each)
    filler = max(padded_tokens(cu_seqlens, ranks, unit), tokens) // each - int(piece.sum())
    if filler:
        piece, lengths = torch.cat([piece, torch.tensor([filler])]), torch.cat([lengths, torch.tensor([0])])
    ends = (each * piece).cumsum(0)
    document = torch.arange(len(piece)).repeat_interleave(2 * piece)
    own_start, size = (ends // ranks - 2 * piece)[document], piece[document]
    place = torch.arange(len(document)) - own_start  # in this rank's two pieces, then in the document
    place += torch.where(place < size, rank, 2 * (ranks - 1) - rank) * size
    index = torch.where(place < lengths[document], cu_seqlens[document] + place, -1)
    starts = torch.cat([torch.tensor([0]), ends]).int()
    return Part(index.to(device), starts.to(device), each * int(piece.max()))
