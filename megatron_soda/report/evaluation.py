"""The results section: the rows of every suite, as a table against a baseline or as bars."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.suite import Row, Suite
from ..registry import SUITES
from . import plots
from .reading import as_dict, as_list
from .samples import clip_or_reason
from .words import finite, flatten


def by_suite(run: Path, evaluation: dict[str, Any], warnings: list[str]) -> dict[str, dict[str, Any]]:
    """The parts of the page by suite: first those in eval.json, in its order, then those without a result."""
    names = [name for name in evaluation if name in SUITES]
    names += [name for name in SUITES.names() if name not in names]
    return {
        name: part(SUITES[name], as_dict(evaluation.get(name)), warnings)
        | {"shown": shown(run / "evaluate", as_dict(as_dict(evaluation.get(name)).get("shown")))}
        for name in names
    }


def part(suite: Suite, result: dict[str, Any], warnings: list[str]) -> dict[str, Any]:
    """What the page shows for one suite. A result that the suite itself cannot read becomes a warning."""
    rows, rest = [], result
    try:
        if result:
            rows, rest = suite.rows(result), suite.rest(result)
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        warnings.append(
            f"eval.json: its part “{suite.name}” is damaged and not shown ({type(error).__name__}: {error})."
        )
        rows, rest = [], {}
    return {
        "suite": suite,
        "rows": compared(rows) if suite.against else shares(rows, suite.beside),
        "more": flatten(rest),
    }


def shown(folder: Path, items: dict[str, Any]) -> list[dict[str, Any]]:
    """The worst and the best items of a suite, with their texts and sounds."""
    found = []
    for which, listed in items.items():
        for item in map(as_dict, as_list(listed)):
            texts = [(str(key), str(value)) for key, value in item.items() if value and isinstance(value, str)]
            clips = [(str(key), clip_or_reason(folder, str(name))) for key, name in as_dict(item.get("audio")).items()]
            sounds = [(key, plots.wav_uri(clip)) for key, clip in clips if isinstance(clip, plots.Clip)]
            problems = [clip for _, clip in clips if isinstance(clip, str)]
            found.append({"which": str(which), "texts": texts, "sounds": sounds, "problems": problems})
    return found


def compared(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows of a table against the baseline. `change` is the value minus the baseline, negative if better; percents are
    bar lengths."""
    values = [value for row in rows for value in (finite(row.value), finite(row.baseline)) if value is not None]
    return [compared_row(row, max(values, default=1.0) or 1.0) for row in rows]


def compared_row(row: Row, top: float) -> dict[str, Any]:
    value, baseline = finite(row.value), finite(row.baseline)
    small, small_baseline = map(finite, row.small)
    return {
        "name": row.name,
        "label": row.label or row.name,
        "count": row.count,
        "total": row.total,
        "value": value,
        "baseline": baseline,
        "change": difference(value, baseline),
        "interval": interval(row),
        "small": small,
        "small_baseline": small_baseline,
        "small_change": difference(small, small_baseline),
        "percent": percent(value, top),
        "baseline_percent": percent(baseline, top),
    }


def shares(rows: list[Row], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Counts and shares with bars, other figures without. Values that are not numbers are left out."""
    found = []
    for row in rows:
        if (value := finite(row.value)) is None:
            continue
        of = finite(row.of)
        fits = of is not None and 0 <= value <= of
        found.append(
            {
                "name": row.name,
                "label": row.label or row.name,
                "meaning": row.meaning,
                "beside": []
                if not row.beside
                else [
                    (name, value)
                    for name, value in zip(names, map(finite, row.beside), strict=True)
                    if value is not None
                ],
                "count": row.count,
                "value": row.value,
                "interval": interval(row),
                "of": row.of if fits and isinstance(row.of, int) else None,
                "percent": percent(value, of) if fits and of else None,
            }
        )
    return found


def interval(row: Row) -> tuple[float, float] | None:
    low, high = map(finite, row.interval or (None, None))
    return None if low is None or high is None else (low, high)


def percent(value: float | None, top: float) -> float | None:
    return None if value is None else max(0.0, 100 * value / top)


def difference(value: float | None, baseline: float | None) -> float | None:
    return None if value is None or baseline is None else value - baseline


def likelihood(nll: dict[str, Any]) -> dict[str, Any]:
    """The NLL suite's rows as used by the header and the charts: `classes`, and the two totals by name."""
    totals = {row["name"]: row for row in nll["rows"] if row["total"]}
    classes = [row for row in nll["rows"] if not row["total"]]
    return {"classes": classes, "all": totals.get("all"), "acoustic_mean": totals.get("acoustic_mean")}
