"""`soda isoflop`: scaling-law studies."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SodaError
from ..files import write_json, write_text
from .arguments import Overrides

if TYPE_CHECKING:
    from ..isoflop.results import Results

app = typer.Typer(
    help="Scaling laws: plan, run, fit and plot a study of many small models.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="A study (.yaml), as in examples/isoflop.")]


@app.command(
    epilog="Examples:\n\n  soda isoflop plan examples/isoflop/paper.yaml\n\n"
    "  soda isoflop plan examples/isoflop/paper.yaml --csv plan.csv"
)
def plan(
    study: StudyFile,
    overrides: Overrides = None,
    csv: Annotated[Path | None, typer.Option(help="Also write the runs to this file.")] = None,
    recipes: Annotated[Path | None, typer.Option(help="Also write a recipe per run to this folder.")] = None,
) -> None:
    """Show a study's runs: sizes, batch, learning rate, steps, and what they cost.

    KEY=VALUE settings apply to the recipes of all runs.
    """
    from ..isoflop.plan import make_plan, to_csv, to_lines, write_recipes
    from ..isoflop.study import load_study

    made = make_plan(load_study(study), overrides)
    print("\n".join(to_lines(made)))
    if csv:
        write_text(csv, to_csv(made))
    if recipes:
        write_recipes(made, recipes)


@app.command(
    epilog="Examples:\n\n  soda isoflop run study.yaml\n\n  soda isoflop run study.yaml --jobs 2 data.path=my/data\n\n"
    "  soda isoflop run study.yaml --collect"
)
def run(
    study: StudyFile,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs to train at a time.")] = 1,
    collect: Annotated[bool, typer.Option("--collect", help="Only collect the results of runs that are done.")] = False,
) -> None:
    """Train a study's runs; results go to its folder. Run it again to resume: what is done is not repeated."""
    from ..isoflop.plan import make_plan
    from ..isoflop.study import load_study
    from ..studies.run import run_study

    raise typer.Exit(run_study(make_plan(load_study(study), overrides), overrides or [], jobs, collect))


ResultsFile = Annotated[
    Path, typer.Argument(metavar="RESULTS", help="A study (.yaml) that has run, or a .csv or .jsonl of results.")
]
Measure = Annotated[
    str, typer.Option(help="loss, text, semantic, acoustic, acoustic_3, .., text:1,semantic:2, or any column.")
]


@app.command(
    epilog="Examples:\n\n  soda isoflop fit study.yaml --budget 1e21 --measure semantic\n\n"
    "  soda isoflop fit results.csv --model 4.374e9:500e9 --out fit.json\n\n"
    "  soda isoflop fit study.yaml --up-to 1e20"
)
def fit(
    results: ResultsFile,
    measure: Measure = "loss",
    budget: Annotated[list[str] | None, typer.Option(help="Predict the optimum at these FLOPs.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="PARAMETERS:TOKENS: how far from the optimum it is.")] = None,
    up_to: Annotated[
        str,
        typer.Option(metavar="FLOPS", help="Fit only budgets up to this, and predict the others."),
    ] = "",
    out: Annotated[Path | None, typer.Option(help="Also write everything to this JSON file.")] = None,
) -> None:
    """Fit scaling laws: parabolas for every budget (approach 2) and a surface over all runs (approach 3)."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before scipy: on small matrices threads only wait
    from ..isoflop import held_out
    from ..isoflop.fit import fit_study, to_dict, to_lines

    budgets = [_numbers(text, 1, "--budget", "1e21")[0] for text in budget or []]
    pairs = [_numbers(text, 2, "--model", "4.374e9:500e9") for text in model or []]
    models = [(params, tokens) for params, tokens in pairs]
    found, above = _load_results(results, measure), []
    if up_to:
        found, above = held_out.split(found, _numbers(up_to, 1, "--up-to", "1e21")[0])
    made = fit_study(found)
    print("\n".join(to_lines(made, budgets, models)))
    compared = held_out.compare(made, above) if above else None
    if compared:
        print("\n".join(held_out.to_lines(compared)))
    if out:
        write_json(out, to_dict(made, budgets, models) | ({"held_out": compared} if compared else {}))


@app.command(
    epilog="Examples:\n\n  soda isoflop plot study.yaml plots\n\n"
    "  soda isoflop plot results.csv plots --scores scores.csv"
)
def plot(
    results: ResultsFile,
    out: Annotated[Path, typer.Argument(metavar="OUTFOLDER", help="The folder to write to.")],
    measure: Measure = "loss",
    scores: Annotated[
        Path | None, typer.Option(help="CSV with the column run and downstream scores, to plot against the loss.")
    ] = None,
) -> None:
    """Plot a study's fits: PDF and PNG figures, and one HTML page."""
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from ..isoflop.fit import fit_study
    from ..isoflop.plot import plot_study, read_scores

    made = fit_study(_load_results(results, measure))
    for path in plot_study(made, out, read_scores(scores, made) if scores else None):
        print(path)


def _load_results(path: Path, measure: str) -> "Results":
    from ..isoflop.results import RESULTS, read_results

    if path.suffix not in (".yaml", ".yml"):
        return read_results(path, measure)
    from ..isoflop.plan import make_plan
    from ..isoflop.study import load_study

    plan = make_plan(load_study(path))
    found = Path(plan.study.folder) / RESULTS
    if not found.is_file():
        raise SodaError(f"{found}: no such file. Train the study's runs first: soda isoflop run {path}")
    return read_results(found, measure, [run.id for run in plan.runs], plan.study.name)


def _numbers(text: str, count: int, option: str, example: str) -> tuple[float, ...]:
    parts = text.split(":")
    try:
        numbers = tuple(float(part) for part in parts)
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(0 < number < float("inf") for number in numbers):
        raise SodaError(f"{option} {text}: write it as {example}")
    return numbers
