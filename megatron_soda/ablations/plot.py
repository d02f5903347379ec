"""A panel for every measure of an ablation: dots for the seeds, a line through their means. PDF and PNG."""

import re
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..files import atomic_path
from .table import Table

_COLUMNS = 3


def plot_table(table: Table, folder: Path, title: str) -> list[Path]:
    """Writes ablation.pdf and ablation.png and returns their paths."""
    made: list[Path] = []
    measures = list(table.cells)
    rows = -(-len(measures) // _COLUMNS)
    with matplotlib.rc_context({"font.size": 8, "pdf.fonttype": 42, "text.parse_math": False}):
        figure = Figure(figsize=(7.5, 2.1 * rows + 0.3), layout="constrained")
        figure.suptitle(title, fontsize=9)
        panels = figure.subplots(rows, _COLUMNS, squeeze=False).flatten()
        for panel, measure in zip(panels, measures, strict=False):
            _panel(panel, table, measure)
        for panel in panels[len(measures) :]:
            panel.set_visible(False)
        for suffix in ("pdf", "png"):
            made.append(folder / f"ablation.{suffix}")
            options: dict[str, Any] = {"metadata": {"CreationDate": None}} if suffix == "pdf" else {"dpi": 200}
            with atomic_path(made[-1]) as temporary:
                figure.savefig(temporary, format=suffix, **options)
    return made


def _panel(panel: Axes, table: Table, measure: str) -> None:
    cells = table.cells[measure]
    numbers = _numbers(list(cells))
    at = numbers or list(range(len(cells)))
    for x, found in zip(at, cells.values(), strict=True):
        panel.plot([x] * len(found), found, "o", color="#2b6cb0", markersize=2.5, alpha=0.6)
    means = [table.mean(measure, value) for value in cells]
    panel.plot(at, means, "-" if numbers else "_", color="#2b6cb0", linewidth=1, markersize=14)
    if not numbers:
        panel.set_xticks(at, list(cells), rotation=30, ha="right")
    panel.set_title(measure.replace("_", " "), fontsize=8)
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    for side, spine in panel.spines.items():
        spine.set_visible(side in ("left", "bottom"))


def _numbers(values: list[str]) -> list[float]:
    """The values as numbers (`2.5`, `10 %`); empty if one of them is something else."""
    found = [re.fullmatch(r"(-?\d+(?:\.\d+)?)\s*%?", value) for value in values]
    return [float(match[1]) for match in found if match] if all(found) else []
