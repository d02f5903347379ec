"""What the commands share: their arguments, and how their help shows examples."""

from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe (.yaml) or a run folder.")]
ModelTarget = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, an exported model, or a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe settings.")]


def examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)
