"""What the commands share: their arguments, and how their help shows examples."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

Target = Annotated[str, typer.Argument(metavar="RECIPE|RUN", help="A recipe (.yaml) or a run folder.")]
ModelTarget = Annotated[str, typer.Argument(metavar="MODEL", help="A run folder, an exported model, or a recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe settings.")]


class Weights(StrEnum):
    bf16 = "bf16"
    int8 = "int8"


# Of the commands that take people's own sounds and texts.
Model = Annotated[str, typer.Option("--model", metavar="MODEL", help="A run folder, or a model that soda exported.")]
Out = Annotated[Path | None, typer.Option("--out", metavar="FOLDER", help="Where results.json and sounds go.")]
Shots = Annotated[
    Path | None,
    typer.Option("--shots", metavar="JSONL", help='Examples for the model: {"audio": FILE, "text": TEXT} a line.'),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the random draw.")]
Temperature = Annotated[
    float | None, typer.Option("--temperature", min=0.0, help="0: the likeliest token. Default: the paper's.")
]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0, help="Default: the paper's.")]
Codec = Annotated[str, typer.Option("--codec", metavar="NAME[:FOLDER]", help="For a model without its own: mimi, ..")]
FewerBits = Annotated[Weights | None, typer.Option("--weights", help="Format of the weights on a CPU, for speed.")]


def examples(*lines: str) -> str:
    return "Examples:\n\n" + "\n\n".join(f"  {line}" for line in lines)
