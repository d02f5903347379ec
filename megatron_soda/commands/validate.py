"""`soda validate`."""

from typing import Annotated

import typer

from ..errors import SodaError
from .arguments import Overrides
from .resolve import find_stores, resolve

EXAMPLES = (
    "soda validate runs/quickstart",
    "soda validate recipe.yaml data.path=/data/stores",
    "soda validate /data/stores/yodas2-en/train",
)


def command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE|RUN|STORE", help="A recipe, a run folder, or one store.")],
    overrides: Overrides = None,
) -> None:
    """Check token stores: intact files, ids in range, every document legal and unique. Exit status 1 if not. Of a
    recipe, also check that its settings for speed go together, and, if it evaluates while training, that its
    suites can be measured."""
    from ..data.validate import SIDES, validate

    found = find_stores(recipe)
    if found and overrides:
        raise SodaError(f"{' '.join(overrides)}: settings only apply to a recipe or a run, not to stores")
    if found:
        raise typer.Exit(0 if validate(found[0], found[1] or SIDES) else 1)
    whole = resolve(recipe, overrides or [])
    names = ["valid"] if whole.data.corpora else SIDES
    if not validate(whole.data_folder, names, whole.data.corpora):
        raise typer.Exit(1)
    from ..parallel.speed import check_speed

    check_speed(whole)
    if whole.evaluate.every:
        from ..evaluation.during import check

        check(whole)
