"""`soda evaluate`."""

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from .. import __version__
from ..config import Recipe
from ..errors import SodaError
from ..files import check_writable, read_json, write_json
from ..hf.card import update_card
from ..log import log
from ..registry import SUITES
from ..run_folder import record_timing
from .bench import Bench
from .suite import Row, Suite


def evaluate(recipe: Recipe, folder: Path, training: Path | None = None) -> dict[str, Any]:
    """Runs the recipe's suites on the exported model in `folder`; RUN/eval.json holds the results by suite. Earlier
    results from other suites are kept if model and data are the same. Raises SodaError, before anything is measured, if
    something that a suite needs is missing. training: as for Bench.
    """
    began = time.monotonic()
    suites = [SUITES[name] for name in dict.fromkeys(recipe.evaluate.suite)]
    bench = Bench(recipe, folder, training=training)
    for suite in suites:
        suite.check(bench)
    path = Path(recipe.run) / "eval.json"
    check_writable(path.parent)
    result = _carried_over(path, bench.header(with_data=any("data" in suite.needs for suite in suites)))
    for suite in suites:
        result[suite.name] = suite.measure(bench) | {"made_with": made_with(recipe)}
        print("\n".join(table(suite, suite.rows(result[suite.name]))))  # first: the disk may be full by now
        write_json(path, result)
    if not suites:
        write_json(path, result)
    update_card(folder, result)
    record_timing(Path(recipe.run), "evaluate", {"seconds": time.monotonic() - began})
    return result


def made_with(recipe: Recipe) -> dict[str, Any]:
    versions = {"megatron_soda": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {"seed": recipe.seed, **versions}


def _carried_over(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The header, with existing results if model and data are the same."""
    try:
        before = read_json(path, dict) if path.is_file() else {}
    except SodaError as error:  # no reason to discard what is about to be computed
        log.warning(f"{error}; it is rewritten")
        before = {}
    same_model = all(before.get(key) == header[key] for key in ("model", "step", "export"))
    same_data = all(before.get(key, value) == value for key, value in header.items())
    return {**before, **header} if same_model and same_data else header


def table(suite: Suite, rows: list[Row]) -> list[str]:
    """The lines that `soda evaluate` prints: a heading, then one line per row. Empty columns are left out."""
    columns = {suite.counted or "count": [row.count for row in rows]}
    for place, name in enumerate(suite.beside):
        columns[name] = [row.beside[place] if row.beside else None for row in rows]
    columns[suite.unit or "value"] = [row.value for row in rows]
    columns[suite.against or "baseline"] = [row.baseline for row in rows]
    columns["difference"] = [None if row.baseline is None else row.value - row.baseline for row in rows]
    for side, name in enumerate(("from", "to")):
        columns[name] = [None if row.interval is None else row.interval[side] for row in rows]
    columns["of"] = [row.of if isinstance(row.of, int) else None for row in rows]
    shown = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    names = [row.name.replace("_", " ") for row in rows]
    width = max([22, *(len(name) + 1 for name in names)])
    heading = f"{suite.name:<{width}}" + "".join(f"{name:>12}" for name in shown)
    lines = [
        f"{name:<{width}}" + "".join(f"{_figure(cells[i]):>12}" for cells in shown.values())
        for i, name in enumerate(names)
    ]
    return [heading, *lines, ""]


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "" if value is None else f"{value:,}"
