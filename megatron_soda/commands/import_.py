"""`soda import`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaError
from .arguments import Overrides

EXAMPLES = (
    "soda import soda-600m-base run=runs/soda-600m",
    "soda import Qwen3-0.6B run=runs/warm model.tie_embeddings=false",
    "soda train recipe.yaml training.init_from=runs/warm/checkpoints/step_00000000",
)


class Rows(StrEnum):
    means = "means"
    classes = "classes"


def command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A Qwen3ForCausalLM, as transformers saves it.")],
    overrides: Overrides = None,
    codebooks: Annotated[int | None, typer.Option(min=1, help="Of the audio tokens; 8 for a text model.")] = None,
    entries: Annotated[int | None, typer.Option(min=1, help="In every codebook; 2,048 unless you say.")] = None,
    rows: Annotated[Rows, typer.Option(help="What new tokens of a text model start as.")] = Rows.means,
) -> None:
    """Make a checkpoint of step 0 of a Hugging Face model, to train on (RUN, or training.init_from) or to export.

    A model with SODA's tokens stays as it is. A text model gets the markers and the audio codes: their rows start as
    the mean of its own, or around that by class of token."""
    from ..hf.importing import import_model

    if not folder.is_dir():
        raise SodaError(f"{folder}: no such folder")
    shape = (codebooks or 8, entries or 2048) if codebooks or entries else None
    import_model(folder, overrides or [], shape, rows.value)
