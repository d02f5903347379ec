"""`soda translate`."""

import re
from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaError
from .arguments import Codec, FewerBits, Model, Out, Seed, Shots, Temperature, TopP
from .resolve import find_model

EXAMPLES = ("soda translate hola.wav --to en --model runs/translator",)
CODE = r"[a-z]{2,3}(-[A-Za-z]{2,4})?"


def command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recordings.")],
    to: Annotated[str, typer.Option(metavar="LANG", help="The language to translate to: en, es, ..")],
    model: Model,
    language: Annotated[
        str, typer.Option("--from", metavar="LANG", help="That of the recordings; by default the model decides.")
    ] = "",
    out: Out = Path("translated"),
    shots: Shots = None,
    seed: Seed = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    codec: Codec = "",
    weights: FewerBits = None,
) -> None:
    """Say recordings in another language, with a model that was trained on translations; wav files, and both texts in
    results.json, go to --out."""
    for option, value in {"--to": to, "--from": language}.items():
        if value and not re.fullmatch(CODE, value):
            raise SodaError(f"{option} {value}: not a language's code, such as en or es")
    folder = find_model(model)
    from ..inference.own import Chance, codes_of
    from ..inference.own_run import Ask, How, run_task, stems
    from ..inference.studio import Studio

    def ask(studio: Studio) -> list[Ask]:
        names, asks = [str(file) for file in files], []
        for name, stem in zip(names, stems(names, to), strict=True):
            material = studio.material(codes=codes_of(studio, Path(name)), to=to, language=language)
            asks.append(Ask(name, stem, material, {"to": to}))
        return asks

    how = How(out, shots, Chance(seed, temperature, top_p), codec, weights.value if weights else "")
    run_task(folder, "translate", how, ask, to)
