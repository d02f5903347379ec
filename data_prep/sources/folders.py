"""Corpora that are folders of sound files: alone, with X.txt or X.json beside X.wav, LibriSpeech, LJSpeech, Common
Voice, Emilia.

Every id is the sound's path without suffix, from the folder that was named, so it is unique.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..utterance import Reject, Sound, Utterance
from . import files, manifest, rows
from .files import BadLine
from .rows import SOUND_SUFFIXES, Found, Row

COMMON_VOICE = ("validated.tsv", "train.tsv")  # the first that is there
BESIDE = {".json": "emilia", ".txt": "pairs"}  # the layout where a sound has such a file beside it
# What a layout finds in a folder: (where, row or what is wrong). The names are the folder's, or those that were named:
# `whole` tells which.
Rows = Iterator[tuple[str, Row | BadLine]]
Transcripts = Callable[[Path, list[str], bool], Rows]


def read(layout: str, root: Path, places: list[Path], needs_text: bool) -> Found:
    """The utterances of folders (and all folders in them) or of single files, in one of LAYOUTS."""
    transcripts, wanted, closed = LAYOUTS[layout]
    failed: list[Reject] = []
    for folder, names, whole in _listed(places, closed, failed):
        prefix = f"{files.relative(folder, root)}/" if folder != root else ""

        def make(row: Row, folder: Path = folder) -> Utterance:
            audio = rows.string(row, "audio")
            if not audio:
                raise BadLine("no 'audio'")
            path, _ = rows.inside(folder, audio)
            id = files.stem(files.relative(path, root))
            recording = emilia_recording(id) if layout == "emilia" else ""
            return rows.utterance({**row, "recording": recording}, Sound(str(path)), id, needs_text)

        found = transcripts(folder, names, whole)
        yield from rows.collect(((prefix + where, row) for where, row in found), make)
        if not whole:
            unfit = [name for name in names if not name.lower().endswith(wanted)]
            yield from (Reject(prefix + name, f"not {layout}: a name ends in {', '.join(wanted)}") for name in unfit)
    yield from failed


def _listed(places: list[Path], closed: str, failed: list[Reject]) -> Iterator[tuple[Path, list[str], bool]]:
    for (folder, is_folder), group in itertools.groupby(
        places, lambda p: (p, True) if p.is_dir() else (p.parent, False)
    ):
        if not is_folder:
            yield folder, [path.name for path in group], False
            continue
        for here, folders, names in files.walk(folder, failed):
            yield here, names, True
            if closed in folders:  # it may hold millions of files, and another file tells which
                folders.remove(closed)


def _audio(folder: Path, names: list[str], whole: bool) -> Rows:
    """Sounds, whatever else is there."""
    yield from ((name, {"audio": name}) for name in filter(is_sound, names))


def _pairs(folder: Path, names: list[str], whole: bool) -> Rows:
    """X.txt with the text beside each X.wav."""
    for name in filter(is_sound, names):
        yield name, _beside(folder, name, ".txt")


def _emilia(folder: Path, names: list[str], whole: bool) -> Rows:
    """X.json with text, speaker and language beside each X.mp3. X is RECORDING_WNUMBER: the utterances of a recording
    follow each other in the order of their numbers."""
    sounds = sorted(filter(is_sound, names), key=emilia_order)
    for name in sounds:
        yield name, _beside(folder, name, ".json")
    heard = {files.stem(name) for name in sounds}
    for name in names:
        if whole and name.lower().endswith(".json") and files.stem(name) not in heard:
            yield name, BadLine("no sound file: only the text")


def _beside(folder: Path, name: str, suffix: str) -> Row | BadLine:
    path = folder / f"{os.path.splitext(name)[0]}{suffix}"
    try:
        with open(path, "rb") as file:
            raw = file.read(files.LONGEST_LINE + 1)
        if len(raw) > files.LONGEST_LINE:
            return BadLine(f"text too long: {path.name}")
        text = raw.decode("utf-8-sig")
        row = rows.numbers_as_names(rows.parse_json(text)) if suffix == ".json" else {"text": text}
    except BadLine as error:
        return error
    except FileNotFoundError:
        return {"audio": name, rows.NO_TEXT: f"{path.name} is not there"}
    except UnicodeDecodeError:
        return BadLine(f"not UTF-8: {path.name}")
    except OSError as error:
        return BadLine(f"cannot be read: {path.name}: {error.strerror}")
    return {**{key: found for key, found in row.items() if key not in rows.NAMES["audio"]}, "audio": name}


def _librispeech(folder: Path, names: list[str], whole: bool) -> Rows:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt, its lines `ID TEXT`, beside ID.flac. The language is English."""
    seen: set[str] = set()
    for name in (name for name in names if name.endswith(".trans.txt")):
        for number, line in files.lines(folder / name):
            row: Row | BadLine = line if isinstance(line, BadLine) else BadLine("not 'ID TEXT'")
            if isinstance(line, str):
                if not line.strip():
                    continue
                id, _, text = line.strip().partition(" ")
                seen.add(f"{id}.flac")
                row = {"audio": f"{id}.flac", "text": text, "speaker": id.split("-")[0], "language": "en"}
            yield f"{name}:{number}", row
    for name in filter(is_sound, names):
        if name not in seen:
            yield name, {"audio": name, rows.NO_TEXT: "no .trans.txt beside it names this file"}


def _ljspeech(folder: Path, names: list[str], whole: bool) -> Rows:
    """metadata.csv, its lines `ID|TEXT|TEXT WITH NUMBERS SPELLED OUT` (one text is enough), beside wavs/ID.wav.
    The text as written is taken, the other where there is none."""
    for name in (name for name in names if name == "metadata.csv"):
        for number, line in files.lines(folder / name):
            if isinstance(line, str) and not line.strip():
                continue
            row: Row | BadLine = line if isinstance(line, BadLine) else BadLine("not 'ID|TEXT|NORMALIZED TEXT'")
            cells = line.split("|") if isinstance(line, str) else []
            if len(cells) in (2, 3):
                row = dict(zip(("id", "text", "normalized_text"), cells, strict=False))
                row = {**row, "audio": f"wavs/{cells[0].strip()}.wav"}
            yield f"{name}:{number}", row


def _commonvoice(folder: Path, names: list[str], whole: bool) -> Rows:
    """A .tsv with client_id, path, sentence and locale beside clips/: the one named, or of a folder validated.tsv, or
    train.tsv where there is no validated one. There may be quotes in a text."""
    tables = [name for name in names if name.lower().endswith(".tsv")]
    if whole:
        tables = [name for name in COMMON_VOICE if name in tables][:1]
        if not tables and (folder / "clips").is_dir():
            yield "clips", BadLine(f"no {' or '.join(COMMON_VOICE)} beside it: give the path of another .tsv")
    for table in tables:
        for where, row in manifest.records(folder / table, table):
            if isinstance(row, BadLine):
                yield where, row
            else:
                clip = rows.string(row, "audio")
                yield where, {**row, "audio": f"clips/{clip}" if clip else ""}


# The layout's function, the ends of its files' names, and a folder of sound files that is not looked through.
LAYOUTS: dict[str, tuple[Transcripts, tuple[str, ...], str]] = {
    "audio": (_audio, SOUND_SUFFIXES, ""),
    "pairs": (_pairs, (*SOUND_SUFFIXES, ".txt"), ""),
    "emilia": (_emilia, (*SOUND_SUFFIXES, ".json"), ""),
    "librispeech": (_librispeech, (".trans.txt", ".flac"), ""),
    "ljspeech": (_ljspeech, ("metadata.csv",), "wavs"),
    "commonvoice": (_commonvoice, (".tsv",), "clips"),
}


def is_sound(name: str) -> bool:
    return name.lower().endswith(SOUND_SUFFIXES) and not name.startswith(".")


def emilia_recording(id: str) -> str:
    """What is before the last _W field; empty where there is none."""
    found = re.fullmatch(r"(.+)_W[^_/]*", id, re.DOTALL)
    return found[1] if found else ""


def emilia_order(name: str) -> tuple[str, int, str]:
    """Sorts by recording, and in it by number: W9 before W10."""
    id = os.path.splitext(name)[0]
    return emilia_recording(id) or id, len(id), name
