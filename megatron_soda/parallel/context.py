"""Context parallelism: which tokens of a sequence each rank holds, and what they attend to.

A sequence is cut into twice as many pieces as there are ranks. Rank r holds pieces r and 2 R - 1 - r, so that every
rank has early tokens, which attend to little, and late ones. A single rank holds everything, and nothing is copied.

For our own attention a sequence is a window, for Transformer Engine's a document (partition.py).
"""

from dataclasses import replace

import torch
from megatron.core import parallel_state
from torch import Tensor

from ..data.batch import Batch
from .partition import Part, split


def places(length: int, ranks: int, rank: int, device: torch.device | None = None) -> Tensor:
    """int64 (length / ranks,): the positions in the sequence of the tokens that `rank` holds, in its order."""
    pieces = torch.arange(length, device=device).view(2 * ranks, -1)
    return torch.cat([pieces[rank], pieces[2 * ranks - 1 - rank]])


def part_of_documents(batch: Batch, unit: int, tokens: int = 0) -> Part | None:
    """What this rank holds of a batch of packed documents, in partition.py's terms; None: everything, unpadded."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return None
    return split(batch.cu_seqlens, ranks, parallel_state.get_context_parallel_rank(), unit, tokens)


def cut(batch: Batch, part: Part | None = None) -> Batch:
    """What this rank holds of a batch: `part`, or its places of every window. `cu_seqlens` and `longest` are those of
    the whole batch."""
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    mine = {name: cut_sequences(x, part) for name, x in vars(batch).items() if name not in ("cu_seqlens", "longest")}
    return replace(batch, **mine, **({"cu_seqlens": part.cu_seqlens, "longest": part.longest} if part else {}))


def cut_sequences(x: Tensor, part: Part | None = None) -> Tensor:
    """(sequences, length) -> (sequences, length / ranks), this rank's places; with `part`, (1, its tokens)."""
    ranks = parallel_state.get_context_parallel_world_size()
    if ranks == 1:
        return x
    if part is not None:
        return part.of(x)
    return x[:, places(x.shape[1], ranks, parallel_state.get_context_parallel_rank(), x.device)]


def attention_mask(segment_id: Tensor) -> Tensor:
    """Segments (batch, length) of whole sequences -> bool (batch, 1, queries, keys): causal, within the document.

    Queries are this rank's; keys are all ranks', in the order in which they are gathered.
    """
    ranks, length = parallel_state.get_context_parallel_world_size(), segment_id.shape[1]
    if ranks == 1:
        queries = keys = torch.arange(length, device=segment_id.device)
    else:
        of_rank = [places(length, ranks, r, segment_id.device) for r in range(ranks)]
        queries, keys = of_rank[parallel_state.get_context_parallel_rank()], torch.cat(of_rank)
    same = segment_id[:, queries, None] == segment_id[:, None, keys]
    return (same & (keys[None] <= queries[:, None]))[:, None]
