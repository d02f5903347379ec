"""Compares the losses of two runs step by step: BF16 and FP8, say, or two layouts. B minus A, so negative means B is
better.

The table shows the mean gap over the last 10 % of the steps that both logged, for the total loss and each token class,
followed by the largest gap in loss, gradient norms and speed.

    python tools/compare_runs.py runs/bf16 runs/fp8 --out gap.png
"""

import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_soda.errors import SodaError, run_tool
from megatron_soda.files import atomic_path, to_json
from megatron_soda.report.reading import as_dict, read_metrics
from megatron_soda.report.words import finite

console = Console()
Points = dict[int, dict[str, Any]]  # by step


def read_run(run: Path) -> Points:
    """The logged steps with a loss. Raises SodaError if there are none."""
    warnings: list[str] = []
    points, *_ = read_metrics(run / "metrics.jsonl", warnings)
    for warning in warnings:
        print(f"{run}: {warning}", file=sys.stderr)
    found = {int(point["step"]): point for point in points if finite(point.get("loss")) is not None}
    if not found:
        raise SodaError(f"{run}: no metrics.jsonl with losses. Give a run folder written by `soda train`.")
    return found


def compare(a: Points, b: Points) -> dict[str, Any]:
    """Everything that is printed. Raises SodaError if the runs have no step in common."""
    steps = sorted(a.keys() & b.keys())
    if not steps:
        raise SodaError(
            f"the runs have no logged step in common: steps {min(a)} to {max(a)}, and {min(b)} to {max(b)}. "
            "Log both at the same steps (logging.log_every)."
        )
    last = steps[-max(1, -(-len(steps) // 10)) :]
    gaps = {step: b[step]["loss"] - a[step]["loss"] for step in steps}
    largest = max(steps, key=lambda step: abs(gaps[step]))
    names = list(dict.fromkeys(name for step in last for name in as_dict(a[step].get("nll"))))
    classes = {name: pair(a, b, last, "nll", name) for name in names}
    return {
        "steps": len(steps),
        "last_steps": [last[0], last[-1]],
        "loss": pair(a, b, last, "loss"),
        "classes": {name: found for name, found in classes.items() if found},
        "largest_gap": {"step": largest, "gap": gaps[largest]},
        "grad_norm": pair(a, b, last, "grad_norm"),
        "tokens_per_second": [speed(a), speed(b)],
    }


def pair(a: Points, b: Points, steps: list[int], *path: str) -> dict[str, float] | None:
    """Means of a value over the steps where both runs have it, and their gap; None if there are no such steps."""
    both = [(value(a[step], path), value(b[step], path)) for step in steps]
    whole = [(x, y) for x, y in both if x is not None and y is not None]
    if not whole:
        return None
    mean_a, mean_b = (statistics.fmean(values) for values in zip(*whole, strict=True))
    return {"a": mean_a, "b": mean_b, "gap": mean_b - mean_a}


def value(point: dict[str, Any], path: tuple[str, ...]) -> float | None:
    found: Any = point
    for key in path:
        found = as_dict(found).get(key)
    return finite(found)


def speed(points: Points) -> float | None:
    """The median, without the first line, which includes startup, if there are more."""
    found = [finite(points[step].get("tokens_per_second")) for step in sorted(points)]
    speeds = [x for x in (found[1:] or found) if x is not None]
    return statistics.median(speeds) if speeds else None


def draw(a: Points, b: Points, names: tuple[str, str], path: Path) -> None:
    """Plots both losses, and the gap below them."""
    steps = sorted(a.keys() & b.keys())
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    losses, gap = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for points, name, style in zip((a, b), names, ("-", "--"), strict=True):
        losses.plot(sorted(points), [points[step]["loss"] for step in sorted(points)], style, label=name, linewidth=1.2)
    losses.set_ylabel("loss, nats")
    losses.legend()
    gap.axhline(0, color="0.6", linewidth=0.8)
    gap.plot(steps, [b[step]["loss"] - a[step]["loss"] for step in steps], color="C3", linewidth=1.2)
    gap.set_ylabel(f"{names[1]} - {names[0]}")
    gap.set_xlabel("step")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format=path.suffix[1:] or "png")


def main(
    run_a: Annotated[Path, typer.Argument(help="a run folder")],
    run_b: Annotated[Path, typer.Argument(help="another")],
    out: Annotated[Path | None, typer.Option(help="plot of the losses and the gap: .png, .svg or .pdf")] = None,
) -> None:
    """Print a table and one JSON line that show how far the losses of RUN_B are from those of RUN_A.

    python tools/compare_runs.py runs/bf16 runs/fp8 --out gap.png
    """
    if out is not None and out.suffix not in (".png", ".svg", ".pdf"):
        raise SodaError(f"--out {out}: the plot must be a .png, .svg or .pdf")
    a, b = read_run(run_a), read_run(run_b)
    found = compare(a, b)
    first, last = found["last_steps"]
    table = Table(f"mean of steps {first} to {last}", "A", "B", "B - A", caption=f"A: {run_a}   B: {run_b}")
    rows = {"loss": found["loss"], **found["classes"], "gradient norm": found["grad_norm"]}
    for name, row in rows.items():
        if row:
            table.add_row(name, f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['gap']:+.4f}")
    of_a, of_b = found["tokens_per_second"]
    if of_a and of_b:
        table.add_row("tokens/s, median", f"{of_a:,.0f}", f"{of_b:,.0f}", f"{of_b / of_a:.2f} x")
    console.print(table)
    worst = found["largest_gap"]
    console.print(f"{found['steps']} steps in common; largest gap {worst['gap']:+.4f} at step {worst['step']}")
    if out is not None:
        draw(a, b, (run_a.name or "A", run_b.name or "B"), out)
        console.print(f"picture: {out}")
    print(to_json({"a": str(run_a), "b": str(run_b), **found}))


if __name__ == "__main__":
    run_tool(main)
