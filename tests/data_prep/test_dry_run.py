"""What a dry run expects is what comes, within 5 %, of speech of other kinds than the prompts."""

import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from data_prep import dry_run
from data_prep.prepare import prepare
from megatron_soda.codecs.embedded import EmbeddedCodec
from megatron_soda.tokenizer import write_byte_tokenizer
from tests.data_prep.test_prepare import recipe
from tests.voices import voice

SOUND = voice(0, 200.0, 8000)
COUNT = 300


def words(rng: np.random.Generator, alphabet: str, count: int) -> list[str]:
    return ["".join(rng.choice(list(alphabet), rng.integers(2, 9))) for _ in range(count)]


def says(rng: np.random.Generator, known: list[str], seconds: float) -> str:
    """Some words, the frequent ones most, at two and a half a second."""
    return " ".join(known[min(len(known), rng.zipf(1.3)) - 1] for _ in range(max(1, round(2.5 * seconds))))


def sound(rng: np.random.Generator, seconds: float) -> np.ndarray:
    start = int(rng.integers(0, len(SOUND) - int(seconds * 8000)))
    return SOUND[start : start + int(seconds * 8000)]


def of_files(folder: Path, rng: np.random.Generator, suffix: str, alphabet: str, lengths: np.ndarray) -> list[str]:
    known = words(rng, alphabet, 400)
    for i, seconds in enumerate(lengths):
        soundfile.write(folder / f"{i}{suffix}", sound(rng, seconds), 8000)
        (folder / f"{i}.txt").write_text(says(rng, known, seconds))
    return []


def prompts(folder: Path, rng: np.random.Generator) -> list[str]:
    return of_files(folder, rng, ".wav", "abcdefghijklmnopqrstuvwxyz", rng.uniform(0.3, 3, COUNT))


def a_few_long_ones(folder: Path, rng: np.random.Generator) -> list[str]:
    """Among sentences four recordings of minutes, which have half of the sound."""
    lengths = np.concatenate([rng.lognormal(0, 0.6, COUNT).clip(0.2, 20), [60, 70, 110, 150]])
    return of_files(folder, rng, ".flac", "абвгдежзиклмнопрстуфхцчшщыьэюя", lengths)


def mixed_formats(folder: Path, rng: np.random.Generator) -> list[str]:
    """Short ones as .wav, long ones as .ogg, which has a tenth of the bytes."""
    of_files(folder, rng, ".wav", "abcdefgh", rng.uniform(0.3, 1, COUNT))
    (other := folder / "long").mkdir()
    of_files(other, rng, ".ogg", "ijklmnopqrst", rng.uniform(3, 6, 40))
    return []


def segments(folder: Path, rng: np.random.Generator) -> list[str]:
    """Stretches of one recording, of a language with a letter a syllable."""
    soundfile.write(folder / "talk.wav", SOUND, 8000)
    known, lines = words(rng, "".join(map(chr, range(0x4E00, 0x4E80))), 200), []
    for i in range(COUNT):
        start, seconds = float(rng.uniform(0, 190)), float(rng.uniform(0.2, 2) if i % 20 else 9)
        text = says(rng, known, seconds).replace(" ", "")
        lines.append({"audio": "talk.wav", "id": f"{i}", "start": start, "end": start + seconds, "text": text})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return []


def parquet_shards(folder: Path, rng: np.random.Generator) -> list[str]:
    """As on the hub: the sound in a column, of which no size is known without reading it."""
    known, rows = words(rng, "abcdefghijklmnopqrstuvwxyzéèüß", 400), []
    for i in range(COUNT):
        seconds = float(np.clip(rng.lognormal(0, 0.8), 0.2, 20))
        soundfile.write(folder / "x.wav", sound(rng, seconds), 8000)
        audio = {"bytes": (folder / "x.wav").read_bytes(), "path": f"{i}.wav"}
        rows.append({"audio": audio, "text": says(rng, known, seconds), "id": f"{i}"})
    (folder / "x.wav").unlink()
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")
    return []


def sound_alone(folder: Path, rng: np.random.Generator) -> list[str]:
    for i, seconds in enumerate(rng.lognormal(0, 0.7, COUNT).clip(0.2, 20)):
        soundfile.write(folder / f"{i}.wav", sound(rng, seconds), 8000)
    return ["prepare.orders=[audio-only]"]


def transcripts_alone(folder: Path, rng: np.random.Generator) -> list[str]:
    """Where tokens of text are all there is, by a tokenizer that is given."""
    prompts(folder, rng)
    write_byte_tokenizer(folder.parent / "bytes.json")
    return ["prepare.orders=[text-only]", f"prepare.tokenizer={folder.parent}/bytes.json"]


def spoken_and_written(folder: Path, rng: np.random.Generator) -> list[str]:
    """Conversations, and a text of longer words by a tokenizer of more pieces."""
    of_files(folder, rng, ".wav", "abcdefghijklmnopqrstuvwxyz", rng.uniform(0.3, 2, COUNT))
    known = words(rng, "abcdefghijklmnopqrstuvwxyz", 900)
    lengths = rng.lognormal(1, 1.5, 900)
    (folder.parent / "text.txt").write_text("".join(says(rng, known, seconds) + "\n" for seconds in lengths))
    text = f"prepare.text=[{folder.parent}/text.txt]"
    return ["prepare.orders=[conversational,asr]", text, "prepare.text_share=0.4", "prepare.text_pieces=900"]


KINDS = [
    *(prompts, a_few_long_ones, mixed_formats, segments, parquet_shards, sound_alone, transcripts_alone),
    spoken_and_written,
]


def quick_codes(codec: EmbeddedCodec, waves: list[np.ndarray]) -> list[np.ndarray]:
    """As many as there should be, the same for the same sound; other than that their values do not matter here."""
    found = []
    for wave in waves:
        rng = np.random.default_rng(zlib.crc32(wave.tobytes()))
        found.append(rng.integers(0, codec.entries, (-(-len(wave) // codec.samples_per_frame), 8), np.int16))
    return found


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_expected_comes_within_5_percent(kind, tmp_path, monkeypatch):
    """Of 300 utterances 64 are decoded, and a part of the texts encoded."""
    monkeypatch.setattr(EmbeddedCodec, "encode", quick_codes)
    monkeypatch.setattr(dry_run, "SAMPLE", 64)
    monkeypatch.setattr(dry_run, "TEXTS", 64)
    monkeypatch.setattr(dry_run, "SENTENCES", 200, raising=False)
    (folder := tmp_path / "speech").mkdir()
    more = kind(folder, np.random.default_rng(7))
    some = recipe(tmp_path / "run", folder, "prepare.text_pieces=450", "prepare.shard_size=32", *more)
    expected, found = prepare(some, dry_run=True), prepare(some)
    assert expected["utterances"] == found["utterances"]
    tokens = sum(found["tokens"].values())
    print(f"{kind.__name__}: tokens {expected['tokens'] / tokens - 1:+.1%}")
    assert expected["tokens"] == pytest.approx(tokens, rel=0.05)
    if kind is not transcripts_alone:
        assert expected["hours"] == pytest.approx(found["hours"], rel=0.05)
