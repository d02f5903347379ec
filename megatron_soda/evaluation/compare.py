"""`soda compare`: the differences between two results of `soda evaluate`, with paired intervals.

A suite that can be compared keeps `items`: for every figure a sum and a count per item, so that a figure is
sum(sums) / sum(counts); and `must_match`: what has to be the same in both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SodaError
from ..files import read_json, reading
from ..registry import SUITES
from .bootstrap import intervals, resampled
from .pair_files import some


@dataclass(frozen=True)
class Difference:
    """One figure in both results, and the 95 % interval of second - first over items."""

    suite: str
    task: str  # empty: all of it
    figure: str
    items: int
    first: float
    second: float
    low: float
    high: float


def compare(first: Path, second: Path) -> tuple[list[Difference], list[str]]:
    """The differences, and for each suite that cannot be compared why. SodaError for a file that is not a result."""
    results = [read_json(path, dict) for path in (first, second)]
    found: list[Difference] = []
    refused: list[str] = []
    for name in SUITES.names():
        there = [isinstance(result.get(name), Mapping) for result in results]
        if not any(there):
            continue
        if not all(there):
            missing = second if there[0] else first
            refused.append(f"{name}: {missing} has no result; run: soda evaluate MODEL suite=[{name}]")
            continue
        one, other = (result[name] for result in results)
        with reading(f"{first} or {second}", f"its part {name} is damaged"):
            if why := _why_not(one, other):
                refused.append(f"{name}: {why}")
            else:
                found += list(_differences(name, one["items"], other["items"]))
    if not found and not refused:
        raise SodaError(f"{first} and {second}: no suite has a result in either of them")
    return found, refused


def _why_not(one: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """None if the two results of a suite can be compared."""
    for side, result in (("first", one), ("second", other)):
        if "items" not in result or "must_match" not in result:
            return f"the {side} result has no items to pair: this suite keeps none, or an earlier version made it"
    a, b = one["must_match"], other["must_match"]
    for key in {**a, **b}:
        if a.get(key) != b.get(key):
            return f"measured differently: {key} is {a.get(key)} in the first and {b.get(key)} in the second"
    names = [result["items"]["names"] for result in (one, other)]
    if names[0] != names[1]:
        only = sorted(set(names[0]) ^ set(names[1]))
        return (
            f"{len(only)} items are in one result only, such as {some(only)}: the models' contexts differ, or one "
            "evaluation had fewer documents"
        )
    return None


def _differences(suite: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Iterator[Difference]:
    groups, tasks = one.get("groups"), np.array(one.get("tasks", [""] * len(one["names"])))
    figures = [figure for figure in one["figures"] if figure in other["figures"]]
    sums, counts = (
        [np.array([items["figures"][figure][part] for figure in figures], float).T for items in (one, other)]
        for part in ("sums", "counts")
    )
    for task in ["", *sorted(set(tasks.tolist()) - {""})]:
        chosen = (tasks == task) | (task == "")
        of_task = None if groups is None else [group for group, some in zip(groups, chosen, strict=True) if some]
        draws = [resampled(s[chosen], c[chosen], of_task) for s, c in zip(sums, counts, strict=True)]
        values = [s[chosen].sum(0) / c[chosen].sum(0) for s, c in zip(sums, counts, strict=True)]
        for number, (low, high) in enumerate(intervals(draws[1] - draws[0])):
            before, after = float(values[0][number]), float(values[1][number])
            yield Difference(suite, task, figures[number], int(chosen.sum()), before, after, low, high)


def table(found: list[Difference]) -> list[str]:
    """The lines that `soda compare` prints."""
    lines: list[str] = []
    for number, one in enumerate(found):
        if not number or found[number - 1].suite != one.suite:
            heads = ("items", "first", "second", "difference", "from", "to")
            lines += ["", f"{one.suite:<36}" + "".join(f"{head:>12}" for head in heads)]
        name = f"{one.task}: {one.figure}" if one.task else one.figure
        figures = (one.first, one.second, one.second - one.first, one.low, one.high)
        lines.append(f"{name.replace('_', ' '):<36}{one.items:>12,}" + "".join(f"{value:>12.4f}" for value in figures))
    return [*lines[1:], ""]
