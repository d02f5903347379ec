"""Measures decoding: sound files to mono float32 samples at 24 kHz, by one core. Run by hand.

Ours is `read_pieces`, with its checks and cuts; by hand is soundfile.read and soxr.resample of the whole file, with
neither; DALI is `DaliDecoder`, where it is installed. The files are made up: sound with the rhythm of speech, 5 to 20
seconds long, and one of ten minutes. Time is CPU time of this process, all its threads together, the sides in turns.

    python tools/bench/bench_decode.py
    python tools/bench/bench_decode.py --files 64 --rate 16000 --channels 2
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import soundfile
import soxr
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.audio.dali import DaliDecoder
from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError, run_tool

SAMPLE_RATE = 24000
SAMPLES_PER_FRAME = 1920
FORMATS = ("wav", "flac", "ogg", "mp3")
LONG_SECONDS = 600.0

Sides = dict[str, Callable[[list[Path]], object]]

console = Console()


def speech(seconds: float, rate: int, channels: int, rng: np.random.Generator) -> np.ndarray:
    """float32 [samples, channels]: harmonics of a moving pitch, four syllables a second, pauses, and some noise."""
    t = np.arange(int(seconds * rate)) / rate
    phase = 2 * np.pi * np.cumsum(120 * (1 + 0.2 * np.sin(2 * np.pi * 0.7 * t))) / rate
    wave = sum((np.sin(k * phase + rng.uniform(0, 6)) / k for k in range(1, 12)), np.zeros(len(t)))
    wave *= np.clip(np.sin(2 * np.pi * 2 * t), 0, 1) * (np.sin(2 * np.pi * 0.2 * t) > -0.8)
    both = 0.2 * wave[:, None] + 0.003 * rng.standard_normal((len(t), channels))
    return both.astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int, seconds: float) -> None:
    """Repeats the samples up to that many seconds, a few at a time: one long write of ogg crashes libsndfile."""
    with soundfile.SoundFile(path, "w", rate, samples.shape[1]) as file:
        left = int(seconds * rate)
        while left > 0:
            file.write(samples[:left])
            left -= len(samples)


def by_hand(paths: list[Path]) -> None:
    for path in paths:
        samples, rate = soundfile.read(path, dtype="float32")
        mono = samples if samples.ndim == 1 else samples.mean(axis=1)
        if rate != SAMPLE_RATE:
            soxr.resample(mono, rate, SAMPLE_RATE, quality="HQ")


def ours(paths: list[Path]) -> None:
    for path in paths:
        for _ in read_pieces(path, SAMPLE_RATE, SAMPLES_PER_FRAME):
            pass


def installed() -> Sides:
    found: Sides = {"by hand": by_hand, "ours": ours}
    try:
        decoder = DaliDecoder(SAMPLE_RATE, SAMPLES_PER_FRAME)
    except SodaError as error:
        console.print(f"without DALI: {error}", style="dim", markup=False)
    else:
        found["dali"] = lambda paths: [list(pieces) for pieces in decoder.decode([Sound(str(path)) for path in paths])]
    return found


def measure(sides: Sides, paths: list[Path], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side, `repeats` times in turns."""
    taken: dict[str, list[float]] = {}
    for turn in range(repeats + 1):  # the first reads the files into memory and sets things up
        for name, decode in sides.items():
            began = time.process_time()
            decode(paths)
            if turn:
                taken.setdefault(name, []).append(time.process_time() - began)
    return taken


def main(
    files: Annotated[int, typer.Option(min=1, help="short files of each format")] = 16,
    rate: Annotated[int, typer.Option(min=8000, help="Hz of the files")] = 44100,
    channels: Annotated[int, typer.Option(min=1, max=2)] = 1,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
    long_seconds: Annotated[float, typer.Option(min=20, help="of the long file of each format")] = LONG_SECONDS,
) -> None:
    """Prints a table and one JSON line: seconds of sound that one core decodes and resamples in a second."""
    found = installed()
    rng = np.random.default_rng(0)
    samples = speech(20, rate, channels, rng)
    lengths = rng.uniform(5, 20, files)
    rows: dict[str, dict[str, float]] = {}
    table = Table("files", *(f"{name}, x real time" for name in found), "ours / by hand", "dali / by hand")
    with tempfile.TemporaryDirectory() as folder:
        for suffix in FORMATS:
            short = [Path(folder) / f"{i}.{suffix}" for i in range(files)]
            for path, seconds in zip(short, lengths, strict=True):
                write(path, samples, rate, seconds)
            long = Path(folder) / f"long.{suffix}"
            write(long, samples, rate, long_seconds)
            for name, paths, seconds in (
                (f"{suffix}, 5-20 s", short, float(lengths.sum())),
                (f"{suffix}, {long_seconds:g} s", [long], long_seconds),
            ):
                taken = measure(found, paths, repeats)
                row = {side: seconds / statistics.median(times) for side, times in taken.items()}
                for side in ("ours", "dali"):
                    if side in taken:
                        pairs = zip(taken["by hand"], taken[side], strict=True)
                        row[f"{side} / by hand"] = statistics.median(a / b for a, b in pairs)
                rows[name] = row
                cells = [f"{row[side]:,.0f}" for side in found]
                ratios = [f"{row[key]:.2f}" if key in row else "-" for key in ("ours / by hand", "dali / by hand")]
                table.add_row(name, *cells, *ratios)
    console.print(table)
    facts = {"files": files, "rate": rate, "channels": channels, "repeats": repeats, "long_seconds": long_seconds}
    print(json.dumps({**facts, "rows": rows}))


if __name__ == "__main__":
    run_tool(main)
