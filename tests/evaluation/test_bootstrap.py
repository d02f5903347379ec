"""Intervals of figures that few items have."""

import warnings

import numpy as np

from megatron_soda.evaluation.bootstrap import intervals, resampled


def test_a_figure_of_few_items():
    """One of four documents has it: a third of the draws have none of it, and say nothing of it."""
    sums, counts = np.array([[3.0, 0], [4, 0], [5, 7], [1, 0]]), np.array([[3.0, 0], [4, 0], [5, 5], [2, 0]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = resampled(sums, counts)
        found = intervals(draws)
    assert 0.2 < np.isnan(draws[:, 1]).mean() < 0.45  # (3/4)^4 = 0.32
    assert found[1] == (1.4, 1.4)
    assert found[0][0] < 13 / 14 < found[0][1]
