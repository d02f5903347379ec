"""Turns the columns of a source into utterances: alternative column names, and the checks that all sources share."""

import json
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError

from ..utterance import Reject, Utterance, one_line
from .files import BadLine

Row = Mapping[str, object]
Found = Iterator[Utterance | Reject]
# Formats that libsndfile and FFmpeg's libraries recognise by content (.g722: by name). No other headerless formats.
SOUND_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".g722", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr"),
    *(".ape", ".au", ".caf", ".dts", ".eac3", ".m4b", ".mka", ".mp2", ".mpa", ".mpc", ".oga", ".rf64", ".snd", ".sph"),
    *(".spx", ".tak", ".tta", ".voc", ".w64", ".wave", ".wma", ".wv"),
    *(".3gp", ".avi", ".flv", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"),  # for video, the sound track
)
NAMES = {  # if several exist, the first that is not empty
    "audio": ("audio", "audio_filepath", "audio_path", "path", "wav", "file"),
    "text": ("text", "transcript", "transcription", "sentence", "normalized_text"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    **{name: (name,) for name in ("id", "recording", "prompt", "start", "end", "offset", "duration")},
    **{name: (name,) for name in ("translation", "translation_audio", "translation_language")},
}
NO_TEXT = "\0no text"  # in addition to a row's columns: why it has no text
UNTYPED = "\0untyped"  # in addition to them: numbers only occur as strings
AGREE = Decimal("0.01")  # seconds by which two columns for the same thing may differ, because of rounding


@dataclass
class Wanted:
    """What the user wants from a source: whether an utterance `needs_text`; `columns`, which maps our columns to the
    source's, or to None for one that should not be read; and `audio_root`, the folder that paths in tables are relative
    to and must stay inside, if it is not the table's own."""

    needs_text: bool = True
    columns: Mapping[str, str | None] = field(default_factory=dict)
    audio_root: Path | None = None
    there: list[str] = field(default_factory=list)  # columns of the first row
    found: set[str] = field(default_factory=set)  # those of the columns named in `columns` that were found

    def __post_init__(self) -> None:
        for column, name in self.columns.items():
            if column not in NAMES:
                raise SodaError(f"prepare.columns: there is no column {column!r}; there are {', '.join(NAMES)}.")
            if not name and column == "audio":
                raise SodaError("prepare.columns: audio: a column is needed; without the sound there is nothing.")
        if self.audio_root and not self.audio_root.is_dir():
            raise SodaError(f"prepare.audio_root: {self.audio_root}: no such folder.")

    def names(self, column: str) -> tuple[str, ...]:
        """The names that one of our columns may have in the source."""
        if column not in self.columns:
            return NAMES[column]
        name = self.columns[column]
        return (name,) if name else ()

    def see(self, names: list[str]) -> None:
        """Records the columns of a table or a row."""
        self.there = self.there or names
        self.found |= set(names) & set(filter(None, self.columns.values()))

    def named(self, row: Row) -> Row:
        """The row under our names, without excluded columns."""
        if not self.columns:
            return row
        if own := [name for name in row if not name.startswith("\0")]:
            self.see(own)
        hidden = {name for column in self.columns for name in NAMES[column]}
        kept = {name: found for name, found in row.items() if name not in hidden}
        return kept | {NAMES[column][0]: row[name] for column, name in self.columns.items() if name and name in row}

    def check_found(self) -> None:
        """Called at the end of a source. Raises SodaError for a column that no row had."""
        lacking = [f"{column}: {name}" for column, name in self.columns.items() if name and name not in self.found]
        if self.there and lacking:
            raise SodaError(
                f"prepare.columns: {', '.join(lacking)}: no row has such a column; the first one has "
                f"{', '.join(self.there)}."
            )


def value(row: Row, column: str) -> object:
    """A row's value in a column, under any of its names; None if it is empty."""
    return next((row[name] for name in NAMES[column] if row.get(name) not in (None, "")), None)


def string(row: Row, column: str) -> str:
    """The same, as a string without surrounding white space. Speakers, ids and the like are often integers, which are
    used as names; if their column has gaps, pandas turns them into floats. Raises BadLine for anything else."""
    found = value(row, column)
    if found is None:
        return ""
    if (
        column not in ("audio", "text", "translation")
        and isinstance(found, int | float)
        and not isinstance(found, bool)
    ):
        found = str(int(found)) if found == found // 1 else found
    if not isinstance(found, str):
        raise BadLine(f"wrong type: {column}: a string is needed, not {type(found).__name__}")
    if _has_surrogates(found):
        raise BadLine(f"not valid Unicode: {column}")
    return found.strip()


def own_id(row: Row, otherwise: str, prefix: str = "") -> str:
    """The id column's value, after `prefix`. A number may count something that repeats (in FLEURS, the sentence), so it
    is only appended to the id used `otherwise`."""
    own = string(row, "id")
    if not own:
        return otherwise
    is_number = not isinstance(value(row, "id"), str) or (UNTYPED in row and re.fullmatch("0|[1-9][0-9]*", own))
    return f"{otherwise}:{own}" if is_number else f"{prefix}{own}"


def utterance(row: Row, sound: Sound, id: str, needs_text: bool) -> Utterance:
    """Raises BadLine for a value that is not a string and, if `needs_text`, for a missing text."""
    text, speaker, language, recording, prompt = (
        string(row, column) for column in ("text", "speaker", "language", "recording", "prompt")
    )
    if _has_surrogates(id):  # from a file whose name is not UTF-8
        raise BadLine("not valid Unicode: the name")
    text = one_line(text)
    if not text and needs_text:
        raise BadLine(f"no transcript: {row[NO_TEXT]}" if NO_TEXT in row else "no transcript")
    return Utterance(id, sound, text, speaker, language, prompt, recording)


def segment(row: Row) -> tuple[float, float, float]:
    """Start and end in seconds, and the file's length. Start and end are 0 for the whole file; only then is the length
    set, from a lone duration as in NeMo's manifests, otherwise it is 0. Raises BadLine for contradictory columns.
    Numbers are added as decimals: 1.1 and 2.2 are 3.3."""
    start, end, offset, duration = (_seconds(row, column) for column in ("start", "end", "offset", "duration"))
    if start is not None and offset is not None and abs(start - offset) > AGREE:
        raise BadLine(f"contradiction: start {start} s and offset {offset} s")
    start = offset if start is None else start
    if start is None and end is None:
        if duration == 0:
            raise BadLine("not a segment: it lasts 0 s")
        return 0.0, 0.0, float(duration or 0)
    if duration is not None:
        until = (start or 0) + duration
        if end is not None and abs(end - until) > AGREE:
            raise BadLine(f"contradiction: {start or 0} s and a duration of {duration} s, and end {end} s")
        end = until if end is None else end
    begin, stop = float(start or 0), None if end is None else float(end)
    if stop is not None and stop <= begin:
        raise BadLine(f"not a segment: it ends at {stop:g} s and starts at {begin:g} s")
    return begin, stop or 0.0, 0.0


def _seconds(row: Row, column: str) -> Decimal | None:
    found = value(row, column)
    if found is None:
        return None
    try:
        seconds = Decimal("nan" if isinstance(found, bool) else str(found).strip())
    except (InvalidOperation, ValueError):  # ValueError: an integer of very many digits
        seconds = Decimal("nan")
    if seconds.is_nan() or not 0 <= seconds < 10**9:
        raise BadLine(f"not a number of seconds: {column}")
    return abs(seconds)  # of -0.0, too


def inside(base: Path, name: str) -> tuple[Path, str]:
    """Returns the sound file's path, and its path relative to `base`, with '/'. A link in it may point anywhere."""
    name = plain_path(name)
    root = os.path.abspath(base)
    relative = os.path.relpath(os.path.join(root, name), root)
    if os.path.isabs(name) and relative.startswith(".."):  # the user may have named the folder through a link
        relative = os.path.relpath(name, os.path.realpath(root))
    if relative.split(os.sep)[0] == "..":
        raise BadLine(f"outside the folder: {name!r}; prepare.audio_root names the one that paths may lead into")
    return existing(Path(root), relative, name), relative.replace(os.sep, "/")


def plain_path(name: str) -> str:
    """The path; ~/a and file:///home/me/a%20b are resolved. Raises BadLine for anything that is not a path."""
    if name.startswith("file://"):
        host, slash, path = name.removeprefix("file://").partition("/")
        if host not in ("", "localhost"):
            raise BadLine(f"not on this machine: {name!r}")
        name = slash + urllib.parse.unquote(path)
    if "\0" in name:
        raise BadLine("not a path: there is a zero byte in it")
    return os.path.expanduser(name)


def existing(folder: Path, relative: str, name: str) -> Path:
    """The file in a folder. Accents can be written in two ways (NFC, NFD), and a file and the table that names it often
    come from different systems. Raises BadLine if there is no such file."""
    path = folder / relative
    try:
        if not path.is_file() and not relative.isascii():
            path = folder
            for part in Path(relative).parts:
                forms = [path / form for form in both_forms(part)]
                path = next((form for form in forms if form.exists()), forms[0])
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, a folder without access
        raise BadLine(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not there:
        raise BadLine(f"no file: {name!r}")
    return path


def both_forms(name: str) -> list[str]:
    """The name, and its other Unicode forms if it has any."""
    return list(dict.fromkeys((name, unicodedata.normalize("NFC", name), unicodedata.normalize("NFD", name))))


def one_form(name: str) -> str:
    """The same for names that differ only in their Unicode form."""
    return unicodedata.normalize("NFC", name)


def parse_json(line: str) -> dict[str, object]:
    """Raises BadLine if the line is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadLine(f"not a JSON object: {type(row).__name__}")
    return row


def collect(rows: Iterator[tuple[str, Row | BadLine]], make: Callable[[Row], Utterance], wanted: Wanted) -> Found:
    """Yields an utterance or a Reject for each (where, row or what is wrong with it). `make` gets rows under our
    names."""
    for where, row in rows:
        try:
            if isinstance(row, BadLine):
                raise row
            found = make(wanted.named(row))
        except BadLine as error:
            found = Reject(where, str(error))
        yield found


def _has_surrogates(text: str) -> bool:
    """Half a character, from JSON's \\ud800 or an undecodable file name. No UTF-8 file could hold it."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
