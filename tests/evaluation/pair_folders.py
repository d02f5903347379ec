"""Tiny benchmarks in every layout. A recording's frames have levels from which LevelCodec makes their codes: even codes
in the right ones, odd ones in the wrong ones."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from tests.exported import HOP, RATE, FakeCodec


class LevelCodec(FakeCodec):
    """A frame of level (c + 1) / 20 has the codes c, c + 1, c + 2, c + 3 (mod 16)."""

    encoded = 0

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        LevelCodec.encoded += len(waves)
        found = []
        for wave in waves:
            padded = np.pad(wave, (0, -len(wave) % HOP)).reshape(-1, HOP)
            first = np.round(np.abs(padded).max(1) * 20).astype(int) - 1
            found.append(((first[:, None] + np.arange(4)) % 16).astype(np.int16))
        return found


def codes_of(number: int, right: bool, frames: int = 0) -> list[int]:
    """The first codes of a recording's frames."""
    rng = np.random.default_rng([number, right])
    return [int(2 * c + (not right)) for c in rng.integers(0, 8, frames or 2 + number % 3)]


def wav(number: int, right: bool, frames: int = 0) -> bytes:
    levels = [(code + 1) / 20 for code in codes_of(number, right, frames)]
    wave = np.repeat(levels, HOP) * np.where(np.arange(HOP * len(levels)) % 2, 1, -1)
    file = io.BytesIO()
    soundfile.write(file, wave, RATE, format="WAV", subtype="PCM_16")
    return file.getvalue()


def text(number: int, right: bool) -> str:
    return f"{'The birds sing' if right else 'The birds sings'} {number}"


def _table(path: Path, columns: Sequence[str], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def gold(folder: Path, kind: str, count: int = 4, voices: Sequence[str] = ("A", "B")) -> Path:
    """ZeroSpeech's: FOLDER/dev/gold.csv, files named by chance."""
    where = folder / "dev"
    where.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        for v, voice in enumerate(voices):
            for right in (True, False):
                name = "".join(rng.choice(list("abcdefgh"), 12))
                (where / f"{name}.wav").write_bytes(wav(10 * i + v, right))
                row = {"id": i, "filename": name, "voice": voice, "correct": int(right)}
                if kind == "words":
                    extra = {"frequency": ("oov", 3, 77, 500)[i % 4], "word": text(i, right), "phones": "", "length": 4}
                else:
                    extra = {"type": ("agreement", "islands")[i % 2], "subtype": "s", "transcription": text(i, right)}
                rows.append({**row, **extra})
    rng.shuffle(rows)
    _table(where / "gold.csv", list(rows[0]), rows)
    return folder


def hub(folder: Path, kind: str, count: int = 4) -> Path:
    """The authors' Parquet files: two of them."""
    folder.mkdir(parents=True)
    word = "word" if kind == "words" else "transcription"
    rows = [
        {
            "id": i,
            **{side: {"bytes": wav(i, side == "positive"), "path": f"{i}.wav"} for side in ("positive", "negative")},
            **{f"{side}_{word}": text(i, side == "positive") for side in ("positive", "negative")},
        }
        for i in range(count)
    ]
    for part in range(2):
        pq.write_table(pa.Table.from_pylist(rows[part::2]), folder / f"train-{part}.parquet")
    return folder


def flat(folder: Path, count: int = 4, between: str = "_", labels: tuple[str, str] | None = None) -> Path:
    """wav files numbered through, or with one number for both sides of a pair; their transcripts beside them."""
    folder.mkdir(parents=True)
    for i in range(count):
        for right in (True, False):
            name = f"{i}{between}{labels[not right]}" if labels else f"{2 * i + (not right)}{between}x"
            (folder / f"{name}.wav").write_bytes(wav(i, right))
            (folder / f"{name}.txt").write_text(text(i, right) + "\n")
    return folder


def samples(folder: Path, tasks: Sequence[str], count: int = 4) -> Path:
    """SALMon's folders."""
    for task in tasks:
        (folder / task).mkdir(parents=True)
        for i in range(count):
            for right in (True, False):
                (folder / task / f"sample_{i}_{int(not right)}.wav").write_bytes(wav(i, right))
    return folder


def salmon_hub(folder: Path, tasks: Sequence[str], count: int = 2) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {
            "ind": i,
            "task": task,
            "positive_audio": {"bytes": wav(i, True), "path": ""},
            "negative_audio": {"bytes": wav(i, False), "path": ""},
        }
        for task in tasks
        for i in range(count)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "all.parquet")
    return folder
