"""`soda convert-store`."""

from pathlib import Path
from typing import Annotated

import typer

from .resolve import find_stores, resolve

EXAMPLES = (
    "soda convert-store runs/quickstart/data/train compact",
    "soda convert-store runs/quickstart compact",
    "soda convert-store data/train megatron --out /scratch/train",
    "soda convert-store runs/quickstart compact --out /scratch/data",
)


def command(
    target: Annotated[str, typer.Argument(metavar="STORE|RUN", help="A store, without suffix, or all three of a run.")],
    format: Annotated[str, typer.Argument(metavar="compact|megatron", help="The format that is wanted.")],
    out: Annotated[
        Path | None, typer.Option(metavar="STORE|FOLDER", help="Keep what is there; write another one, ready to train.")
    ] = None,
) -> None:
    """Change the format of token stores: compact (a third of the size) or megatron (.bin/.idx). Nothing is lost."""
    from ..data.convert import convert_stores

    folder, names = find_stores(target) or (resolve(target, []).data_folder, [])
    convert_stores(folder, names, format, out)
