"""`soda prepare`."""

from typing import Annotated

import typer

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

    prepare(resolve(recipe, overrides or []), dry_run)
