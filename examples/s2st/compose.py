"""Composes parallel recordings from spoken numbers: strings of two to four, in Spanish and English, by one speaker.

    python examples/s2st/compose.py OUT --pairs 2000

The words are Asterisk's free prompts (data_prep/numbers.py). OUT gets sound files and a manifest.jsonl whose lines come
in pairs: source, then target, of one `recording`. Both directions occur. The pauses are random on each side; the
loudness is random too, but the same on both. `prompt` is the string, so soda prepare keeps all recordings of a string
on one side of the split.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from data_prep import asterisk, numbers
from megatron_soda.files import atomic_path

LANGUAGES = ("es", "en")
A_FOLDER = 1000  # pairs


def compose(out: Path, downloads: Path, pairs: int, seed: int) -> None:
    prompts, _ = asterisk.read(downloads, list(LANGUAGES))
    voices = {language: numbers.words(prompts, language) for language in LANGUAGES}
    rng = np.random.default_rng(seed)
    with atomic_path(out / "manifest.jsonl") as temporary, open(temporary, "w", encoding="utf-8") as manifest:
        for i in range(pairs):
            string, gain = numbers.draw(rng), numbers.gain(rng)
            for language in LANGUAGES if i % 2 == 0 else LANGUAGES[::-1]:
                name = f"{i // A_FOLDER:03d}/{i:06d}-{language}.flac"
                numbers.write(out / name, gain * numbers.said(string, voices[language], rng))
                row = {
                    "audio": name,
                    "text": " ".join(voices[language][number][1] for number in string),
                    "language": language,
                    "speaker": "Allison",
                    "recording": f"{i:06d}",
                    "prompt": " ".join(string),
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
