"""`soda transcribe`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Codec, FewerBits, Model, Out, Seed, Shots, Temperature, TopP
from .resolve import find_model

EXAMPLES = (
    "soda transcribe a.wav b.mp3 --model runs/quickstart",
    "soda transcribe talk.flac --model runs/mine --shots examples.jsonl --out written/",
)


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings.")],
    model: Model,
    out: Out = None,
    shots: Shots = None,
    seed: Seed = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    codec: Codec = "",
    weights: FewerBits = None,
) -> None:
    """Write down what is said in recordings.

    The text goes to standard output; --out also writes results.json."""
    folder = find_model(model)
    from ..inference.own import Chance, codes_of
    from ..inference.own_run import Ask, How, run_task
    from ..inference.studio import Studio

    def ask(studio: Studio) -> list[Ask]:
        return [Ask(str(file), "", studio.material(codes=codes_of(studio, file))) for file in files]

    how = How(out, shots, Chance(seed, temperature, top_p), codec, weights.value if weights else "")
    run_task(folder, "transcribe", how, ask)
