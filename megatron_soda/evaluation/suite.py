"""What an evaluation suite is. Each is one class in one file of suites/, marked `@SUITES.register`, and nothing else
has to change: the recipe, `soda evaluate` and the page find it through the registry.

A suite's file imports torch, transformers and the rest of the engine inside its methods only.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class Row:
    """One figure of a result, for the command's table and for the page."""

    name: str
    value: Any  # a number; the page leaves out a row whose value is damaged
    label: str = ""  # the name as the page shows it; empty: `name`
    count: Any = None  # how many things the value is a mean over
    baseline: Any = None  # the same figure of something trivial; lower is better
    small: tuple[Any, Any] = (None, None)  # value and baseline in `Suite.small_unit`
    of: Any = None  # the largest possible value: an int for counts, 1.0 for shares
    meaning: str = ""
    total: bool = False  # summarises other rows


class Suite(ABC):
    """A measurement of an exported model."""

    name: ClassVar[str]  # in recipes and eval.json; the file's name
    title: ClassVar[str]
    about: ClassVar[str]  # what the figures mean, for someone who has not read the paper
    # What must be there before anything is measured: attributes of `Bench`. The model always is.
    needs: ClassVar[tuple[Literal["data", "codec"], ...]] = ()
    unit: ClassVar[str] = ""  # of values and baselines
    small_unit: ClassVar[str] = ""
    counted: ClassVar[str] = ""  # what `Row.count` counts
    against: ClassVar[str] = ""  # what `Row.baseline` is of; empty: rows have no baseline
    glossary: ClassVar[tuple[str, str] | None] = None  # a question about the rows, and its answer, folded on the page
    absent: ClassVar[str] = ""  # shown on the page if there is no result; empty: the page leaves the suite out

    @abstractmethod
    def measure(self, bench: Any) -> dict[str, Any]:
        """bench: evaluation.bench.Bench. Returns what eval.json keeps under the suite's name."""

    @abstractmethod
    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        """The figures of what `measure` returned, perhaps in an earlier version."""

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """What the page lists below the rows."""
        return {}
