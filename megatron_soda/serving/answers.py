"""What the server's requests ask of the model, as work for its thread. It emits pieces of sound (float32 arrays) or of
text while they are generated, and the Answer at the end."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..inference.listen import Listener
from ..inference.own import Answer, Chance, answer, codes_of, continuation, text_of, voiced
from ..inference.studio import Studio
from ..inference.task import Material
from ..registry import TASKS
from .work import Job

LOOKAHEAD = 2  # frames after one that is heard, for codecs that would like more: the sound is nearly the same


@dataclass(frozen=True)
class Transcription:
    sound: bytes
    chance: Chance

    def __call__(self, studio: Studio, job: Job) -> None:
        material = studio.material(codes=uploaded(studio, self.sound))
        text = _Text(studio, job.emit)

        def on_token(row: int, token: int) -> None:
            job.check()
            text.push(token)

        (found,) = answer(studio, TASKS["transcribe"], [material], self.chance, on_token)
        text.finish(found.texts[0])
        job.emit(found)


@dataclass(frozen=True)
class Speech:
    text: str
    chance: Chance
    voice: bytes | None = None
    voice_text: str = ""

    def __call__(self, studio: Studio, job: Job) -> None:
        text, voice = text_of(studio, self.text, "input"), None
        if self.voice is not None:
            codes = uploaded(studio, self.voice)
            voice = voiced(studio, codes, self.voice_text, lambda row, token: job.check())
        _aloud(studio, job, "speak", studio.material(text=text, voice=voice), self.chance)


@dataclass(frozen=True)
class Continuation:
    sound: bytes
    seconds: float
    chance: Chance

    def __call__(self, studio: Studio, job: Job) -> None:
        material = continuation(studio, uploaded(studio, self.sound), self.seconds, "the sound")
        _aloud(studio, job, "continue", material, self.chance)


Work = Transcription | Speech | Continuation


def uploaded(studio: Studio, sound: bytes) -> np.ndarray:
    """int16 (frames, codebooks) of a file's bytes."""
    with tempfile.NamedTemporaryFile(prefix="soda-") as file:
        file.write(sound)
        file.flush()
        return codes_of(studio, Path(file.name), "the sound")


def _aloud(studio: Studio, job: Job, task: str, material: Material, chance: Chance) -> None:
    most = studio.codec.lookahead
    lookahead = LOOKAHEAD if most is None else min(most, LOOKAHEAD)
    given = material.codes if material.given else None
    listener = Listener(studio.model.space, studio.codec, lambda row, wave: job.emit(wave), given, lookahead)

    def on_token(row: int, token: int) -> None:
        job.check()
        listener(row, token)

    (found,) = answer(studio, TASKS[task], [material], chance, on_token)
    listener.finish()
    job.emit(found)


class _Text:
    """Tokens to pieces of text. The last letters are held back: more tokens may change them."""

    def __init__(self, studio: Studio, say: Callable[[str], None]) -> None:
        self._studio, self._say, self._ids, self._said = studio, say, [], ""

    def push(self, token: int) -> None:
        if token < self._studio.model.space.text_size:
            self._ids.append(token)
            text = self._studio.model.text.decode(self._ids)
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):
                self._tell(text)

    def finish(self, text: str) -> None:
        self._tell(text)

    def _tell(self, text: str) -> None:
        if text.startswith(self._said) and text != self._said:
            self._say(text[len(self._said) :])
            self._said = text


__all__ = ["Answer", "Continuation", "Speech", "Transcription", "Work"]
