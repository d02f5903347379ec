"""`soda inspect`."""

from pathlib import Path
from typing import Annotated

import typer

EXAMPLES = (
    "soda inspect runs/quickstart/data/train",
    "soda inspect runs/quickstart/data/test --document 17 --audio heard/",
)


def command(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="A store (path without suffix).")],
    document: Annotated[int, typer.Option(min=0, help="The first document to show.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 3,
    audio: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the audio, as wav files.")] = None,
) -> None:
    """Show documents of a token store (markers, text, codes), and write their audio."""
    from ..data.inspect import inspect

    inspect(store, document, count, audio)
