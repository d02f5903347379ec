"""What Transformer Engine computes of packed sequences that are split between context-parallel ranks, in plain torch.

Rank r of R holds chunks r and 2 R - 1 - r of each sequence. The real one passes keys and values around, chunk by chunk,
and adds up what each contributes; here every rank has them all first. Nothing here is of megatron_soda.
"""

from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn import functional


def positions(length: int, ranks: int, rank: int) -> Tensor:
    """In a sequence, of the tokens that a rank holds. AssertionError if it cannot be split."""
    if length % (2 * ranks):
        raise AssertionError(f"a sequence of {length} tokens does not have {2 * ranks} equal chunks")
    chunk = length // (2 * ranks)
    early, late = range(rank * chunk, (rank + 1) * chunk), range(length - (rank + 1) * chunk, length - rank * chunk)
    return torch.tensor([*early, *late], dtype=torch.int64)


def attend(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, group: dist.ProcessGroup, scale: float
) -> Tensor:
    """(tokens of this rank, heads, head_dim) each -> (tokens, heads * head_dim). cu_seqlens are of whole sequences."""
    ranks, rank, tokens = dist.get_world_size(group), dist.get_rank(group), len(query)
    if int(cu_seqlens[-1]) != ranks * tokens:
        raise AssertionError(f"cu_seqlens end at {int(cu_seqlens[-1])}; {ranks} ranks have {tokens} tokens each")
    everyones = [gather_from_sequence_parallel_region(x, True, group).view(ranks, *x.shape) for x in (key, value)]
    found = []
    for start, end in pairwise(cu_seqlens.tolist()):
        own = slice(start // ranks, end // ranks)
        place = [positions(end - start, ranks, r) for r in range(ranks)]
        order = torch.cat(place).argsort()
        k, v = (x[:, own].flatten(0, 1)[order].transpose(0, 1)[None] for x in everyones)
        seen = torch.arange(end - start) <= place[rank][:, None]
        context = functional.scaled_dot_product_attention(
            query[own].transpose(0, 1)[None], k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        found.append(context[0].transpose(0, 1).flatten(1))
    return torch.cat(found)
