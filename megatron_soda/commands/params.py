"""`soda params`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..config import load_recipe
from .arguments import Overrides
from .resolve import resolve

EXAMPLES = ("soda params 135m", "soda params isoflop-1024 --json", "soda params examples/pretrain/4b.yaml")


def command(
    model: Annotated[str, typer.Argument(metavar="PRESET|RECIPE|RUN", help="A preset's name, a recipe or a run.")],
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Count parameters and FLOPs per token without allocating the weights."""
    from ..model.size import sizes, space_of

    is_path = model.endswith((".yaml", ".yml")) or Path(model).is_dir()
    preset = {"model": {"preset": model}}
    recipe = resolve(model, overrides or []) if is_path else load_recipe(None, overrides or [], preset)
    space = space_of(recipe)
    size = sizes(recipe.model, space, recipe.data.sequence_length)
    if as_json:
        print(json.dumps({"model": recipe.model.preset, "vocabulary": space.size, **size}))
    else:
        print(f"{recipe.model.preset}, {space.size:,} ids, windows of {recipe.data.sequence_length}")
        for name, value in size.items():
            print(f"  {name.replace('_', ' '):<22}{value:>22,}")
