"""Parallel corpora: recordings with their translations. Each pair becomes two consecutive utterances of one recording,
the source and then the translation, which prepare.orders=[translation] makes a document of. A translation may have no
sound; its Sound then has an empty path.

    parallel   a manifest with a pair a row: audio, text, language, translation, translation_language and, if it is
               spoken, translation_audio
    cvss       CVSS-T: train.tsv, dev.tsv and test.tsv, each beside a folder of its name. Lines are NAME<tab>TEXT, and
               the sound is SPLIT/NAME.wav
    covost     CoVoST 2: covost_v2.SOURCE_TARGET.tsv with path, translation and split; the translations have no sound

The sources of the last two are Common Voice's: validated.tsv beside clips/, in the folder prepare.audio_root. They are
joined by the name of the clip. The translations are held in memory; Common Voice is read as a stream.
"""

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError

from ..utterance import Reject, Utterance, one_line
from . import files, manifest, rows
from .files import BadLine
from .rows import Found, Row, Wanted

SPLITS = ("train", "dev", "test")
CLIP = re.compile(r"common_voice_([A-Za-z]+(?:-[A-Za-z]+)?)_\d+(\.mp3)?")
COVOST = re.compile(r"covost_v2\.([A-Za-z-]+)_([A-Za-z-]+)\.tsv")
NO_SOUND = Sound("")


@dataclass(frozen=True)
class Translation:
    text: str
    language: str
    where: str  # the line that it is on
    folder: Path | None = None  # of its sound, NAME.wav; None: it has no sound


def _pair(id: str, source: Utterance, sound: Sound, text: str, language: str) -> list[Utterance]:
    """The source, and its translation in the same recording. Raises BadLine if a text or a language is missing."""
    text = one_line(text)
    if not source.text or not text:
        raise BadLine(f"no transcript: of the {'translation' if source.text else 'source'}")
    if not source.language or not language:
        raise BadLine(f"no language: of the {'translation' if source.language else 'source'}")
    other = Utterance(f"{id}:{language}", sound, text, source.speaker, language, source.prompt, id)
    return [Utterance(id, source.audio, source.text, source.speaker, source.language, source.prompt, id), other]


# ---- manifests of pairs


def parallel(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Found:
    """Raises SodaError for a folder without a manifest, and for a manifest that is not text."""
    for place in places:
        file = _manifest_of(place, wanted) if place.is_dir() else place
        if files.kind(file) not in (".jsonl", ".csv", ".tsv", ".json"):
            raise SodaError(f"{file}: a manifest of pairs is a .jsonl, .csv or .tsv, or NeMo's .json")
        name = files.relative(file, root)
        prefix = f"{files.stem(name)}:" if len(places) > 1 else ""
        for where, row in manifest.records(file, name, wanted):
            try:
                if isinstance(row, BadLine):
                    raise row
                yield from _of_row(wanted.named(row), file.parent, prefix, wanted)
            except BadLine as error:
                yield Reject(where, str(error))


def _manifest_of(folder: Path, wanted: Wanted) -> Path:
    names = manifest.of_folder(folder, [path.name for path in sorted(folder.iterdir())], wanted)
    if len(names) != 1:
        raise SodaError(
            f"{folder}: has {' and '.join(names) or 'no manifest'}; a folder of pairs has one manifest.jsonl"
        )
    return folder / names[0]


def _of_row(row: Row, folder: Path, prefix: str, wanted: Wanted) -> list[Utterance]:
    source = manifest.of_path(row, folder, prefix, wanted)
    text, language, audio = (rows.string(row, f"translation{name}") for name in ("", "_language", "_audio"))
    sound = NO_SOUND
    if audio:
        sound = Sound(str(rows.inside(wanted.audio_root or folder, audio)[0]))
    return _pair(f"{source.id}-{language}", source, sound, text, language)  # one source may have several


# ---- translations of Common Voice


def cvss(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Found:
    """Raises SodaError for a folder that lacks a part, by its name."""
    voice = _common_voice(wanted.audio_root, "cvss")
    tables = [file for place in places for file in (_splits(place) if place.is_dir() else [place])]
    found: dict[str, Translation] = {}
    for table in tables:
        sounds = table.with_suffix("")
        if not sounds.is_dir():
            raise SodaError(f"{sounds}: no such folder; {table.name} names the recordings in it. Unpack CVSS-T again.")
        name = files.relative(table, root)
        for number, line in files.lines(table):
            where = f"{name}:{number}"
            if isinstance(line, str) and not line.strip():
                continue
            clip, tab, text = line.partition("\t") if isinstance(line, str) else ("", "", "")
            if not tab:
                yield Reject(where, str(line) if isinstance(line, BadLine) else "not 'NAME<tab>TEXT'")
            elif clip in found:
                yield Reject(where, f"duplicate id: {clip!r}")
            else:
                found[clip] = Translation(text, "en", where, sounds)
    yield from _joined(voice, found, wanted)


def _splits(folder: Path) -> list[Path]:
    tables = [folder / f"{split}.tsv" for split in SPLITS]
    present = [table for table in tables if table.is_file()]
    orphans = [table for table in tables if table not in present and table.with_suffix("").is_dir()]
    if orphans or not present:
        lacking = orphans[0] if orphans else tables[0]
        raise SodaError(
            f"{lacking}: no such file. CVSS-T has train.tsv, dev.tsv and test.tsv beside train/, dev/ and test/"
        )
    return present


def covost(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Found:
    """Raises SodaError for a folder without a table of CoVoST 2, and for a file that is not one."""
    found: dict[str, Translation] = {}
    tables = [
        file for place in places for file in (sorted(place.glob("covost_v2.*.tsv")) if place.is_dir() else [place])
    ]
    if not tables:
        raise SodaError(f"{places[0]}: no covost_v2.SOURCE_TARGET.tsv in it")
    for table in tables:
        languages = COVOST.fullmatch(table.name)
        if not languages:
            raise SodaError(f"{table}: CoVoST 2's tables are called covost_v2.SOURCE_TARGET.tsv")
        for where, row in _covost_rows(table, files.relative(table, root)):
            if isinstance(row, BadLine):
                yield Reject(where, str(row))
            elif row["path"] in found:
                yield Reject(where, f"duplicate id: {row['path']!r}: one target language at a time")
            else:
                found[row["path"]] = Translation(row["translation"], languages[2], where)
    yield from _joined(_common_voice(wanted.audio_root or tables[0].parent, "covost"), found, wanted)


def _covost_rows(table: Path, name: str) -> Iterator[tuple[str, dict[str, str] | BadLine]]:
    """The lines by column. Nothing is quoted; a backslash escapes."""
    columns: list[str] = []
    for number, line in files.lines(table):
        if isinstance(line, BadLine):
            yield f"{name}:{number}", line
        elif line.strip():
            try:
                cells = next(csv.reader([line], delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\"))
            except csv.Error as error:
                yield f"{name}:{number}", BadLine(f"not tsv: {error}")
                continue
            if not columns:
                columns = cells
                if not {"path", "translation"} <= set(columns):
                    raise SodaError(
                        f"{table}: its first line must name the columns path and translation, but has {cells}"
                    )
            elif len(cells) != len(columns):
                yield f"{name}:{number}", BadLine(f"wrong number of cells: {len(cells)} for {len(columns)} columns")
            else:
                yield f"{name}:{number}", dict(zip(columns, cells, strict=True))


def _common_voice(folder: Path | None, layout: str) -> Path:
    """The folder with the sources. Raises SodaError if part of it is missing."""
    if folder is None:
        raise SodaError(
            f"layout {layout}: the sources are in Common Voice 4; set prepare.audio_root to its folder of the "
            "language, which has validated.tsv and clips/"
        )
    for name, there in (("validated.tsv", Path.is_file), ("clips", Path.is_dir)):
        if not there(folder / name):
            raise SodaError(f"{folder / name}: not there. A folder of Common Voice has validated.tsv and clips/")
    return folder


def _joined(voice: Path, translations: dict[str, Translation], wanted: Wanted) -> Found:
    """Pairs in Common Voice's order, then a Reject for each translation without a source."""
    for where, row in manifest.records(voice / "validated.tsv", "validated.tsv", wanted):
        if isinstance(row, BadLine):
            yield Reject(where, str(row))
            continue
        named = wanted.named(row)
        clip = rows.string(named, "audio")
        if translation := translations.pop(clip, None):
            try:
                yield from _of_clip(named, clip, translation, voice, wanted)
            except BadLine as error:
                yield Reject(translation.where, str(error))
    for clip, translation in translations.items():
        yield Reject(translation.where, f"no source: {clip!r} is not in {voice / 'validated.tsv'}")


def _of_clip(row: Row, clip: str, translation: Translation, voice: Path, wanted: Wanted) -> list[Utterance]:
    parts = CLIP.fullmatch(clip)
    if not parts:
        raise BadLine(f"not a clip of Common Voice: {clip!r}")
    path, _ = rows.inside(voice, f"clips/{clip}")
    sound = NO_SOUND
    if translation.folder:
        sound = Sound(str(rows.inside(translation.folder, f"{clip}.wav")[0]))
    id = files.stem(clip)
    source = rows.utterance({**row, "language": parts[1]}, Sound(str(path)), id, wanted.needs_text)
    return _pair(id, source, sound, translation.text, translation.language)
