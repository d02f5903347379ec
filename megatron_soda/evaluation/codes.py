"""Codes of a benchmark's recordings. Encoding is the expensive step, so they are kept by codec and by content."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from rich.progress import track

from ..audio.reading import read_audio
from ..audio.sound import BadAudio, Sound
from ..audio.sound_bytes import open_sound
from ..codecs.base import Codec
from ..codecs.description import CodecDescription
from ..console import console
from ..data.units import read_shard, write_units
from ..errors import SodaError
from .panel import place_for_kept

SECONDS_AT_ONCE = 120.0  # of sound in memory, and in one file: what is lost if it is interrupted
LONGEST = 3600.0  # seconds


def encoded(sounds: Sequence[Sound], codec: Codec, benchmarks: Path, run: Path) -> tuple[list[np.ndarray], list[str]]:
    """Codes (frames, codebooks) and a hash of the bytes of each recording. SodaError for one that cannot be read.

    Kept in `benchmarks`/codes, or in RUN/evaluate/codes where nothing can be written there.
    """
    folder = place_for_kept(str(benchmarks), str(run)) / "codes" / codec.fingerprint
    hashes = [_hash(sound) for sound in sounds]
    known = dict(_known(folder))
    todo = {digest: sound for digest, sound in zip(hashes, sounds, strict=True) if digest not in known}
    waiting: dict[str, np.ndarray] = {}
    samples = 0
    for number, (digest, sound) in enumerate(track(todo.items(), "encode", console=console), 1):
        waiting[digest] = _read(sound, codec)
        samples += len(waiting[digest])
        if samples > SECONDS_AT_ONCE * codec.sample_rate or number == len(todo):
            found = dict(zip(waiting, codec.encode(list(waiting.values())), strict=True))
            _keep(folder, found, codec)
            known |= found
            waiting, samples = {}, 0
    return [known[digest] for digest in hashes], hashes


def _known(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    for path in sorted(folder.glob("*.parquet")):
        rows, codes = read_shard(path)
        for row in rows:
            yield row.id, codes[row.start : row.end]


def _keep(folder: Path, found: dict[str, np.ndarray], codec: Codec) -> None:
    name = hashlib.sha256("".join(found).encode()).hexdigest()[:16]
    rows = [{"id": digest, "codes": codes} for digest, codes in found.items()]
    write_units(folder / f"{name}.parquet", rows, codec=CodecDescription.of(codec, {}), key=codec.fingerprint)


def _hash(sound: Sound) -> str:
    with ExitStack() as stack:
        try:
            file = open_sound(sound, stack)[0]
            return hashlib.sha256(file.read()).hexdigest()[:32]
        except (BadAudio, OSError) as error:
            raise SodaError(f"{_where(sound)}: {error}") from error


def _read(sound: Sound, codec: Codec) -> np.ndarray:
    try:
        return read_audio(sound, codec.sample_rate, LONGEST)
    except BadAudio as error:
        raise SodaError(f"{_where(sound)}: {error}. Without this recording the benchmark is incomplete.") from error


def _where(sound: Sound) -> str:
    return f"{sound.path}, row {sound.row + 1}, column {sound.column}" if sound.row >= 0 else sound.path
