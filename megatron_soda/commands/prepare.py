"""`soda prepare`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaError
from .arguments import Overrides, Target
from .resolve import resolve

EXAMPLES = (
    "soda prepare examples/quickstart/recipe.yaml",
    "soda prepare recipe.yaml prepare.speech=/data/my_speech prepare.workers=8",
    "soda prepare recipe.yaml 'prepare.speech=/data/tars/*.tar' prepare.layout=webdataset --dry-run",
)


def command(
    recipe: Target,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only estimate: utterances, hours, tokens, disk.")] = False,
) -> None:
    """Turn speech and text into token stores (RUN/data). Finished work is skipped."""
    from data_prep.prepare import prepare

    if (Path(recipe) / "soda.json").is_file():  # where its recipe keeps data is not for a model to say
        raise SodaError(f"{recipe}: a model; give a recipe or a run folder")
    prepare(resolve(recipe, overrides or []), dry_run)
