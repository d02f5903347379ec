"""From the columns that a source has to an utterance: the names a column goes by, and the checks all sources share."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..utterance import Reject, Sound, Utterance, one_line
from .files import BadLine

Row = Mapping[str, object]
Found = Iterator[Utterance | Reject]
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".g722")
NAMES = {  # of several that are there, the first that has something in it
    "audio": ("audio", "audio_filepath", "audio_path", "path", "wav", "file"),
    "text": ("text", "transcript", "transcription", "sentence", "normalized_text"),
    "speaker": ("speaker", "speaker_id", "client_id"),
    "language": ("language", "lang", "locale"),
    **{name: (name,) for name in ("id", "recording", "prompt", "start", "end", "offset", "duration")},
}
NO_TEXT = "\0no text"  # beside a row's columns: why it has no text
ALL_NAMES = frozenset(name for names in NAMES.values() for name in names)


def value(row: Row, column: str) -> object:
    """What a row has in a column, under any of its names; None where that is nothing."""
    return next((row[name] for name in NAMES[column] if row.get(name) not in (None, "")), None)


def string(row: Row, column: str) -> str:
    """The same, as a string without outer white space. Raises BadLine where it is none."""
    found = value(row, column)
    if found is None:
        return ""
    if not isinstance(found, str):
        raise BadLine(f"wrong type: {column}: a string is needed, not {type(found).__name__}")
    if _has_surrogates(found):
        raise BadLine(f"not valid Unicode: {column}")
    return found.strip()


def utterance(row: Row, sound: Sound, id: str, needs_text: bool) -> Utterance:
    """Raises BadLine for a value that is no string and, if `needs_text`, where there is no text."""
    text, speaker, language, recording, prompt = (
        string(row, column) for column in ("text", "speaker", "language", "recording", "prompt")
    )
    if _has_surrogates(id):  # of a file whose name is not UTF-8
        raise BadLine("not valid Unicode: the name")
    text = one_line(text)
    if not text and needs_text:
        raise BadLine(f"no transcript: {row[NO_TEXT]}" if NO_TEXT in row else "no transcript")
    return Utterance(id, sound, text, speaker, language, prompt, recording)


def segment(row: Row) -> tuple[float, float]:
    """Start and end in seconds; 0 and 0 for all of it. NeMo's duration counts only beside an offset: without one it is
    the rounded length of the file."""
    start = _seconds(row, "start")
    end = _seconds(row, "end")
    offset, duration = _seconds(row, "offset"), _seconds(row, "duration")
    if start is None and end is None and offset is not None:
        start, end = offset, None if duration is None else offset + duration
    if end is not None and end <= (start or 0.0):
        raise BadLine(f"not a segment: it ends at {end:g} s and starts at {start or 0.0:g} s")
    return start or 0.0, end or 0.0


def _seconds(row: Row, column: str) -> float | None:
    found = value(row, column)
    if found is None:
        return None
    try:
        seconds = math.nan if isinstance(found, bool) else float(found)  # pyright: ignore[reportArgumentType]
    except (ValueError, TypeError, OverflowError):
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise BadLine(f"not a number of seconds: {column}")
    return seconds


def inside(base: Path, name: str) -> tuple[Path, str]:
    """-> the sound file's path, and its path relative to `base`, with '/'. A link in there may point anywhere."""
    if "\0" in name:
        raise BadLine("not a path: there is a zero byte in it")
    root = os.path.abspath(base)
    relative = os.path.relpath(os.path.join(root, name), root)
    if os.path.isabs(name) and relative.startswith(".."):  # the user may have named the folder through a link
        relative = os.path.relpath(name, os.path.realpath(root))
    if relative.split(os.sep)[0] == "..":
        raise BadLine(f"outside the folder: {name!r}")
    path = Path(root, relative)
    check_file(path, name)
    return path, relative.replace(os.sep, "/")


def check_file(path: Path, name: str) -> None:
    try:
        there = path.is_file()
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered
        raise BadLine(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    if not there:
        raise BadLine(f"no file: {name!r}")


def parse_json(line: str) -> dict[str, object]:
    """Raises BadLine where the line is no JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise BadLine(f"not a JSON object: {type(row).__name__}")
    return row


def numbers_as_names(row: Row) -> dict[str, object]:
    """In typed tables and beside them, speakers and ids are often whole numbers."""
    names = (*NAMES["speaker"], *NAMES["id"])
    return {
        key: str(found) if key in names and isinstance(found, int) and not isinstance(found, bool) else found
        for key, found in row.items()
    }


def collect(rows: Iterator[tuple[str, Row | BadLine]], make: Callable[[Row], Utterance]) -> Found:
    """An utterance or a Reject for each (where, row or what is wrong with it)."""
    for where, row in rows:
        try:
            if isinstance(row, BadLine):
                raise row
            found = make(row)
        except BadLine as error:
            found = Reject(where, str(error))
        yield found


def _has_surrogates(text: str) -> bool:
    """Half a character: from JSON's \\ud800 or an undecodable file name. No UTF-8 file could hold it."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)
