"""Composes parallel recordings from spoken numbers: strings of two to four, in Spanish and English, by one speaker.

    python examples/s2st/compose.py OUT --pairs 2000

The words are Asterisk's free prompts (27 numbers that both languages have). OUT gets sound files and a manifest.jsonl
whose lines come in pairs: source, then target, of one `recording`. Both directions occur. The pauses are random on each
side; the loudness is random too, but the same on both. Words begin on frames of the codec (80 ms), so a word nearly
always has the same codes, which saves a small model most of the work. `prompt` is the string, so soda prepare keeps all
recordings of a string on one side of the split.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import soundfile

from data_prep import asterisk
from megatron_soda.audio.reading import read_audio
from megatron_soda.files import atomic_path

NUMBERS = [str(number) for number in (*range(10), *range(11, 21), *range(30, 100, 10))]
LANGUAGES = ("es", "en")
RATE = 16000
FRAME = RATE * 2 // 25  # samples, 80 ms
PAUSE = 1, 4  # frames
GAIN = -6.0, 3.0  # dB
QUIET = 0.02  # of a word's peak: what is cut from its ends
A_FOLDER = 1000  # pairs

Words = dict[str, tuple[np.ndarray, str]]  # number -> samples float32, what is said


def words(downloads: Path, language: str) -> Words:
    """The numbers as spoken in a language, without the silence around them."""
    spoken = {u.id.rpartition("/")[2]: u for u in asterisk.read(downloads, [language])[0] if "/digits/" in u.id}
    return {n: (_trimmed(read_audio(spoken[n].audio, RATE)), spoken[n].text) for n in NUMBERS}


def _trimmed(samples: np.ndarray) -> np.ndarray:
    """From its first loud sample to its last, and silence to the end of a frame."""
    loud = np.flatnonzero(np.abs(samples) > QUIET * np.abs(samples).max())
    word = samples[loud[0] : loud[-1] + 1]
    return np.pad(word, (0, -len(word) % FRAME))


def said(numbers: list[str], voice: Words, rng: np.random.Generator) -> np.ndarray:
    """float32 samples: the numbers with a random pause before each and at the end."""

    def pause() -> np.ndarray:
        return np.zeros(FRAME * rng.integers(*PAUSE, endpoint=True), np.float32)

    return np.concatenate([pause(), *(part for number in numbers for part in (voice[number][0], pause()))])


def compose(out: Path, downloads: Path, pairs: int, seed: int) -> None:
    voices = {language: words(downloads, language) for language in LANGUAGES}
    rng = np.random.default_rng(seed)
    with atomic_path(out / "manifest.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as manifest:
        for i in range(pairs):
            numbers = list(rng.choice(NUMBERS, rng.integers(2, 5)))
            gain = 10 ** (rng.uniform(*GAIN) / 20)
            for language in LANGUAGES if i % 2 == 0 else LANGUAGES[::-1]:
                name = f"{i // A_FOLDER:03d}/{i:06d}-{language}.flac"
                samples = gain * said(numbers, voices[language], rng)
                (out / name).parent.mkdir(exist_ok=True)
                soundfile.write(out / name, np.clip(samples, -1, 1), RATE, "PCM_16")
                row = {
                    "audio": name,
                    "text": " ".join(voices[language][number][1] for number in numbers),
                    "language": language,
                    "speaker": "Allison",
                    "recording": f"{i:06d}",
                    "prompt": " ".join(numbers),
                }
                manifest.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--downloads", type=Path, default=Path("downloads"), help="the folder of prepare.downloads")
    options = parser.parse_args()
    asterisk.fetch(options.downloads / "asterisk", list(LANGUAGES))
    options.out.mkdir(parents=True, exist_ok=True)
    compose(options.out, options.downloads / "asterisk", options.pairs, options.seed)


if __name__ == "__main__":
    main()
