"""`soda ablate`: one recipe, with one thing varied."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..files import write_text
from .arguments import Overrides

if TYPE_CHECKING:
    from ..ablations.plan import Plan

app = typer.Typer(
    help="Ablations: train a recipe with different values of one thing, with several seeds.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
StudyFile = Annotated[Path, typer.Argument(metavar="STUDY", help="An ablation (.yaml), as in examples/ablations.")]


@app.command(epilog="Examples:\n\n  soda ablate plan examples/ablations/text-ratio.yaml")
def plan(study: StudyFile, overrides: Overrides = None) -> None:
    """Show an ablation's runs and what they cost.

    KEY=VALUE settings apply to the recipes of all runs.
    """
    from ..ablations.plan import to_lines

    print("\n".join(to_lines(_load(study, overrides))))


@app.command(
    epilog="Examples:\n\n  soda ablate run examples/ablations/small-text-ratio.yaml --jobs 2\n\n"
    "  soda ablate run study.yaml training.steps=100"
)
def run(
    study: StudyFile,
    overrides: Overrides = None,
    jobs: Annotated[int, typer.Option(min=1, help="How many runs to train at a time.")] = 1,
    collect: Annotated[bool, typer.Option("--collect", help="Only collect the results of runs that are done.")] = False,
) -> None:
    """Prepare an ablation's stores and train its runs. Run it again to resume: what is done is not repeated."""
    from ..studies.run import run_study

    made = _load(study, overrides)
    if made.study.stores and not collect:
        from data_prep.prepare import prepare

        for name in made.study.stores:
            prepare(made.store_of(name))
        made = _load(study, overrides)  # now with the stores' vocabulary
    raise typer.Exit(run_study(made, overrides or [], jobs, collect))


@app.command(
    epilog="Examples:\n\n  soda ablate plot examples/ablations/small-text-ratio.yaml docs/ablations/text-ratio"
)
def plot(
    study: StudyFile, out: Annotated[Path, typer.Argument(metavar="OUTFOLDER", help="The folder to write to.")]
) -> None:
    """Print the results by value, and write them as ablation.csv, ablation.pdf and ablation.png."""
    from ..ablations.plot import plot_table
    from ..ablations.table import read_table, to_csv, to_lines

    made = _load(study, None)
    table = read_table(made)
    print("\n".join(to_lines(table)))
    write_text(out / "ablation.csv", to_csv(table))
    for path in [out / "ablation.csv", *plot_table(table, out, made.study.name)]:
        print(path)


def _load(path: Path, overrides: list[str] | None) -> "Plan":
    from ..ablations.plan import make_plan
    from ..ablations.study import load_ablation

    return make_plan(load_ablation(path), overrides)
