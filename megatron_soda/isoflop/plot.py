"""Figures of a study's fits: PDF and PNG for a paper, and one HTML page that needs nothing else."""

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator
from scipy.stats import spearmanr

from ..errors import SodaError
from ..files import atomic_path, reading, write_text
from ..report.plots import GRID, INK, MUTED, Chart, inline
from .fit import METHODS, Fit, to_dict, to_lines
from .results import short

PAGE = "isoflop.html"
_WIDE = (7.0, 2.9)  # inches: a figure across both columns of a page
_FEWEST = 3  # runs with a score
_COLUMNS = 3  # of panels with scores
_SIZES = {"params": "parameters", "tokens": "training tokens"}


@dataclass
class Style:
    """Colours of all that is not data."""

    ink: str = "#000000"
    muted: str = "#444444"
    grid: str = "#dddddd"


@dataclass
class Scores:
    """Downstream scores of the runs, by column."""

    values: dict[str, dict[str, float]] = field(default_factory=dict)  # column: run: score


def read_scores(path: Path, fit: Fit) -> Scores:
    """A CSV with the column `run` and one per score. Raises SodaError if fewer than three runs of the fit have any."""
    with reading(path, "not valid CSV"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8-sig").splitlines()))
    if not rows or "run" not in rows[0] or len(rows[0]) < 2:
        raise SodaError(f"{path}: scores are a CSV with the column run and one column per score")
    known = {row.run for row in fit.results.rows}
    scores = Scores()
    for name in rows[0]:
        if name in ("run", None):
            continue
        found = {row["run"]: _number(row[name]) for row in rows if row["run"] in known}
        found = {run: value for run, value in found.items() if math.isfinite(value)}
        if len(found) >= _FEWEST:
            scores.values[name] = found
    if not scores.values:
        raise SodaError(
            f"{path}: no column has a score for {_FEWEST} runs of {fit.results.path}, whose runs are called "
            f"{', '.join(sorted(known)[:3])}, .."
        )
    return scores


def _number(text: Any) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def plot_study(fit: Fit, folder: Path, scores: Scores | None = None) -> list[Path]:
    """Writes NAME.pdf and NAME.png for every figure, and the page. Returns their paths."""
    made: list[Path] = []
    figures = _figures(fit, scores or Scores())
    for name, (_, size, draw) in figures.items():
        with matplotlib.rc_context({"font.size": 8, "pdf.fonttype": 42, "text.parse_math": False}):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure, Style())
            formats: dict[str, dict[str, Any]] = {"pdf": {"metadata": {"CreationDate": None}}, "png": {"dpi": 200}}
            for suffix, options in formats.items():
                made.append(folder / f"{name}.{suffix}")
                with atomic_path(made[-1]) as temporary:
                    figure.savefig(temporary, format=suffix, **options)
                figure.set_layout_engine("none")  # done, and slow
    made.append(folder / PAGE)
    write_text(made[-1], _page(fit, figures))
    return made


Draw = Callable[[Figure, Style], None]


def _figures(fit: Fit, scores: Scores) -> dict[str, tuple[str, tuple[float, float], Draw]]:
    """By name: what the figure shows, in words, its size in inches, and how it is drawn."""
    measure = fit.results.measure
    figures: dict[str, tuple[str, tuple[float, float], Draw]] = {
        "curves": (
            f"The measure ({measure}) of every run against its size, with a parabola and its minimum for each budget. "
            "Dashed: a parabola without a bracketed minimum.",
            _WIDE,
            lambda figure, style: _draw_curves(figure, style, fit),
        ),
        "optima": (
            "The minima against their cost, with the line of approach 2 and its 95 % band, and the lines of approach "
            "3 (dashed: projection, dotted: Huber).",
            _WIDE,
            lambda figure, style: _draw_optima(figure, style, fit),
        ),
    }
    if fit.surfaces:
        figures["residuals"] = (
            "What is left of every run after approach 3 (projection): any trend is an error of the formula.",
            _WIDE,
            lambda figure, style: _draw_residuals(figure, style, fit),
        )
    if scores.values:
        rows = -(-len(scores.values) // _COLUMNS)
        figures["scores"] = (
            f"Downstream scores against the measure ({measure}), with Spearman's rank correlation.",
            (7.0, 2.5 * rows),
            lambda figure, style: _draw_scores(figure, style, fit, scores),
        )
    return figures


def _colours(fit: Fit) -> dict[float, str]:
    """By budget, dark to light."""
    budgets = sorted({row.budget for row in fit.results.rows})
    shades = np.linspace(0.2, 0.75, len(budgets))
    return {
        budget: to_hex(matplotlib.colormaps["viridis"](shade)) for budget, shade in zip(budgets, shades, strict=True)
    }


def _draw_curves(figure: Figure, style: Style, fit: Fit) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    colours = _colours(fit)
    for panel, approach, of in zip(axes, (fit.params, fit.tokens), _SIZES, strict=True):
        for curve in approach.curves:
            colour = colours[curve.budget]
            label = f"{curve.budget:.2g}"
            panel.plot(np.exp(curve.x), curve.y, "o", color=colour, markersize=2.5, label=label)
            if not len(curve.coefficients):
                continue
            x = np.linspace(curve.x.min(), curve.x.max(), 100)
            panel.plot(np.exp(x), curve.at(x), "--" if curve.problem else "-", color=colour, linewidth=1)
            if not curve.problem:
                panel.plot(curve.optimum, curve.lowest, "*", color=style.ink, markersize=5, zorder=4)
        _dress(panel, style, _SIZES[of], fit.results.measure if of == "params" else "")
    axes[1].legend(title="FLOPs", fontsize=6, title_fontsize=6, frameon=False, labelcolor=style.ink)
    axes[1].get_legend().get_title().set_color(style.ink)


def _draw_optima(figure: Figure, style: Style, fit: Fit) -> None:
    costs = [curve.cost for curve in fit.params.curves]
    grid = np.geomspace(min(costs) / 2, max(costs) * 5, 60)
    shade = to_hex(matplotlib.colormaps["viridis"](0.5))
    approaches = zip(figure.subplots(1, 2), (fit.params, fit.tokens), _SIZES, strict=True)
    for index, (panel, approach, of) in enumerate(approaches):
        good = [curve for curve in approach.curves if not curve.problem]
        panel.plot([c.cost for c in good], [c.optimum for c in good], "o", color=style.ink, markersize=3.5, zorder=4)
        if approach.line:
            line = approach.line
            panel.plot(grid, [line.at(c) for c in grid], color=shade, linewidth=1.4)
            spans = [line.interval_at(c) for c in grid]
            if spans[0] is not None:
                panel.fill_between(grid, *zip(*spans, strict=True), color=shade, alpha=0.2, linewidth=0)
            label = f"C^{line.exponent:.3f}"
            if span := line.interval():
                label += f" [{span[0]:.3f}, {span[1]:.3f}]"
            panel.set_title(label, fontsize=8, color=style.ink)
        for method, dashes in zip(METHODS, ("--", ":"), strict=True):
            surface = fit.surfaces.get(method)
            if surface and not surface.problem:
                best = [surface.optimum(c)[index] for c in grid]
                panel.plot(grid, best, dashes, color=style.muted, linewidth=1)
        panel.set_yscale("log")
        _dress(panel, style, "FLOPs", f"optimal {_SIZES[of]}")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0e}".replace("e+", "e")))
        _log_ticks(panel.yaxis, *panel.get_ylim())


def _draw_residuals(figure: Figure, style: Style, fit: Fit) -> None:
    surface, colours = fit.surfaces["projection"], _colours(fit)
    for panel, of in zip(figure.subplots(1, 2, sharey=True), _SIZES, strict=True):
        panel.axhline(0, color=style.muted, linewidth=0.8)
        for row in fit.results.rows:
            left = row.loss - float(surface.loss(row.params, row.tokens))
            panel.plot(getattr(row, of), left, "o", color=colours[row.budget], markersize=3)
        _dress(panel, style, _SIZES[of], "residual" if of == "params" else "")


def _draw_scores(figure: Figure, style: Style, fit: Fit, scores: Scores) -> None:
    colours = _colours(fit)
    panels = figure.subplots(-(-len(scores.values) // _COLUMNS), _COLUMNS, squeeze=False).flatten()
    for panel, (name, values) in zip(panels, scores.values.items(), strict=False):
        rows = [row for row in fit.results.rows if row.run in values]
        for row in rows:
            panel.plot(row.loss, values[row.run], "o", color=colours[row.budget], markersize=3)
        panel.set_title(f"rank correlation {rank_correlation(fit, values):+.2f}, {len(rows)} runs", fontsize=8)
        panel.title.set_color(style.ink)
        _dress(panel, style, fit.results.measure, name, log=False)
    for panel in panels[len(scores.values) :]:
        panel.set_visible(False)


def rank_correlation(fit: Fit, values: dict[str, float]) -> float:
    """Spearman's, between the measure and a score."""
    rows = [row for row in fit.results.rows if row.run in values]
    found: Any = spearmanr([row.loss for row in rows], [values[row.run] for row in rows])
    return float(found.statistic)


def _dress(axes: Axes, style: Style, x: str, y: str, log: bool = True) -> None:
    if log:
        axes.set_xscale("log")
        _log_ticks(axes.xaxis, *axes.get_xlim())
    axes.set_xlabel(x, color=style.ink)
    axes.set_ylabel(y, color=style.ink)
    axes.grid(color=style.grid, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=style.muted, labelcolor=style.ink, length=2, which="both")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(style.muted)


def _log_ticks(axis: Axis, low: float, high: float) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())
    if high / low < 100:  # few powers of ten
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        axis.set_ticks([tick for tick in ticks if low <= tick <= high])
        axis.set_minor_locator(NullLocator())


# ---- the page


def _page(fit: Fit, figures: dict[str, tuple[str, tuple[float, float], Draw]]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = short
    return environment.get_template("page.html").render(
        fit=to_dict(fit),
        title=Path(fit.results.path).stem,
        figures=[(name, told, _svg(name, told, size, draw)) for name, (told, size, draw) in figures.items()],
        summary="\n".join(line for line in to_lines(fit) if not line.startswith("warning: ")).strip(),
        rows=sorted(fit.results.rows, key=lambda row: (row.budget, row.params)),
    )


def _svg(name: str, told: str, size: tuple[float, float], draw: Draw) -> str:
    """The figure in the page's own colours."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "text.parse_math": False,
        "font.size": 8,
    }
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure, Style(INK, MUTED, GRID))
        buffer = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    chart = Chart(told, [], size=(round(size[0] * 72), round(size[1] * 72)))
    return inline(buffer.getvalue(), chart, name)
