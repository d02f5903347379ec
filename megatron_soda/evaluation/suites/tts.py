"""Synthesis: whether the model's speech ends, says the words, and has the voice that it was given."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...registry import SUITES, TASKS
from ..spoken import SpokenSuite, chosen, digest

if TYPE_CHECKING:
    from ...inference.task import Material
    from ..bench import Bench
    from ..speech_files import Recording
    from ..spoken import Heard

VOICE = 3.0  # seconds: the held-out recording whose length is nearest gives the voice
VERSION = 1  # of how it is measured


@dataclass(frozen=True)
class Ask:
    name: str
    text: str
    language: str
    voice: "Recording | None"
    truth: "Recording"  # a recording of the text; otherwise the voice's own, with what it says


@SUITES.register
class Synthesis(SpokenSuite):
    name = "tts"
    title = "Synthesis: word error rate and voice"
    about = (
        "The model says texts in the voices of recordings. First, how often it stops by itself: what is missing, empty "
        "or cut off counts as all wrong. Then the share of words that a recogniser hears differently, and how near the "
        "voice is. The columns beside it are of recordings and of what the codec makes of them."
    )

    def check(self, bench: "Bench") -> None:
        super().check(bench)
        self.normalisers(bench)
        self._asks(bench)

    def _asks(self, bench: "Bench") -> tuple[str, list[Ask]]:
        from ..speech_files import held_out

        settings = bench.recipe.evaluate
        folder = Path(settings.benchmarks) / self.name
        if settings.benchmarks and folder.is_dir():
            return str(folder), _of_folder(bench, folder)
        every = held_out(bench, bench.utterances, needs_text=True)
        asks = [
            Ask(one.name, one.text, one.language, _voice(one, every, bench.studio.frame_rate), one) for one in every
        ]
        return f"held-out utterances ({settings.split})", chosen(asks, settings.documents)

    def measure(self, bench: "Bench") -> dict[str, Any]:
        import numpy as np

        from .. import words
        from ..answers import answered, settings
        from ..sounds import ENDED, LONG, Sounds, again, endings, of_answer, own_or_again, state_of
        from ..spoken import Figures, error_figures, keep_items

        source, asks = self._asks(bench)
        answers = answered(bench, self.name, TASKS["speak"], [_material(bench, ask) for ask in asks])
        state = [state_of(one) for one in answers]
        figures, languages = Figures([ask.name for ask in asks]), [ask.language for ask in asks]
        endings(figures, state)
        columns = {
            "original": [ask.truth.wave for ask in asks],
            "codec": [lambda truth=ask.truth: again(bench, truth) for ask in asks],
            "model": [lambda one=one: of_answer(bench, one) for one in answers],
        }
        sounds = Sounds(bench, self.name, columns, languages)
        heard, rank = _heard(asks, sounds.heard(state)), np.array([], float)
        if heard:
            normalisers = {"authors": words.authors_synthesis, "whisper": words.whisper}
            rank = error_figures(figures, normalisers, languages, heard, ("utterance", "corpus"))
        nothing = np.zeros(0, np.float32)
        voices = [lambda voice=ask.voice: own_or_again(bench, voice) if voice else nothing for ask in asks]
        sounds.figures(figures, voices, "the voice that was given")
        rows = [
            {"name": ask.name, "said": ask.text, **{s: heard[s].heard[i] for s in heard}, "state": state[i]}
            for i, ask in enumerate(asks)
        ]
        rank = rank if len(rank) else np.array([float(one != ENDED) for one in state])
        parts = [part for ask in asks for part in (ask.name, ask.text, ask.voice.digest if ask.voice else "")]
        fixed = {"judges": bench.panel.identities, "normalisers": self.normalisers(bench)}
        return {
            **figures.result(),
            "source": source,
            "utterances": len(asks),
            LONG.replace(" ", "_"): [ask.name for ask, one in zip(asks, state, strict=True) if one == LONG],
            **fixed,
            "drawn": settings(bench, TASKS["speak"]),
            "shown": keep_items(bench, self.name, rows, rank, sounds.players()),
            "must_match": {"version": VERSION, "data": digest(parts), **fixed},
        }


def _heard(asks: Sequence[Ask], heard: dict[str, list[str | None]]) -> dict[str, "Heard"]:
    from ..spoken import Heard

    recorded = [ask.truth.text for ask in asks]
    said = {"original": recorded, "codec": recorded, "model": [ask.text for ask in asks]}
    return {system: Heard(said[system], texts) for system, texts in heard.items()}


def _material(bench: "Bench", ask: Ask) -> "Material":
    from ...tokenizer import clean_text

    def cleaned(text: str) -> str:
        return clean_text(text, bench.model.space).strip()

    voice = (cleaned(ask.voice.text), ask.voice.codes) if ask.voice else None
    return bench.studio.material(text=cleaned(ask.text), voice=voice)


def _voice(own: "Recording", every: Sequence["Recording"], rate: float) -> "Recording | None":
    """Another recording of the same speaker with other words, in the same language if there is one."""
    others = [
        one
        for one in every
        if own.speaker and one.speaker == own.speaker and one.name != own.name and one.text != own.text
        if not (own.prompt and one.prompt == own.prompt)
    ]
    return min(
        others,
        key=lambda one: (one.language != own.language, abs(len(one.codes) / rate - VOICE), one.name),
        default=None,
    )


def _of_folder(bench: "Bench", folder: Path) -> list[Ask]:
    from ..speech_files import Listed, of_folder, seed_tts

    language, lines = seed_tts(folder)
    lines = chosen(lines, bench.recipe.evaluate.documents)
    voices = of_folder(bench, [line.voice for line in lines], language)
    recorded = [Listed(line.name, line.text, line.truth) for line in lines if line.truth]
    truths = {one.name: one for one in of_folder(bench, recorded, language)}
    return [
        Ask(line.name, line.text, language, voice, truths.get(line.name, voice))
        for line, voice in zip(lines, voices, strict=True)
    ]
