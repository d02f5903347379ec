"""Results of an ablation by value: means over the seeds, and their standard deviations."""

import csv
import io
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SodaError
from ..files import reading
from ..isoflop.results import RESULTS
from .plan import Plan

_NOT_MEASURED = ("flops", "params_total", "tokens", "seed", "steps", "passes", "wall_seconds", "device_seconds")


@dataclass
class Table:
    values: list[str]
    cells: dict[str, dict[str, list[float]]]  # by measure and value: one number per seed
    notes: list[str]  # runs without a result

    def mean(self, measure: str, value: str) -> float:
        return statistics.fmean(self.cells[measure][value])

    def deviation(self, measure: str, value: str) -> float:
        """Of the runs, from seed to seed. nan for one seed."""
        found = self.cells[measure][value]
        return statistics.stdev(found) if len(found) > 1 else math.nan


def read_table(plan: Plan) -> Table:
    """Raises SodaError if no run of the plan has a result."""
    path = Path(plan.study.folder) / RESULTS
    if not path.is_file():
        raise SodaError(f"{path}: no such file. Train the study's runs first: soda ablate run {plan.study.source}")
    with reading(path, "not valid JSON lines"):
        rows: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        by_run = {str(row["run"]): row for row in rows}
    table = Table([], {}, [f"run {run.id}: no result" for run in plan.runs if run.id not in by_run])
    for run in plan.runs:
        if run.id not in by_run:
            continue
        if run.value not in table.values:
            table.values.append(run.value)
        for measure, number in _measures(by_run[run.id]).items():
            table.cells.setdefault(measure, {}).setdefault(run.value, []).append(number)
    if not table.values:
        raise SodaError(f"{path}: holds no result of {plan.study.source}'s runs")
    return table


def _measures(row: dict[str, Any]) -> dict[str, float]:
    """`loss`, the classes of the NLL vector with the codebooks joined, bits a second, and what the suites gave."""
    nll = {name: float(value) for name, value in row["nll"].items() if isinstance(value, int | float)}
    codebooks = [value for name, value in nll.items() if name.startswith("acoustic_")]
    found = {"loss": float(row["loss"])} | {k: v for k, v in nll.items() if not k.startswith("acoustic_")}
    if codebooks:
        found["acoustic"] = statistics.fmean(codebooks)
    for name, value in row.items():
        if name not in (*_NOT_MEASURED, *found) and isinstance(value, float) and math.isfinite(value):
            found[name] = value
    return found


def to_lines(table: Table) -> list[str]:
    """One line per measure and value: mean, deviation, seeds, and the difference from the first value."""
    width = max(22, *(len(value) + 2 for value in table.values))
    lines = [f"{'':<{width}}{'mean':>10}{'sd':>10}{'seeds':>7}{'- first':>10}{'+-':>10}"]
    for measure, cells in table.cells.items():
        lines.append(measure.replace("_", " "))
        first = next(iter(cells))
        for value, found in cells.items():
            line = f"  {value:<{width - 2}}{statistics.fmean(found):>10.4f}{_figure(table.deviation(measure, value))}"
            line += f"{len(found):>7}"
            if value != first:
                line += f"{table.mean(measure, value) - table.mean(measure, first):>+10.4f}"
                line += _figure(_error(cells[first], found))
            lines.append(line)
    return [*lines, *(f"warning: {note}" for note in table.notes)]


def _error(first: list[float], second: list[float]) -> float:
    """Half of the 95 % interval of a difference of means (Welch)."""
    if len(first) < 2 or len(second) < 2:
        return math.nan
    from scipy.stats import ttest_ind

    interval = ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    return float(interval.high - interval.low) / 2


def _figure(value: float) -> str:
    return f"{value:>10.4f}" if math.isfinite(value) else f"{'':>10}"


def to_csv(table: Table) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["measure", "value", "seeds", "mean", "sd"])
    for measure, cells in table.cells.items():
        for value, found in cells.items():
            deviation = table.deviation(measure, value)
            shown = f"{deviation:.6g}" if math.isfinite(deviation) else ""
            writer.writerow([measure, value, len(found), f"{table.mean(measure, value):.6g}", shown])
    return text.getvalue()
