"""`soda continue`."""

from pathlib import Path
from typing import Annotated

import typer

from .arguments import Codec, FewerBits, Model, Out, Seed, Shots, Temperature, TopP
from .resolve import find_model

EXAMPLES = ("soda continue start.wav --seconds 5 --model runs/quickstart",)


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings.")],
    seconds: Annotated[float, typer.Option(min=0.01, metavar="S", help="Length of the continuation, at most.")],
    model: Model,
    out: Out = Path("continued"),
    shots: Shots = None,
    seed: Seed = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    codec: Codec = "",
    weights: FewerBits = None,
) -> None:
    """Go on where recordings end; wav files, with their beginning, and results.json go to --out."""
    folder = find_model(model)
    from ..inference.own import Chance, codes_of, continuation
    from ..inference.own_run import Ask, How, run_task, stems
    from ..inference.studio import Studio

    def ask(studio: Studio) -> list[Ask]:
        names, asks = [str(file) for file in files], []
        for name, stem in zip(names, stems(names, "continued"), strict=True):
            material = continuation(studio, codes_of(studio, Path(name)), seconds, name)
            asks.append(Ask(name, stem, material, {"given_seconds": material.given / studio.frame_rate}))
        return asks

    how = How(out, shots, Chance(seed, temperature, top_p), codec, weights.value if weights else "")
    run_task(folder, "continue", how, ask)
