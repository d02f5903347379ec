"""Which corpus and window sample n is: a pure function of the stages and n, so nothing is stored.

A stage repeats a table of 65,536 samples over which the corpora are spread evenly in proportion to their shares, so any
prefix is within a few samples of the shares. Each corpus is used in its own order throughout all stages, so when the
shares change no window is lost or repeated.
"""

import difflib
import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from ..errors import SodaError
from .windows import Corpus, Window

_PERIOD = 1 << 16


@dataclass(frozen=True)
class Stage:
    """Shares of the samples from `first_sample` on. They sum to 1; a corpus that is not listed has share 0."""

    first_sample: int
    shares: dict[str, float]


class Mixture:
    """An endless stream of windows drawn from several corpora.

    A run that continues from sample `start` of another run with different shares passes that run's `consumed(start)`,
    so that each corpus continues where it was. With the same stages, the same samples follow.

    Raises SodaError for invalid shares or stages, and for corpora with different vocabularies.
    """

    def __init__(
        self,
        corpora: dict[str, Corpus],
        stages: list[Stage],
        start: int = 0,
        consumed: dict[str, int] | None = None,
    ) -> None:
        _check_corpora(corpora)
        _check_stages(stages, list(corpora), start)
        self.corpora, self.start = corpora, start
        self.length = next(iter(corpora.values())).length
        before = dict.fromkeys(corpora, 0) | (consumed or {})
        self._gone = {name: count for name, count in before.items() if name not in corpora}
        self._names = sorted(corpora)  # the order of the recipe's keys must not affect the samples
        self._stages: list[tuple[int, _Table, np.ndarray]] = []  # first sample, table, earlier samples of each corpus
        counts = np.array([before[name] for name in self._names], np.int64)  # at the start of the stage, or at `start`
        for stage, following in zip(stages, [*stages[1:], None], strict=True):
            if following and following.first_sample <= start:
                continue  # over before this run began
            table = _Table([stage.shares.get(name, 0.0) for name in self._names])
            # A table keeps the order of its stage even if the run begins in the middle of it: then the stage began at
            # `counts` less what would have been drawn since (below 0, if other shares were drawn there).
            counts = counts - table.counts(max(0, start - stage.first_sample))
            self._stages.append((stage.first_sample, table, counts))
            if following:
                counts = counts + table.counts(following.first_sample - stage.first_sample)

    def __str__(self) -> str:
        windows = sum(corpus.count for corpus in self.corpora.values())
        return f"{windows:,} windows of {self.length} in {len(self.corpora)} corpora"

    def locate(self, sample: int) -> tuple[str, int]:
        """A sample's corpus, and its index among that corpus's samples, counted from 0 over all of training."""
        first, table, before = self._stage(sample)
        corpus, index = table.locate(sample - first)
        return self._names[corpus], int(before[corpus]) + index

    def __getitem__(self, sample: int) -> Window:
        name, index = self.locate(sample)
        return self.corpora[name][index]

    def consumed(self, sample: int) -> dict[str, int]:
        """How many of the first `sample` samples come from each corpus, including corpora no longer in the mix."""
        first, table, before = self._stage(sample)
        counts = before + table.counts(sample - first)
        return dict(zip(self._names, counts.tolist(), strict=True)) | self._gone

    def _stage(self, sample: int) -> tuple[int, "_Table", np.ndarray]:
        if sample < self.start:
            raise IndexError(f"sample {sample} was drawn before this mixture began, at sample {self.start}")
        return self._stages[bisect_right(self._stages, sample, key=lambda stage: stage[0]) - 1]


class _Table:
    """The order of corpora that a stage repeats: sample j of a corpus's q per period is at (j + 1/2) / q of the
    period."""

    def __init__(self, shares: list[float]) -> None:
        self.quotas = _quotas(np.array(shares, np.float64))
        firsts = np.cumsum(self.quotas) - self.quotas
        corpus = np.repeat(np.arange(len(shares)), self.quotas)
        ordinal = np.arange(_PERIOD) - firsts[corpus]
        order = np.argsort((ordinal + 0.5) / self.quotas[corpus], kind="stable")
        self.corpus = corpus[order].astype(np.uint16)  # (_PERIOD,)
        self.ordinal = ordinal[order].astype(np.int32)  # (_PERIOD,): earlier samples of the same corpus in the period

    def locate(self, place: int) -> tuple[int, int]:
        """The corpus at a position in the stage, and the number of its earlier samples in the stage."""
        periods, place = divmod(place, _PERIOD)
        corpus = int(self.corpus[place])
        return corpus, periods * int(self.quotas[corpus]) + int(self.ordinal[place])

    def counts(self, places: int) -> np.ndarray:
        """int64 (corpora,): samples of each corpus among the stage's first `places`."""
        periods, places = divmod(places, _PERIOD)
        return periods * self.quotas + np.bincount(self.corpus[:places], minlength=len(self.quotas))


def _quotas(shares: np.ndarray) -> np.ndarray:
    """int64 (corpora,): samples per period by the largest remainder method; a positive share gets at least one."""
    wanted = shares / shares.sum() * _PERIOD
    quotas = np.maximum(np.floor(wanted), shares > 0).astype(np.int64)
    left = _PERIOD - int(quotas.sum())
    if left > 0:
        quotas[np.argsort(quotas - wanted, kind="stable")[:left]] += 1
    for _ in range(-left):  # those raised to one took more than was left
        quotas[quotas.argmax()] -= 1
    return quotas


def _check_corpora(corpora: dict[str, Corpus]) -> None:
    if not corpora:
        raise SodaError("no corpora to draw samples from. Name their stores in data.corpora.")
    (first, windows), *others = corpora.items()
    for _, other in others:
        other.store.check_space(windows.store.space, f"corpus {first} ({windows.store.path})")
    for what in ("codec", "tokenizer"):
        made_by: dict[str, str] = {}
        for name, corpus in corpora.items():
            if fingerprint := corpus.store.meta.get(what):  # text has no codec
                made_by.setdefault(fingerprint, name)
        if len(made_by) > 1:
            names = ", ".join(f"{name} by {fingerprint}" for fingerprint, name in made_by.items())
            raise SodaError(
                f"data.corpora: their ids were made by different {what}s ({names}), so one id means different things. "
                f"Prepare them with the same {what}."
            )
    if len({w.length for w in corpora.values()}) > 1:
        raise ValueError("the corpora have windows of different lengths")


def _check_stages(stages: list[Stage], names: list[str], start: int) -> None:
    if not stages:
        raise SodaError("data.mix is empty. Give the shares of the corpora from the first step on.")
    if stages[0].first_sample > start:
        raise SodaError(
            f"data.mix[0] begins at sample {stages[0].first_sample}, after the run's first sample, {start}. "
            "It must begin there or earlier (from_step: 0)."
        )
    for i in range(1, len(stages)):
        before, here = stages[i - 1].first_sample, stages[i].first_sample
        if here <= before:
            raise SodaError(
                f"data.mix[{i}] begins at sample {here}, not after data.mix[{i - 1}], which begins at {before}. "
                "Sort the stages by from_step, without repeats."
            )
    for i, stage in enumerate(stages):
        _check_shares(stage.shares, names, f"data.mix[{i}].shares")


def _check_shares(shares: dict[str, float], names: list[str], where: str) -> None:
    for name, share in shares.items():
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, 0.4)
            hint = f"Did you mean {near[0]}?" if near else f"The corpora are {', '.join(names)}."
            raise SodaError(f"{where}: no corpus is called {name}. {hint}")
        if not (math.isfinite(share) and share >= 0):
            raise SodaError(f"{where}: {name} has share {share}. A share is a number from 0 to 1.")
    total = math.fsum(shares.values())
    if total == 0:
        raise SodaError(f"{where}: no corpus has a share above 0. Give shares that sum to 1.")
    if abs(total - 1) > 1e-6:
        normalised = ", ".join(f"{name}: {share / total:.10g}" for name, share in shares.items())
        raise SodaError(f"{where} sum to {total:.10g}, not to 1. Normalised, they are {{{normalised}}}")
