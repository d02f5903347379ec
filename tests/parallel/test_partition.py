"""Which tokens a context-parallel rank holds of packed documents. What is computed with them: test_te_spec.py."""

import numpy as np
import pytest
import torch

from megatron_soda.parallel.partition import padded_tokens, split


def of_lengths(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def test_two_documents_by_hand():
    """Of 5 and 3 tokens, padded to 8 and 4, in four pieces each; and 4 tokens that fill the batch up."""
    parts = [split(of_lengths(5, 3), 2, rank, 16) for rank in (0, 1)]
    assert parts[0].index.tolist() == [0, 1, -1, -1, 5, -1, -1, -1]
    assert parts[1].index.tolist() == [2, 3, 4, -1, 6, 7, -1, -1]
    for part in parts:
        assert part.cu_seqlens.tolist() == [0, 8, 12, 16]
        assert part.cu_seqlens.dtype == torch.int32
        assert part.longest == 8
    assert parts[1].of(torch.arange(10.0, 18).view(2, 4)).tolist() == [[12, 13, 14, 0, 16, 17, 0, 0]]
    assert split(of_lengths(5, 3), 2, 0, 4).cu_seqlens.tolist() == [0, 8, 12]
    assert split(of_lengths(5, 3), 2, 0, 16, tokens=48).cu_seqlens.tolist() == [0, 8, 12, 48]


def test_the_order_of_transformer_engine():
    """The example in its description of the dual-chunk order: positions in sequences of 8, 8, 8 and 16, on 4 ranks."""
    starts = of_lengths(8, 8, 8, 16)
    position = torch.cat([torch.arange(length) for length in starts.diff().tolist()])
    assert [position[split(starts, 4, rank, 8).index].tolist() for rank in range(4)] == [
        [0, 7, 0, 7, 0, 7, 0, 1, 14, 15],
        [1, 6, 1, 6, 1, 6, 2, 3, 12, 13],
        [2, 5, 2, 5, 2, 5, 4, 5, 10, 11],
        [3, 4, 3, 4, 3, 4, 6, 7, 8, 9],
    ]


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_all_tokens_are_there_once_and_ranks_have_as_many(ranks):
    rng = np.random.default_rng(ranks)
    for _ in range(20):
        lengths = rng.integers(1, 40, rng.integers(1, 30)).tolist()
        starts, unit = of_lengths(*lengths), 16 * ranks
        parts = [split(starts, ranks, rank, unit) for rank in range(ranks)]
        index = torch.stack([part.index for part in parts])  # of one size
        assert index[index >= 0].sort().values.tolist() == list(range(sum(lengths)))
        padded = -(-np.array(lengths) // (2 * ranks)) * 2 * ranks
        assert index.numel() == padded_tokens(starts, ranks, unit) == -(-padded.sum() // unit) * unit
        sequences = parts[0].cu_seqlens.diff().tolist()
        assert sequences[: len(lengths)] == padded.tolist()
        assert parts[0].longest == max(sequences)
