"""Defines evaluation suites. Each is one class in one file in suites/, marked `@SUITES.register`. Nothing else has to
change: the recipe, `soda evaluate` and the page find it through the registry.

A suite's file imports torch, transformers and the rest of the engine only inside its methods.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Row:
    """One figure from a result, for the command's table and for the page."""

    name: str
    value: Any  # a number; the page leaves out a row whose value is damaged
    label: str = ""  # the name shown on the page; empty: `name`
    count: Any = None  # number of items the value is a mean over
    baseline: Any = None  # the same figure for a trivial baseline; lower is better
    small: tuple[Any, Any] = (None, None)  # value and baseline in `Suite.small_unit`
    of: Any = None  # the maximum possible value: an int for counts, 1.0 for shares
    beside: tuple[Any, ...] = ()  # the same figure for what `Suite.beside` names
    interval: tuple[Any, Any] | None = None  # 95 %: of the value minus the baseline, without one of the value
    meaning: str = ""
    total: bool = False  # summarises other rows


def row_of_gain(name: str, label: str, row: Mapping[str, Any], total: bool) -> Row:
    """Of an NLL given the right condition against one given a wrong one: tokens, right_nats, wrong_nats, gain_low,
    gain_high."""
    right, wrong = row["right_nats"], row["wrong_nats"]
    return Row(
        name,
        right,
        label=label,
        count=row["tokens"],
        baseline=wrong,
        small=(right / math.log(2), wrong / math.log(2)),
        interval=(-row["gain_high"], -row["gain_low"]),
        total=total,
    )


def figures_of(suite: "Suite", result: Mapping[str, Any]) -> dict[str, float]:
    """A result as one number a row, by SUITE_ROW: the value, or where there is a baseline, baseline - value, which is
    what was gained."""
    return {
        f"{suite.name}_{row.name}": row.value if row.baseline is None else row.baseline - row.value
        for row in suite.rows(result)
        if isinstance(row.value, int | float)
    }


class Suite(ABC):
    """A measurement of an exported model."""

    name: ClassVar[str]  # used in recipes and eval.json; also the file name
    title: ClassVar[str]
    about: ClassVar[str]  # what the figures mean, for readers who do not know the paper
    # What must exist before anything is measured: attributes of `Bench`. The model always does.
    needs: ClassVar[tuple[Literal["data", "utterances", "codec"], ...]] = ()
    unit: ClassVar[str] = ""  # unit of values and baselines
    small_unit: ClassVar[str] = ""
    counted: ClassVar[str] = ""  # what `Row.count` counts
    against: ClassVar[str] = ""  # what `Row.baseline` refers to; empty: rows have no baseline
    beside: ClassVar[tuple[str, ...]] = ()  # columns before the value
    glossary: ClassVar[tuple[str, str] | None] = None  # a question about the rows and its answer, collapsed on the page
    absent: ClassVar[str] = ""  # shown on the page if there is no result; empty: the page omits the suite

    def check(self, bench: Any) -> None:
        """Called for every suite before anything is measured. Raises SodaError if something is missing."""
        for need in self.needs:
            getattr(bench, need)

    @abstractmethod
    def measure(self, bench: Any) -> dict[str, Any]:
        """bench: evaluation.bench.Bench. Returns what eval.json stores under the suite's name."""

    @abstractmethod
    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        """The figures in what `measure` returned, possibly in an earlier version."""

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the page lists below the rows."""
        return {}
