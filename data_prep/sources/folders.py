"""Corpora that are folders of sound files: sound alone, with X.txt or X.json beside X.wav, LibriSpeech, LJSpeech,
Common Voice, Emilia.

Each id is the sound's path without suffix, relative to the folder that was named, so it is unique. A start, end or
duration in an X.json says where the sound was cut from and is ignored.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_soda.audio.sound import Sound

from ..utterance import Reject, Utterance
from . import files, manifest, rows
from .files import BadLine
from .rows import SOUND_SUFFIXES, Found, Row, Wanted

COMMON_VOICE = ("validated.tsv", "train.tsv")  # the first that is there
BESIDE = {".json": "emilia", ".txt": "pairs"}  # the layout where a sound has such a file beside it
# Files that are not utterances: descriptions of the corpus and other views of its sounds (spectrograms, alignments).
ABOUT = re.compile(
    r"(readme|licen[cs]e|copying|copyright|changelog|changes|notice|authors|citation|version|makefile|"
    r"(check|md5|sha\d+)sums?)(?![a-z0-9])",
    re.IGNORECASE,
)
ABOUT_SUFFIXES = frozenset(
    ".md .rst .pdf .doc .docx .html .htm .xml .json .jsonl .yaml .yml .toml .csv .tsv .xls .xlsx .log .lst .list .scp "
    ".png .jpg .jpeg .gif .svg .py .sh .ipynb .npy .npz .pt .h5 .textgrid .lab .ctm .eaf .srt .vtt .md5 .sha1 .sha256 "
    ".sha512 .sig .asc .bib .cff .sfv".split()
)
# What a layout finds in a folder: (where, row or what is wrong). The names are all of the folder's (`whole`), or those
# that were named.
Rows = Iterator[tuple[str, Row | BadLine]]
Transcripts = Callable[[Path, list[str], Wanted, bool], Rows]


def read(layout: str, root: Path, places: list[Path], wanted: Wanted) -> Found:
    """The utterances of folders (and all folders in them) or of single files, in one of LAYOUTS.

    In the layouts where each sound file is an utterance, every other file is a Reject, so that none is silently
    skipped. Exceptions are hidden files, files named like a sound (X.lab beside X.wav), and files that describe the
    corpus (ABOUT and ABOUT_SUFFIXES)."""
    transcripts, ends, closed = LAYOUTS[layout]
    failed: list[Reject] = []
    for folder, names, whole in _listed(places, closed, failed):
        prefix = f"{files.relative(folder, root)}/" if folder != root else ""

        def make(row: Row, folder: Path = folder) -> Utterance:
            audio = rows.string(row, "audio")
            if not audio:
                raise BadLine("no 'audio'")
            path, _ = rows.inside(folder, f"clips/{audio}" if layout == "commonvoice" else audio)
            id = files.stem(files.relative(path, root))
            recording = emilia_recording(id) if layout == "emilia" else rows.string(row, "recording")
            return rows.utterance({**row, "recording": recording}, Sound(str(path)), id, wanted.needs_text)

        found = transcripts(folder, names, wanted, whole)
        yield from rows.collect(((prefix + where, row) for where, row in found), make, wanted)
        if not whole:
            unfit = [name for name in names if not name.lower().endswith(ends)]
            yield from (Reject(prefix + name, f"not {layout}: a name ends in {', '.join(ends)}") for name in unfit)
        elif layout in ("audio", "pairs", "emilia", "librispeech"):
            text = {"pairs": ".txt", "emilia": ".json"}.get(layout, "")
            rest = names if layout != "emilia" else [name for name in names if not name.lower().endswith(files.TARS)]
            yield from (Reject(prefix + name, reason) for name, reason in _left_over(rest, text))
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
            if closed in folders:  # it may hold millions of files, and another file lists them
                folders.remove(closed)


def _left_over(names: list[str], text: str) -> Iterator[tuple[str, str]]:
    """The files of a folder that look like utterances but are not, and why. Texts end in `text`; if that is empty, a
    .txt describes the corpus."""
    heard = {rows.one_form(files.stem(name)) for name in names if is_sound(name)}
    others: list[str] = []
    for name in names:
        base = rows.one_form(name)
        dots = [place for place, letter in enumerate(base) if letter == "."]
        if not is_sound(name) and not any(base[:dot] in heard for dot in dots) and not ABOUT.match(base):
            others.append(name)
    texts = {name: files.stem(name) for name in others if text and name.lower().endswith(text)}
    spoken = set(texts.values())
    unknown: set[str] = set()
    for name in others:
        stem, suffix = files.stem(name), os.path.splitext(name)[1]
        about = suffix.lower() in ABOUT_SUFFIXES or suffix.lower() == ".txt"
        if name not in texts and (stem in spoken or not about):
            unknown.add(stem)
            yield name, f"not a sound file: {suffix or 'without a suffix'}"
    yield from ((name, "no sound file: only the text") for name, stem in texts.items() if stem not in unknown)


def _audio(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """Sounds; other files are ignored."""
    yield from ((name, {"audio": name}) for name in filter(is_sound, names))


def _pairs(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """X.txt, the text, beside each X.wav."""
    for name in filter(is_sound, names):
        yield name, _beside(folder, name, ".txt")


def _emilia(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """X.json with text, speaker and language beside each X.mp3. X is RECORDING_WNUMBER; a recording's utterances are in
    the order of their numbers."""
    for name in sorted(filter(is_sound, names), key=emilia_order):
        yield name, _beside(folder, name, ".json")


def _beside(folder: Path, name: str, suffix: str) -> Row | BadLine:
    path = folder / f"{os.path.splitext(name)[0]}{suffix}"
    forms = [folder / form for form in rows.both_forms(path.name)]
    try:
        with open(files.regular(next((form for form in forms if form.exists()), path)), "rb") as file:
            raw = file.read(files.LONGEST_LINE + 1)
        if len(raw) > files.LONGEST_LINE:
            return BadLine(f"text too long: {path.name}")
        text = raw.decode("utf-8-sig")
        row = rows.parse_json(text) if suffix == ".json" else {"text": text}
    except BadLine as error:
        return error
    except FileNotFoundError:
        return {"audio": name, rows.NO_TEXT: f"{path.name} is not there"}
    except UnicodeDecodeError:
        return BadLine(f"not UTF-8: {path.name}")
    except OSError as error:
        return BadLine(f"cannot be read: {path.name}: {error.strerror}")
    return {**{key: found for key, found in row.items() if key not in rows.NAMES["audio"]}, "audio": name}


def _librispeech(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt with lines `ID TEXT`, beside ID.flac or another sound file of that
    name. The language is English."""
    seen: set[str] = set()
    sounds = {rows.one_form(files.stem(name)): name for name in _sounds_in(folder, names, whole)}
    for name in (name for name in names if name.endswith(".trans.txt")):
        for number, line in files.lines(folder / name):
            row: Row | BadLine = line if isinstance(line, BadLine) else BadLine("not 'ID TEXT'")
            if isinstance(line, str):
                if not line.strip():
                    continue
                id, _, text = line.strip().partition(" ")
                name_of_sound = sounds.get(rows.one_form(id), f"{id}.flac")
                seen.add(name_of_sound)
                row = {"audio": name_of_sound, "text": text, "speaker": id.split("-")[0], "language": "en"}
            yield f"{name}:{number}", row
    for name in filter(is_sound, names):
        if name not in seen:
            yield name, {"audio": name, rows.NO_TEXT: "no .trans.txt beside it names this file"}


def _sounds_in(folder: Path, names: list[str], whole: bool) -> list[str]:
    """The sound files among a folder's `names`; of two with the same name, the .flac comes last."""
    everything = names if whole else sorted(os.listdir(folder))
    return sorted(filter(is_sound, everything), key=lambda name: name.lower().endswith(".flac"))


def _ljspeech(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """metadata.csv with lines `ID|TEXT|TEXT WITH NUMBERS SPELLED OUT` (one text is enough), beside wavs/ID.wav or
    another sound file of that name. Uses the text as written, or the other one if there is none."""
    for name in (name for name in names if name == "metadata.csv"):
        for number, line in files.lines(folder / name):
            if isinstance(line, str) and not line.strip():
                continue
            row: Row | BadLine = line if isinstance(line, BadLine) else BadLine("not 'ID|TEXT|NORMALIZED TEXT'")
            cells = line.split("|") if isinstance(line, str) else []
            if len(cells) in (2, 3):
                row = dict(zip(("id", "text", "normalized_text"), cells, strict=False))
                row = {**row, "audio": f"wavs/{_with_suffix(folder / 'wavs', cells[0].strip())}"}
            yield f"{name}:{number}", row


def _with_suffix(folder: Path, name: str) -> str:
    """The name of a sound file whose suffix may be missing."""
    if is_sound(name):
        return name
    return next(
        (name + suffix for suffix in SOUND_SUFFIXES if os.path.isfile(folder / f"{name}{suffix}")), f"{name}.wav"
    )


def _commonvoice(folder: Path, names: list[str], wanted: Wanted, whole: bool) -> Rows:
    """A .tsv with client_id, path (in clips/), sentence and locale, beside clips/: the one that was named, or in a
    folder validated.tsv, or else train.tsv. Texts may contain quotes."""
    tables = [name for name in names if name.lower().endswith(".tsv")]
    if whole:
        tables = [name for name in COMMON_VOICE if name in tables][:1]
        if not tables and (folder / "clips").is_dir():
            yield "clips", BadLine(f"no {' or '.join(COMMON_VOICE)} beside it: give the path of another .tsv")
    for table in tables:
        yield from manifest.records(folder / table, table, wanted)


# A layout's function, how its files' names end, and a folder of sound files that is not searched.
LAYOUTS: dict[str, tuple[Transcripts, tuple[str, ...], str]] = {
    "audio": (_audio, SOUND_SUFFIXES, ""),
    "pairs": (_pairs, (*SOUND_SUFFIXES, ".txt"), ""),
    "emilia": (_emilia, (*SOUND_SUFFIXES, ".json"), ""),
    "librispeech": (_librispeech, (".trans.txt", *SOUND_SUFFIXES), ""),
    "ljspeech": (_ljspeech, ("metadata.csv",), "wavs"),
    "commonvoice": (_commonvoice, (".tsv",), "clips"),
}


def is_sound(name: str) -> bool:
    return name.lower().endswith(SOUND_SUFFIXES) and not name.startswith(".")


def emilia_recording(id: str) -> str:
    """What precedes the last _W field; empty if there is none."""
    found = re.fullmatch(r"(.+)_W[^_/]*", id, re.DOTALL)
    return found[1] if found else ""


def emilia_order(name: str) -> tuple[str, int, str]:
    """Sorts by recording, and within it by number: W9 before W10."""
    id = os.path.splitext(name)[0]
    return emilia_recording(id) or id, len(id), name
