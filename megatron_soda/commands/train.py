"""`soda train`."""

from pathlib import Path

import typer

from .arguments import Overrides, Target

EXAMPLES = (
    "soda train examples/quickstart/recipe.yaml training.steps=20",
    "bash examples/pretrain/launch.sh recipe.yaml parallel.tensor=2",
)


def command(recipe: Target, overrides: Overrides = None) -> None:
    """Train in one process, resuming from the newest checkpoint. For more processes use launch.sh (see below)."""
    from ..train import run

    path = Path(recipe)
    if path.is_dir():
        raise typer.Exit(run(str(path / "recipe.yaml"), overrides or [], path))
    raise typer.Exit(run(recipe, overrides or []))
