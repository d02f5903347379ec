"""Strings of spoken numbers, each word a recording of its own: the numbers among Asterisk's prompts, in any order.

There are millions of strings, but only 27 words a language, so even a small model can learn from them which sound
belongs to which word. Words begin on frames of the embedded codec (80 ms): a word then nearly always has the same
codes.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import soundfile

from megatron_soda.audio.reading import read_audio
from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path

from .utterance import Utterance

NUMBERS = [str(number) for number in (*range(10), *range(11, 21), *range(30, 100, 10))]  # that every language has
RATE = 16000
FRAME = RATE * 2 // 25  # samples, 80 ms
WORDS = 2, 4  # in a string
PAUSE = 1, 4  # frames
GAIN = -6.0, 3.0  # dB
PREFIX = "numbers/"  # of a string's prompt
QUIET = 0.02  # of a word's peak: what is cut from its ends

Words = dict[str, tuple[np.ndarray, str]]  # number -> samples float32, what is said


def strings(folder: Path, prompts: Sequence[Utterance], count: int) -> Iterator[Utterance]:
    """`count` strings for each language of the prompts (from asterisk.read), with their sound in `folder`/LANGUAGE.

    A string is the same whatever `count` is, and its sound is only written if it is not there. `prompt` is the string,
    whatever its language. Pauses and loudness are random. Raises SodaError for a language without all the numbers.
    """
    for language in dict.fromkeys(one.language for one in prompts):
        voice = words(prompts, language)
        speaker = next(one.speaker for one in prompts if one.language == language)
        rng = np.random.default_rng([ord(letter) for letter in language])
        for i in range(count):
            numbers = draw(rng)
            path = folder / language / f"{i:06d}-{'-'.join(numbers)}.flac"
            samples = gain(rng) * said(numbers, voice, rng)
            if not path.exists():
                write(path, samples)
            text = " ".join(voice[number][1] for number in numbers)
            prompt = PREFIX + " ".join(numbers)
            yield Utterance(f"{language}/numbers/{i:06d}", Sound(str(path)), text, speaker, language, prompt)


def is_string(one: Utterance) -> bool:
    return one.prompt.startswith(PREFIX)


def words(prompts: Sequence[Utterance], language: str) -> Words:
    """The numbers as spoken in a language, without the silence around them."""
    spoken = {one.id: one for one in prompts if one.language == language}
    missing = [number for number in NUMBERS if f"{language}/digits/{number}" not in spoken]
    if missing:
        raise SodaError(f"prepare.numbers: the {language} prompts have no {', '.join(missing)}")
    of = {number: spoken[f"{language}/digits/{number}"] for number in NUMBERS}
    return {number: (_trimmed(read_audio(one.audio, RATE)), one.text) for number, one in of.items()}


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """From its first loud sample to its last, and silence to the end of a frame."""
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    word = samples[loud[0] : loud[-1] + 1]
    return np.pad(word, (0, -len(word) % FRAME))


def draw(rng: np.random.Generator) -> list[str]:
    return [str(number) for number in rng.choice(NUMBERS, rng.integers(*WORDS, endpoint=True))]


def gain(rng: np.random.Generator) -> float:
    return 10 ** (rng.uniform(*GAIN) / 20)


def said(numbers: list[str], voice: Words, rng: np.random.Generator) -> np.ndarray:
    """float32 samples at RATE: the numbers with a random pause before each and at the end."""

    def pause() -> np.ndarray:
        return np.zeros(FRAME * rng.integers(*PAUSE, endpoint=True), np.float32)

    return np.concatenate([pause(), *(part for number in numbers for part in (voice[number][0], pause()))])


def write(path: Path, samples: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        soundfile.write(temporary, np.clip(samples, -1, 1), RATE, "PCM_16", format="FLAC")
