"""Makes small benchmarks from a run's held-out recordings, in the layouts of docs/evaluation.md:

    python examples/evaluation/pairs.py runs/quickstart runs/benchmarks
    soda evaluate runs/quickstart suite=[salmon,swuggy,asr] evaluate.benchmarks=runs/benchmarks

salmon/another_speaker   the second half is another speaker's, who in the quickstart's data has another language, too
salmon/reversed          played backwards
salmon/background        the same noise all the way, against another in the second half; which of the two, pink noise or
                         hum, comes first is drawn by lot, or the more predictable one would decide
swuggy                   a word, against its beginning with the end of another word; the join may be heard, so this is
                         easier than made-up words that somebody says
asr                      the recordings of one language with what they say, in LibriSpeech's layout
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import soundfile
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.audio.reading import read_audio
from megatron_soda.data.units import read_units
from megatron_soda.errors import SodaError, run_tool

RATE = 24_000
FADE = 240  # samples of a join, 10 ms
NOISE = 0.1  # of the speech's level: 20 dB below it
SHORTEST, LONGEST = 1.0, 5.0  # seconds of what becomes a pair of salmon
VOWELS = re.compile("[aeiouyáéíóúüàâèêëîïôùûœ]+")
Row = dict[str, Any]  # an utterance with its sound as "wave"


def read_rows(run: Path) -> list[Row]:
    """The held-out utterances of both sides whose recording is there."""
    rows = []
    for side in ("valid", "test"):
        for row in read_units([run / "data" / f"{side}.parquet"]):
            if row["text"] and Path(row["audio"]).is_file():
                rows.append({**row, "wave": read_audio(Path(row["audio"]), RATE, 600.0)})
    if not rows:
        raise SodaError(f"{run}: no held-out utterance with a transcript whose recording is where it was")
    return rows


def write(path: Path, wave: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.clip(wave, -1, 1), RATE, subtype="PCM_16")


def joined(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One after the other with a fade of 10 ms, so that no click gives the join away."""
    ramp = np.linspace(0, 1, FADE)
    return np.concatenate([first[:-FADE], first[-FADE:] * ramp[::-1] + second[:FADE] * ramp, second[FADE:]])


def level(wave: np.ndarray) -> float:
    return float(np.sqrt(np.mean(wave**2))) or 1.0


# ---- salmon


def another_speaker(row: Row, rows: list[Row], lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
    half = len(row["wave"]) // 2
    others = [one["wave"] for one in rows if one["speaker"] != row["speaker"] and len(one["wave"]) >= len(row["wave"])]
    if not others:
        return None
    other = others[lot.integers(len(others))][half - FADE : len(row["wave"])]
    return row["wave"], joined(row["wave"][:half], other * level(row["wave"]) / level(other))


def reversed_(row: Row, rows: list[Row], lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    return row["wave"], row["wave"][::-1]


def background(row: Row, rows: list[Row], lot: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    wave = row["wave"]
    first, second = lot.permutation(2)
    noises = [noise * NOISE * level(wave) / level(noise) for noise in (_pink(len(wave), lot), _hum(len(wave)))]
    half = len(wave) // 2
    return wave + noises[first], wave + joined(noises[first][:half], noises[second][half - FADE :])


def _pink(samples: int, lot: np.random.Generator) -> np.ndarray:
    spectrum = np.fft.rfft(lot.standard_normal(samples))
    return np.fft.irfft(spectrum / np.sqrt(np.arange(1, len(spectrum) + 1)), samples)


def _hum(samples: int) -> np.ndarray:
    time = np.arange(samples) / RATE
    return sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 9))  # pyright: ignore[reportReturnType]


# ---- swuggy


def halves(row: Row) -> tuple[np.ndarray, np.ndarray] | None:
    """A word of two syllables or more, cut where it is quietest between a third and two thirds."""
    word, wave = row["text"].strip(" .").lower(), row["wave"]
    heard = word.removesuffix("e") if row["language"] in ("en", "fr") else word
    if len(word.split()) != 1 or len(VOWELS.findall(heard)) < 2 or len(wave) < RATE // 3:
        return None
    loud = np.flatnonzero(np.abs(wave) > 0.05 * np.abs(wave).max())
    begin, end = int(loud[0]), int(loud[-1]) + 1
    energy = np.convolve(wave[begin:end] ** 2, np.ones(FADE), "same")
    third = len(energy) // 3
    cut = begin + third + int(energy[third : 2 * third].argmin())
    return wave[: cut + FADE // 2], wave[cut - FADE // 2 :]


def swuggy(rows: list[Row], folder: Path, lot: np.random.Generator) -> int:
    words: dict[tuple[str, str], list[tuple[str, np.ndarray, np.ndarray]]] = {}
    for row in rows:
        if cut := halves(row):
            word = re.sub(r"\W+", "", row["text"].lower())
            words.setdefault((row["language"], row["speaker"]), []).append((word, *cut))
    number = 0
    for same in words.values():
        for i, (word, first, last) in enumerate(same):
            others = [other for other in same if other[0] != word]
            if not others:
                continue
            other = others[lot.integers(len(others))]
            number += 1
            wrong = joined(first, other[2] * level(last) / level(other[2]))
            write(folder / f"{number}_correct_{word}_{i}.wav", joined(first, last))
            write(folder / f"{number}_incorrect_{word}_{other[0]}_{i}.wav", wrong)
    return number


def recognition(rows: list[Row], folder: Path) -> int:
    for number, row in enumerate(rows):
        name = f"{row['speaker'] or 'speaker'}-{row['language'] or 'xx'}-{number:04d}"
        where = folder / name.split("-")[0] / name.split("-")[1]
        write(where / f"{name}.flac", row["wave"])
        with (where / f"{name.rsplit('-', 1)[0]}.trans.txt").open("a", encoding="utf-8") as file:
            file.write(f"{name} {' '.join(row['text'].split())}\n")
    return len(rows)


def main(
    run: Annotated[Path, typer.Argument(help="the run whose held-out recordings are used")],
    folder: Annotated[Path, typer.Argument(help="where the benchmarks go; must not exist")],
    language: Annotated[str, typer.Option(help="of the recordings for recognition")] = "en",
    seed: int = 0,
) -> None:
    """Makes pairs in the manner of SALMon and sWUGGY, and a folder for recognition, from held-out recordings."""
    if folder.exists():
        raise SodaError(f"{folder}: is there already; name a new folder")
    rows, lot = read_rows(run), np.random.default_rng(seed)
    fitting = [row for row in rows if SHORTEST <= len(row["wave"]) / RATE <= LONGEST]
    for task in (another_speaker, reversed_, background):
        name, number = task.__name__.rstrip("_"), 0
        for row in fitting:
            if pair := task(row, rows, lot):
                for side, wave in zip("01", pair, strict=True):
                    write(folder / "salmon" / name / f"sample_{number}_{side}.wav", wave)
                number += 1
        print(f"salmon/{name}: {number} pairs")
    print(f"swuggy: {swuggy(rows, folder / 'swuggy', lot)} pairs")
    spoken = [row for row in rows if row["language"] == language]
    print(f"asr: {recognition(spoken, folder / 'asr')} recordings")


if __name__ == "__main__":
    run_tool(main)
