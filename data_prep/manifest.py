"""The user's own speech: a folder of sound files with a manifest, or with X.txt beside each X.wav.

One utterance a line. Columns: audio (path relative to the manifest) and text; optional speaker, language, id.
jsonl has one object a line; csv and tsv begin with a line of column names (tsv has no quoting).
"""

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from megatron_soda.errors import SodaError

from .utterance import Reject, Utterance, one_line, prompt_key

NAMES = ("manifest.jsonl", "manifest.csv", "manifest.tsv")
COLUMNS = ("audio", "text", "speaker", "language", "id")
SOUND_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".g722")
EXAMPLE = """Example of a manifest.jsonl (UTF-8), beside the sound files:
{"audio": "wavs/a.wav", "text": "Good morning.", "speaker": "anna", "language": "en"}
{"audio": "wavs/b.flac", "text": "Guten Morgen.", "speaker": "bert", "language": "de"}"""

Row = dict[str, object]


class BadLine(ValueError):  # noqa: N818  (becomes a Reject)
    """Why one line is no utterance."""


def read(folder: Path) -> tuple[list[Utterance], list[Reject]]:
    """Reads a folder (or a manifest file itself): its utterances, and one Reject for each bad line or file.

    The sound files are only checked to exist inside the folder; a symbolic link in it may point anywhere.
    Raises SodaError when there is no folder, no manifest and no X.txt, or not one usable line.
    """
    folder = Path(folder)
    try:
        manifest = _find_manifest(folder)
        if manifest is None:
            found, rejects = _collect(folder, _pairs(folder))
            source = f"{folder}: found neither {', '.join(NAMES)} nor sound files with X.txt beside X.wav"
        else:
            found, rejects = _collect(manifest.parent, _lines(manifest))
            source = f"{manifest}: not one usable line"
    except OSError as error:
        raise SodaError(f"{error.filename or folder}: cannot be read ({error.strerror})") from None
    if not found:
        shown = "".join(f"\n  {reject.where}: {reject.reason}" for reject in rejects[:3])
        total = f"\n{len(rejects)} rejected, the first:{shown}" if rejects else ""
        raise SodaError(f"{source}.{total}\n{EXAMPLE}")
    return found, rejects


def _find_manifest(folder: Path) -> Path | None:
    if folder.is_file():
        if folder.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
            raise SodaError(f"{folder}: a manifest's name ends in .jsonl, .csv or .tsv.\n{EXAMPLE}")
        return folder
    if not folder.is_dir():
        raise SodaError(f"{folder}: no such folder. A folder of sound files with a manifest is needed.\n{EXAMPLE}")
    present = [folder / name for name in NAMES if (folder / name).is_file()]
    if len(present) > 1:
        names = " and ".join(path.name for path in present)
        raise SodaError(f"{folder}: has {names}; keep one, or give the path of the one to use")
    return present[0] if present else None


# A source yields (where, row or why not); the same checks follow for all of them.
def _collect(root: Path, rows: Iterator[tuple[str, Row | BadLine]]) -> tuple[list[Utterance], list[Reject]]:
    found: dict[str, Utterance] = {}
    rejects: list[Reject] = []
    for where, row in rows:
        try:
            if isinstance(row, BadLine):
                raise row
            utterance = _utterance(root, row)
            if utterance.id in found:
                raise BadLine(f"duplicate id {utterance.id!r}")
            found[utterance.id] = utterance
        except BadLine as error:
            rejects.append(Reject(where, str(error)))
    return list(found.values()), rejects


def _utterance(root: Path, row: Row) -> Utterance:
    values: dict[str, str] = {}
    for column in COLUMNS:
        value = row.get(column)
        if value is not None and not isinstance(value, str):
            raise BadLine(f"{column}: a string is needed, not {type(value).__name__}")
        values[column] = value or ""
        if _has_surrogates(values[column]):
            raise BadLine(f"{column}: not valid Unicode")
    if not values["audio"].strip():
        raise BadLine("no 'audio'")
    audio, relative = _inside(root, values["audio"].strip())
    text = one_line(values["text"])
    if not text:
        raise BadLine("no transcript")
    id = values["id"].strip() or os.path.splitext(relative)[0]
    speaker, language = values["speaker"].strip(), values["language"].strip()
    return Utterance(id, audio, text, speaker, language, prompt_key(text, otherwise=id))


def _inside(root: Path, name: str) -> tuple[Path, str]:
    """-> the sound file's path and its path relative to `root`, with '/'."""
    if "\0" in name:
        raise BadLine("audio: not a path")
    base = os.path.abspath(root)
    relative = os.path.relpath(os.path.join(base, name), base)
    if os.path.isabs(name) and relative.startswith(".."):  # the user may have named the folder through a link
        relative = os.path.relpath(name, os.path.realpath(base))
    if relative.split(os.sep)[0] == "..":
        raise BadLine(f"audio: {name!r} is outside the manifest's folder")
    path = Path(base, relative)
    try:
        if not path.is_file():
            raise BadLine(f"audio: no file {name!r}")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise BadLine(f"audio: {error.strerror}") from None
    return path, relative.replace(os.sep, "/")


def _has_surrogates(text: str) -> bool:
    """Half a character: from JSON's \\ud800 or an undecodable file name. No UTF-8 file could hold it."""
    return any("\ud800" <= letter <= "\udfff" for letter in text)


def _lines(manifest: Path) -> Iterator[tuple[str, Row | BadLine]]:
    suffix = manifest.suffix.lower()
    parse: Callable[[str], Row] | None = _parse_json if suffix == ".jsonl" else None
    raw_lines = manifest.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    for number, raw in enumerate(raw_lines, start=1):
        where = f"{manifest.name}:{number}"
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            yield where, BadLine("not UTF-8")
            continue
        if not line.strip():
            continue
        try:
            if parse is None:  # the first line of a csv or tsv
                parse = _table_parser(manifest, line)
            else:
                yield where, parse(line)
        except BadLine as error:
            yield where, error


def _parse_json(line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadLine(f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadLine(f"not a JSON object but {type(row).__name__}")
    return row


def _table_parser(manifest: Path, header: str) -> Callable[[str], Row]:
    def cells(line: str) -> list[str]:
        if manifest.suffix.lower() == ".tsv":
            return line.split("\t")
        try:
            return next(csv.reader([line], strict=True, skipinitialspace=True))
        except csv.Error as error:
            raise BadLine(f"not csv ({error})") from None

    names = [name.strip().casefold() for name in cells(header)]
    if "audio" not in names:
        raise SodaError(f"{manifest}: its first line must name the columns, 'audio' among them, but has {names}.")

    def parse(line: str) -> Row:
        values = cells(line)
        if len(values) > len(names):
            raise BadLine(f"{len(values)} cells for {len(names)} columns; quote a text that has the separator in it")
        return dict(zip(names, values, strict=False))

    return parse


def _pairs(folder: Path) -> Iterator[tuple[str, Row | BadLine]]:
    for audio in sorted(folder.rglob("*")):
        if audio.suffix.lower() not in SOUND_SUFFIXES or audio.name.startswith(".") or not audio.is_file():
            continue
        name = audio.relative_to(folder).as_posix()
        transcript = audio.with_suffix(".txt")
        try:
            yield name, {"audio": name, "text": transcript.read_bytes().decode("utf-8-sig")}
        except FileNotFoundError:
            yield name, BadLine(f"no transcript ({transcript.name} is not there)")
        except UnicodeDecodeError:
            yield name, BadLine(f"{transcript.name}: not UTF-8")
        except OSError as error:
            yield name, BadLine(f"{transcript.name}: {error.strerror}")
