"""Recordings with what is said in them, for the suites of spoken sound: folders in the layouts in which they are
published, or the held-out utterances."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audio.reading import read_audio
from ..audio.sound import Sound
from ..data.units import translations
from ..errors import SodaError
from ..files import read_json, reading
from .codes import encoded
from .pair_files import some

if TYPE_CHECKING:
    from .bench import Bench

SECONDS = 3600.0  # longest recording


@dataclass(frozen=True)
class Recording:
    name: str
    text: str
    language: str  # "" if unknown
    codes: np.ndarray  # int16 (frames, codebooks)
    wave: Callable[[], np.ndarray]  # float32 (samples,) at the codec's rate; empty if only the codes are left
    speaker: str = ""
    prompt: str = ""
    digest: str = ""  # of the file, or of the codes


@dataclass(frozen=True)
class Listed:
    """A recording in a folder."""

    name: str
    text: str
    sound: Path
    speaker: str = ""


@dataclass(frozen=True)
class Line:
    """A line of seed-tts-eval: what is to be said, and in which voice."""

    name: str
    text: str
    voice: Listed
    truth: Path | None  # a recording of the same


def speech(bench: "Bench", name: str, *, needs_text: bool) -> tuple[str, list[Recording]]:
    """What evaluate.benchmarks has in the folder NAME, otherwise the held-out utterances; and which of the two."""
    folder = Path(bench.recipe.evaluate.benchmarks) / name
    if bench.recipe.evaluate.benchmarks and folder.is_dir():
        return str(folder), of_folder(bench, listed(folder))
    return f"held-out utterances ({bench.recipe.evaluate.split})", held_out(bench, bench.utterances, needs_text)


def held_out(bench: "Bench", rows: Iterable[dict[str, Any]], needs_text: bool) -> list[Recording]:
    """SodaError if there are none."""
    found = [_held_out(bench, row) for row in rows if len(row["codes"]) and (row["text"] or not needs_text)]
    if not found:
        raise SodaError(
            f"{bench.recipe.data_folder}: no held-out utterance has {'a transcript' if needs_text else 'sound'}"
        )
    return found


def translated(bench: "Bench", suite: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The held-out sources with their translations. SodaError if there are none."""
    found = translations(bench.utterances)
    if not found:
        raise SodaError(
            f"{bench.recipe.data_folder}: the {bench.recipe.evaluate.split} split has no recording of two utterances "
            f"with transcripts and languages, a source and its translation. Leave {suite} out of evaluate.suite."
        )
    return found


def _held_out(bench: "Bench", row: dict[str, Any]) -> Recording:
    def wave() -> np.ndarray:
        own = bench.studio.recording(row)
        return np.zeros(0, np.float32) if own is None else own

    facts = {name: row[name] or "" for name in ("language", "speaker", "prompt")}
    digest = hashlib.sha256(np.ascontiguousarray(row["codes"], "<i2").tobytes()).hexdigest()[:32]
    return Recording(row["id"], row["text"] or "", codes=row["codes"], wave=wave, digest=digest, **facts)


def of_folder(bench: "Bench", every: Sequence[Listed], language: str = "en") -> list[Recording]:
    """SodaError if one cannot be read."""
    sounds = [Sound(str(one.sound)) for one in every]
    codes, hashes = encoded(sounds, bench.codec, Path(bench.recipe.evaluate.benchmarks), bench.run)

    def reader(sound: Sound) -> Callable[[], np.ndarray]:
        return lambda: read_audio(sound, bench.codec.sample_rate, SECONDS)

    return [
        Recording(one.name, one.text, language, of_it, reader(sound), one.speaker, digest=digest)
        for one, sound, of_it, digest in zip(every, sounds, codes, hashes, strict=True)
    ]


# ---- layouts


def listed(folder: Path) -> list[Listed]:
    """LibriSpeech's SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac with SPEAKER-CHAPTER.trans.txt, anywhere in the folder;
    or the authors' JSON file, [{file_path, transcript}]. SodaError if it is neither, both or incomplete."""
    transcripts, tables = sorted(folder.rglob("*.trans.txt")), sorted(folder.glob("*.json"))
    if bool(transcripts) == bool(tables) or len(tables) > 1:
        raise SodaError(
            f"{folder}: needs either LibriSpeech's folders (SPEAKER/CHAPTER/*.trans.txt) or one JSON file "
            f"([{{file_path, transcript}}]); it has {len(transcripts)} and {len(tables)} of them"
        )
    found = _librispeech(folder, transcripts) if transcripts else _table(tables[0])
    if not found:
        raise SodaError(f"{folder}: no recordings in it")
    return found


def _librispeech(folder: Path, transcripts: Sequence[Path]) -> list[Listed]:
    found = []
    for path in transcripts:
        with reading(path, "not text"):
            lines = path.read_text(encoding="utf-8").splitlines()
        for line in filter(str.strip, lines):
            name, _, text = line.partition(" ")
            sounds = [path.with_name(f"{name}{suffix}") for suffix in (".flac", ".wav")]
            sound = next((sound for sound in sounds if sound.is_file()), sounds[0])
            found.append(Listed(name, text.strip(), sound, name.partition("-")[0]))
    _complete(folder, found)
    named = {one.sound.resolve() for one in found}
    if silent := [str(path) for path in sorted(folder.rglob("*.flac")) if path.resolve() not in named]:
        raise SodaError(f"{folder}: {len(silent)} recordings have no transcript: {some(silent)}")
    return found


def _table(path: Path) -> list[Listed]:
    found = []
    for number, row in enumerate(read_json(path, list)):
        values = [row.get(key) if isinstance(row, dict) else None for key in ("file_path", "transcript")]
        sound, text = values
        if not isinstance(sound, str) or not isinstance(text, str):
            raise SodaError(f"{path}: item {number}: needs file_path and transcript, both texts")
        found.append(Listed(sound, text, path.parent / sound))
    _complete(path, found)
    return found


def _complete(where: Path, found: Sequence[Listed]) -> None:
    if gone := [str(one.sound) for one in found if not one.sound.is_file()]:
        raise SodaError(f"{where}: incomplete: {len(gone)} recordings are missing: {some(gone)}")
    if twice := [name for name, count in Counter(one.name for one in found).items() if count > 1]:
        raise SodaError(f"{where}: several recordings are named {some(twice)}")


def seed_tts(folder: Path) -> tuple[str, list[Line]]:
    """seed-tts-eval's meta.lst, `NAME|what the prompt says|its file|what to say[|a recording of that]`: the language
    and the lines. SodaError if there is none, or several, or one is incomplete."""
    files = sorted(folder.rglob("meta.lst"))
    if len(files) != 1:
        told = f"holds several: {some([str(path) for path in files])}. Link the folder of one of them" if files else ""
        raise SodaError(f"{folder}: {told or 'no meta.lst in it, as seed-tts-eval has'}")
    path = files[0]
    with reading(path, "not text"):
        lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        parts = [part.strip() for part in line.split("|")]
        if len(parts) not in (4, 5) or not all(parts[:4]):
            raise SodaError(f"{path}: line {number}: needs NAME|what the prompt says|its file|what to say")
        name, said, voice, text = parts[:4]
        truth = path.parent / parts[4] if len(parts) == 5 else None
        found.append(Line(name, text, Listed(voice, said, path.parent / voice), truth))
    if not found:
        raise SodaError(f"{path}: empty")
    sounds = [line.voice.sound for line in found] + [line.truth for line in found if line.truth]
    if gone := [str(sound) for sound in sounds if not sound.is_file()]:
        raise SodaError(f"{path}: incomplete: {len(gone)} recordings are missing: {some(gone)}")
    names = [line.name for line in found]
    if len(set(names)) < len(names):
        raise SodaError(f"{path}: several lines have one name")
    language = path.resolve().parent.name
    return language if language in ("en", "zh") else "en", found
