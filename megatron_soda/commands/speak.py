"""`soda speak`."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import SodaError
from .arguments import Codec, FewerBits, Model, Out, Seed, Shots, Temperature, TopP
from .resolve import find_model

EXAMPLES = (
    'soda speak "good morning" --model runs/quickstart',
    'soda speak "good morning" "good night" --voice me.wav --voice-text "what I say there" --model runs/mine',
)


def command(
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="What to say, a sound each.")],
    model: Model,
    voice: Annotated[Path | None, typer.Option(metavar="FILE", help="Speak as in this recording.")] = None,
    voice_text: Annotated[
        str, typer.Option(metavar="TEXT", help="What is said in it; by default the model transcribes it.")
    ] = "",
    out: Out = Path("spoken"),
    shots: Shots = None,
    seed: Seed = 0,
    temperature: Temperature = None,
    top_p: TopP = None,
    codec: Codec = "",
    weights: FewerBits = None,
) -> None:
    """Say texts; wav files and results.json go to --out."""
    if voice_text and not voice:
        raise SodaError("--voice-text is the transcript of a recording: give it with --voice FILE")
    folder = find_model(model)
    from ..inference.own import Chance, codes_of, text_of, voiced
    from ..inference.own_run import Ask, How, run_task
    from ..inference.studio import Studio

    def ask(studio: Studio) -> list[Ask]:
        said = [text_of(studio, text, f"text {number}") for number, text in enumerate(texts, 1)]
        stems = [f"speak_{number}" for number in range(1, len(said) + 1)]
        if not voice:
            return [Ask(text, stem, studio.material(text=text)) for text, stem in zip(said, stems, strict=True)]
        sample = voiced(studio, codes_of(studio, voice), voice_text)
        about = {"voice": str(voice), "voice_text": sample[0]}
        materials = [studio.material(text=text, voice=sample) for text in said]
        return [Ask(*parts, about) for parts in zip(said, stems, materials, strict=True)]

    how = How(out, shots, Chance(seed, temperature, top_p), codec, weights.value if weights else "")
    run_task(folder, "speak", how, ask)
