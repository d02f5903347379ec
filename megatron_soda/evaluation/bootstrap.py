"""Confidence intervals by resampling items."""

from collections.abc import Sequence

import numpy as np

RESAMPLES, SEED = 1000, 0
SHARE = 0.95


def resampled(sums: np.ndarray, counts: np.ndarray, groups: Sequence[str] | None = None) -> np.ndarray:
    """float64 (RESAMPLES, figures): sum(sums) / sum(counts), both (items, figures), of items drawn with replacement.
    Items of one group are drawn together. The same items give the same draws, so differences of two results are paired.
    NaN: a draw without any counts, as of a class of tokens that few documents have.
    """
    if groups is not None:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        sums, counts = (_by_group(values, number) for values in (sums, counts))
    rng = np.random.default_rng(SEED)
    n = len(sums)
    found = np.empty((RESAMPLES, sums.shape[1]))
    for row in found:
        drawn = np.bincount(rng.integers(0, n, n), minlength=n).astype(float)
        total = drawn @ counts
        row[:] = np.divide(drawn @ sums, total, out=np.full_like(total, np.nan), where=total != 0)
    return found


def intervals(draws: np.ndarray) -> list[tuple[float, float]]:
    """Of (resamples, figures): the middle SHARE of the draws of each figure that are not NaN."""
    tail = (1 - SHARE) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _by_group(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    found = np.zeros((number.max() + 1, values.shape[1]))
    np.add.at(found, number, values)
    return found
