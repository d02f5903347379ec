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
    target: Annotated[str, typer.Argument(metavar="STORE|RUN", help="A store (path without suffix), or a run.")],
    format: Annotated[str, typer.Argument(metavar="compact|megatron", help="The format to convert to.")],
    out: Annotated[
        Path | None, typer.Option(metavar="STORE|FOLDER", help="Keep the original; write a copy, ready for training.")
    ] = None,
) -> None:
    """Convert token stores to the compact format (a third of the size) or to megatron (.bin/.idx), without loss."""
    from ..data.convert import convert_stores

    folder, names = find_stores(target) or (resolve(target, []).data_folder, [])
    convert_stores(folder, names, format, out)
