"""Reads the results of a study: from the study itself, or from any CSV or JSON-lines file with the same columns."""

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.fields import near
from ..errors import SodaError
from ..files import reading

NEEDED = ("flops", "params_total", "tokens")
RESULTS = "results.jsonl"  # in a study's folder
_SAME_BUDGET = 1.1  # without a column `budget`, runs whose FLOPs differ by less than this share one


@dataclass(frozen=True)
class Result:
    run: str
    budget: float  # FLOPs asked for
    flops: float  # FLOPs spent
    params: float
    tokens: float
    seed: str
    loss: float  # the measure: nats, or bits a second
    values: dict[str, Any] = field(repr=False, compare=False)  # all columns


@dataclass
class Results:
    path: str
    measure: str
    rows: list[Result]
    notes: list[str]  # what was left out, and why

    def by_budget(self) -> dict[float, list[Result]]:
        budgets: dict[float, list[Result]] = {}
        for row in sorted(self.rows, key=lambda row: (row.budget, row.params)):
            budgets.setdefault(row.budget, []).append(row)
        return budgets


def read_results(
    path: str | Path, measure: str = "loss", planned: Sequence[str] | None = None, study: str = ""
) -> Results:
    """The usable rows. Everything that cannot be used is left out and named in `notes`.

    measure: `loss` (all tokens alike), a class of the NLL vector (`text`, `semantic`, `acoustic_3`), `acoustic` (the
    mean of its codebooks), a weighted mean (`text:1,semantic:2`), or any other column. planned: ids of the study's
    runs, to name those that are missing. study: its name; rows of another one are left out.

    Raises SodaError if no row is usable.
    """
    path = Path(path)
    rows = _read(path)
    if not rows:
        raise SodaError(f"{path}: holds no results")
    columns = list(dict.fromkeys(name for row in rows for name in row if name != "_line"))
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise SodaError(
            f"{path}: no column {', '.join(missing)}. It has: {', '.join(columns)}. A result needs {', '.join(NEEDED)} "
            "(forward and backward FLOPs, all parameters, training tokens) and a loss; rename the columns."
        )
    weights = _parse_measure(measure, columns, path)
    notes: list[str] = []
    rows = _of_one_study(rows, study, notes)
    found = [result for number, row in enumerate(rows, 1) if (result := _result(row, number, weights, notes))]
    results = Results(str(path), measure, _without_duplicates(_with_budgets(found), notes), notes)
    if planned is not None:
        done = {row.run for row in results.rows}
        notes += [f"run {run}: no usable result; the fit goes without it" for run in planned if run not in done]
        notes += [f"run {run}: not in the plan; left out" for run in sorted(done - set(planned))]
        results.rows = [row for row in results.rows if row.run in planned]
    if not results.rows:
        raise SodaError(f"{path}: no usable result.\n" + "\n".join(notes))
    return results


def _read(path: Path) -> list[dict[str, Any]]:
    """The rows as flat mappings; `nll: {text: 1}` becomes `nll_text: 1`. `_line` is where a row was."""
    if path.suffix not in (".csv", ".jsonl"):
        raise SodaError(f"{path}: results are a .csv or .jsonl file, or a study (.yaml)")
    rows: list[dict[str, Any]] = []
    with reading(path, "not valid CSV" if path.suffix == ".csv" else "not valid JSON lines"):
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(text.splitlines())
            return [{**{k: v for k, v in row.items() if k}, "_line": reader.line_num} for row in reader]
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            row: dict[str, Any] = {"_line": number}
            for name, value in json.loads(line).items():
                row |= {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
            rows.append(row)
    return rows


def _parse_measure(measure: str, columns: list[str], path: Path) -> dict[str, float]:
    """Columns with their weights, which sum to 1."""
    weights: dict[str, float] = {}
    for part in measure.split(","):
        name, _, weight = part.strip().partition(":")
        try:
            share = float(weight or 1)
        except ValueError:
            raise SodaError(f"measure {measure!r}: {weight!r} is not a weight; write text:1,semantic:2") from None
        codebooks = [column for column in columns if column.startswith("nll_acoustic_")]
        if name == "acoustic" and codebooks:
            named = codebooks
        else:
            named = [column for column in (f"nll_{name}", name) if column in columns][:1]
        if not named or not share > 0:
            known = ["acoustic"] * bool(codebooks) + [column.removeprefix("nll_") for column in columns]
            hint = near(name, known)
            raise SodaError(f"{path}: measure {measure!r}: no such column.{hint} Known: {', '.join(known)}")
        for column in named:
            weights[column] = weights.get(column, 0) + share / len(named)
    total = sum(weights.values())
    return {column: weight / total for column, weight in weights.items()}


def _of_one_study(rows: list[dict[str, Any]], study: str, notes: list[str]) -> list[dict[str, Any]]:
    """Rows of `study`, or else of the one that most rows belong to. Rows that name none are kept."""
    counts = Counter(str(row["study"]) for row in rows if row.get("study"))
    wanted = study or (counts.most_common(1)[0][0] if counts else "")
    others = [f"{count} of {name}" for name, count in counts.items() if name != wanted]
    if others:
        notes.append(f"rows of other studies are left out: {', '.join(others)}; those of {wanted} are used")
    return [row for row in rows if row.get("study", "") in ("", None, wanted)]


def _result(row: dict[str, Any], number: int, weights: dict[str, float], notes: list[str]) -> Result | None:
    values: dict[str, float] = {}
    for name in (*NEEDED, *weights, *(["budget"] if row.get("budget") else [])):
        try:
            values[name] = float(row.get(name) or "nan")
        except (TypeError, ValueError):
            values[name] = math.nan
        if not (math.isfinite(values[name]) and values[name] > 0):
            notes.append(f"{_where(row)}: {name} is {row.get(name)!r}, not a number above 0; left out")
            return None
    budget = values.get("budget", 0.0)  # 0: to be found from the FLOPs
    loss = sum(weight * values[name] for name, weight in weights.items())
    run, seed = str(row.get("run") or f"row {number}"), str(row.get("seed", ""))
    return Result(run, budget, values["flops"], values["params_total"], values["tokens"], seed, loss, row)


def _with_budgets(rows: list[Result]) -> list[Result]:
    """Fills in budgets where there is no such column: one per cluster of FLOPs."""
    made: list[Result] = []
    start = 0.0
    for row in sorted(rows, key=lambda row: row.flops):
        if not row.budget and row.flops > start * _SAME_BUDGET:
            start = row.flops
        made.append(Result(**{**row.__dict__, "budget": row.budget or start}))
    return made


def _without_duplicates(rows: list[Result], notes: list[str]) -> list[Result]:
    """One row per budget, size and seed. Rows without a seed are repetitions, unless their losses are equal, too."""
    seen: dict[tuple, Result] = {}
    for row in rows:
        key = (row.budget, row.params, row.tokens, row.seed or row.loss)
        if key in seen:
            same = "" if seen[key].loss == row.loss else f", with another loss ({row.loss:g}, not {seen[key].loss:g})"
            notes.append(f"{_where(row.values)}: a second row of {seen[key].run}{same}; left out")
        else:
            seen[key] = row
    return list(seen.values())


def _where(row: dict[str, Any]) -> str:
    return f"line {row['_line']}" + (f" ({row['run']})" if row.get("run") else "")


def short(count: float) -> str:
    """A count with three or four digits and a unit: 10.75B."""
    for limit, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:,.4g}{unit}"
    return f"{count:g}"
