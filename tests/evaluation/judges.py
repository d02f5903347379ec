"""Judges that know the answer, by what a sound is, for suites of spoken sound."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np

from megatron_soda.evaluation import words
from megatron_soda.evaluation.judge import Judge, Verdicts
from megatron_soda.registry import JUDGES


class Listener(Judge):
    """Hears a word for every second of sound, the number of the loudest thousandth."""

    name, measures, about = "listener", "words", "a fake"
    package, module, install = "numpy", "numpy", "pip install listener"
    calls: list[int]  # sounds in each batch
    rate = 8000

    def load(self, model: str) -> Verdicts:
        def hear(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
            Listener.calls.append(len(waves))
            return [self.hear(wave) for wave in waves]

        return hear

    @staticmethod
    def hear(wave: np.ndarray) -> str:
        return "stay on the line"


class Voice(Judge):
    """A voice is the level of the sound, as an angle."""

    name, measures, about = "voice", "voice", "a fake"
    package, module = "numpy", "numpy"
    rate = 8000

    def load(self, model: str) -> Verdicts:
        def embed(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[list[float]]:
            return [[float(np.cos(angle)), float(np.sin(angle))] for angle in map(self.angle, waves)]

        return embed

    @staticmethod
    def angle(wave: np.ndarray) -> float:
        return float(np.abs(wave).max())


class Taste(Judge):
    """How good a sound is: its seconds."""

    name, measures, about = "taste", "quality", "a fake"
    package, module = "numpy", "numpy"
    worst = 1.0
    rate = 8000

    def load(self, model: str) -> Verdicts:
        return lambda waves, languages: [len(wave) / self.rate for wave in waves]


@contextmanager
def fake_judges() -> Iterator[None]:
    """They can be named in recipes, and Whisper's normaliser is one that only drops full stops."""
    Listener.calls = []
    for judge in (Listener, Voice, Taste):
        JUDGES.register(judge)

    def plain(text: str) -> str:
        return text.lower().replace(".", "")

    def known(*_: Any) -> Any:
        return plain, plain

    with mock.patch.object(words, "_whisper", known), mock.patch.object(words, "_version", return_value="a fake"):
        yield
    for judge in (Listener, Voice, Taste):
        JUDGES._members.pop(judge.name)
