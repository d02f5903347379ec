"""What the server's requests ask of the model, as work for its thread. It emits pieces of sound (float32 arrays) or of
text while they are generated, and the Answer at the end."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..inference.listen import Listener
from ..inference.own import Chance, answer, codes_of, continuation, text_of, voiced
from ..inference.studio import Studio
from ..inference.task import Material
from ..registry import TASKS
from ..tokenizer import TextTokenizer
from .work import Job

LOOKAHEAD = 2  # frames after one that is heard, for codecs that would like more: the sound is nearly the same


@dataclass(frozen=True)
class Transcription:
    sound: bytes
    chance: Chance

    def __call__(self, studio: Studio, job: Job) -> None:
        material = studio.material(codes=uploaded(studio, self.sound))
        text = Writing(studio.model.text, studio.model.space.text_size, job.emit)

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


class Writing:
    """Tokens of a text to pieces of it, which `say` gets. What more tokens may still change is held back."""

    def __init__(self, text: TextTokenizer, size: int, say: Callable[[str], None]) -> None:
        self._text, self._size, self._say = text, size, say
        self._ids: list[int] = []
        self._said = ""

    def push(self, token: int) -> None:
        if token >= self._size:
            return
        self._ids.append(token)
        if not self._text.is_byte(token):
            so_far = self._text.decode(self._ids)
            if not so_far.endswith("\N{REPLACEMENT CHARACTER}"):
                self.finish(so_far)

    def finish(self, text: str) -> None:
        """The text, or its beginning, that is known now."""
        if len(text) > len(self._said):
            self._say(text[len(self._said) :])
            self._said = text
