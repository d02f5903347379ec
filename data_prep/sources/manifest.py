"""Manifests: one line or Parquet row per utterance, with the path of its sound file or the sound itself.

Columns: audio (path relative to the manifest); optional text, speaker, language, id, recording, prompt, and start (or
offset) and end or duration in seconds. rows.NAMES lists their alternative names. jsonl and NeMo's json have one object
per line; csv and tsv begin with a line of column names. A tsv counts as quoted only if all of it is what Python's csv
module would write, because Common Voice's unquoted tsv has quotes in its texts.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.audio.sound import Sound
from megatron_soda.errors import SodaError

from ..utterance import Reject, Utterance
from . import files, rows, tables
from .files import BadLine
from .rows import Found, Row, Wanted

KINDS = (".jsonl", ".csv", ".tsv", ".parquet", ".json")
FILE_NAMES = tuple(f"manifest{kind}{packed}" for kind in KINDS for packed in ("", *files.PACKED))
EXAMPLE = """Example of a manifest.jsonl (UTF-8), beside the sound files:
{"audio": "wavs/a.wav", "text": "Good morning.", "speaker": "anna", "language": "en"}
{"audio": "wavs/b.flac", "text": "Guten Morgen.", "speaker": "bert", "language": "de"}"""


def read(root: Path, places: list[Path], scratch: Path, wanted: Wanted) -> Found:
    """Manifest files, and the manifest.* of folders and of the folders in them.

    Sound files are only checked to exist inside the manifest's folder or wanted.audio_root; a symbolic link there may
    point anywhere. A missing id becomes the sound's path without suffix, prefixed with the manifest's name if there are
    several. Raises SodaError for unsuitable columns, two manifests in a folder, or a single file that is not a
    manifest.
    """
    failed: list[Reject] = []
    manifests = [
        file for place in places for file in (_of_folder(place, failed, wanted) if place.is_dir() else [place])
    ]
    for file in manifests:
        name = files.relative(file, root)
        if files.kind(file) not in KINDS:
            if len(manifests) == 1:
                raise SodaError(
                    f"{file}: a manifest's name ends in .jsonl, .csv or .tsv, or .parquet, or .json.\n{EXAMPLE}"
                )
            yield Reject(name, f"not a manifest: its name does not end in {', '.join(KINDS)}")
        elif files.kind(file) == ".parquet":
            yield from parquet(file, name, scratch, len(manifests) > 1, wanted)
        else:
            yield from _text(file, name, len(manifests) > 1, wanted)
    yield from failed


def is_manifest(path: Path, wanted: Wanted) -> bool:
    """Decides by name; for a .json, which may be anything, by the first line."""
    if files.kind(path) != ".json":
        return files.kind(path) in KINDS
    for _, line in files.lines(path):
        if isinstance(line, BadLine) or not line.strip():
            continue
        try:
            return not set(rows.parse_json(line)).isdisjoint(wanted.names("audio"))
        except BadLine:
            return False
    return False


def of_folder(folder: Path, names: list[str], wanted: Wanted) -> list[str]:
    """Which of the files of a folder are its manifests."""
    present = set(names)
    return [name for name in FILE_NAMES if name in present and is_manifest(folder / name, wanted)]


def _of_folder(folder: Path, failed: list[Reject], wanted: Wanted) -> Iterator[Path]:
    for here, folders, names in files.walk(folder, failed):
        present = of_folder(here, names, wanted)
        if len(present) > 1:
            raise SodaError(f"{here}: has {' and '.join(present)}; keep one, or give the path of the one to use")
        if present:
            folders.clear()  # it contains only its sound files
            yield here / present[0]
        elif not wanted.audio_root and (sounds := sum(name.lower().endswith(rows.SOUND_SUFFIXES) for name in names)):
            failed.append(Reject(str(here), f"no manifest: {sounds} sound files in a folder without one"))


def _text(file: Path, name: str, several: bool, wanted: Wanted) -> Found:
    prefix = f"{files.stem(name)}:" if several else ""

    def make(row: Row) -> Utterance:
        return of_path(row, file.parent, prefix, wanted)

    yield from rows.collect(records(file, name, wanted), make, wanted)


def of_path(row: Row, folder: Path, prefix: str, wanted: Wanted) -> Utterance:
    """The utterance of a row with a path. Raises BadLine."""
    audio = rows.string(row, "audio")
    if not audio:
        raise BadLine("no 'audio'")
    path, relative = _sound_file(audio, folder, wanted.audio_root)
    start, end, seconds = rows.segment(row)
    id = rows.own_id(row, prefix + files.stem(relative) + (f":{start}-{end}" if start or end else ""))
    return rows.utterance(row, Sound(str(path), start=start, end=end, seconds=seconds), id, wanted.needs_text)


def _sound_file(audio: str, folder: Path, root: Path | None) -> tuple[Path, str]:
    """A sound's path, also relative to `root`, or to the manifest's `folder` if no root is given."""
    try:
        return rows.inside(root or folder, audio)
    except BadLine:
        if root:
            with contextlib.suppress(BadLine):  # relative to the manifest, but inside `root`
                return rows.inside(root, os.path.join(os.path.abspath(folder), audio))
        raise


def records(file: Path, name: str, wanted: Wanted) -> Iterator[tuple[str, Row | BadLine]]:
    """The lines of a jsonl, json, csv or tsv as rows, or what is wrong with them, and where they begin. Raises
    SodaError if the first line of a csv or tsv has no column for the sound."""
    if files.kind(file) in (".csv", ".tsv"):
        yield from ((f"{name}:{number}", row) for number, row in tables.read(file, wanted))
        return
    for number, line in files.lines(file):
        if isinstance(line, BadLine):
            yield f"{name}:{number}", line
        elif line.strip():
            try:
                yield f"{name}:{number}", rows.parse_json(line)
            except BadLine as error:
                yield f"{name}:{number}", error


# --- Parquet ---


def parquet(file: Path, name: str, scratch: Path, several: bool, wanted: Wanted) -> Found:
    """Rows with the path of a sound file, or with the sound itself in a struct column {bytes, path}, which is not read
    here. A start and end beside embedded sound say where it was cut from and are ignored.

    Raises SodaError for unsuitable columns."""
    try:
        source = files.unpacked(file, scratch) if file.suffix.lower() == ".gz" else file
        table = pq.ParquetFile(files.regular(source))
        sound = sound_column(file, table.schema_arrow, wanted)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Reject(name, f"not Parquet: or it is cut short ({error})")
        return
    with table:
        prefix = f"{files.stem(name)}:" if several else ""

        def make(row: Row) -> Utterance:
            inner = row[SOUND]
            if not isinstance(inner, dict):
                return of_path({**row, "audio": inner}, file.parent, prefix, wanted)
            if inner["bytes"] is None:
                return of_path({**row, "audio": inner.get("path")}, file.parent, prefix, wanted)
            number = row[ROW]
            assert isinstance(number, int)
            within = Sound(str(source), row=number, column=sound, name=base_name(inner))
            id = rows.own_id(row, f"{files.stem(name)}:{number}")
            return rows.utterance(row, within, id, wanted.needs_text)

        yield from rows.collect(_parquet_rows(table, name, sound, wanted), make, wanted)


ROW, SOUND = "\0row", "\0sound"  # in addition to a row's columns: its number, and the content of the sound column


def known_columns(schema: pa.Schema, sound: str, wanted: Wanted) -> list[str]:
    """The columns that we use, except that of an embedded `sound`."""
    ours = {name for column in rows.NAMES for name in wanted.names(column)}
    known = [name for name in schema.names if name in ours and not pa.types.is_nested(schema.field(name).type)]
    wanted.there = wanted.there or list(schema.names)
    wanted.see([*known, sound])
    return known


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names by column, for columns in which datasets stores class numbers (a ClassLabel)."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        labels = {name: feature.get("names") for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return {}
    return {
        name: names
        for name, names in labels.items()
        if isinstance(names, list) and all(isinstance(one, str) for one in names)
    }


def with_class_names(row: dict[str, object], classes: dict[str, list[str]]) -> dict[str, object]:
    """The row with class numbers replaced by names; -1 means none."""
    for column, names in classes.items():
        number = row.get(column)
        if isinstance(number, int) and number < len(names):
            row[column] = names[number] if number >= 0 else None
    return row


def _parquet_rows(table: pq.ParquetFile, name: str, sound: str, wanted: Wanted) -> Iterator[tuple[str, Row | BadLine]]:
    schema = table.schema_arrow
    embedded = pa.types.is_struct(schema.field(sound).type)
    classes = class_names(schema)
    others = known_columns(schema, sound, wanted)
    if embedded and schema.field(sound).type.get_field_index("path") >= 0:
        others.append(f"{sound}.path")
    number = 0
    for group in range(table.num_row_groups):
        bytes_there = _bytes_there(table, group, sound) if embedded else None
        # If some rows have bytes and others a path, only the bytes tell them apart.
        mixed = [f"{sound}.bytes"] if embedded and bytes_there is None else []
        try:
            for batch in table.iter_batches(8 if mixed else 1024, row_groups=[group], columns=others + mixed):
                for row in python_rows(batch):
                    if isinstance(row, BadLine):
                        yield f"{name}:{number}", row
                        number += 1
                        continue
                    held: Any = row.pop(sound, None)
                    if embedded:
                        inner = held if isinstance(held, dict) else {}
                        known = inner.get("bytes") if mixed else b"" if bytes_there else None
                        held = {**inner, "bytes": known}
                    yield f"{name}:{number}", {**with_class_names(row, classes), ROW: number, SOUND: held}
                    number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{name}:{number}", BadLine(f"damaged: {error}")
            return


def python_rows(batch: pa.RecordBatch) -> list[dict[str, object] | BadLine]:
    """A batch's rows. Arrow does not check that strings are UTF-8; a row with one that is not is a BadLine."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadLine("not UTF-8")]
        return [row for number in range(batch.num_rows) for row in python_rows(batch.slice(number, 1))]


def _bytes_there(table: pq.ParquetFile, group: int, sound: str) -> bool | None:
    """From a row group's statistics, whether all of its rows or none have embedded sound; None: some do."""
    content = table.metadata.row_group(group)
    for index in range(content.num_columns):
        column = content.column(index)
        if column.path_in_schema == f"{sound}.bytes":
            nulls: int | None = getattr(column.statistics, "null_count", None)
            return True if nulls == 0 else False if nulls == content.num_rows else None
    return False


def sound_column(file: Path, schema: pa.Schema, wanted: Wanted) -> str:
    """The sound column: the first struct with bytes, otherwise one with paths. Raises SodaError if there is neither."""
    paths = wanted.names("audio")
    any_name = () if "audio" in wanted.columns else schema.names
    known = [name for name in (*paths, *any_name) if schema.get_field_index(name) >= 0]
    for name in known:
        held = schema.field(name).type
        if pa.types.is_struct(held) and held.get_field_index("bytes") >= 0:
            return name
    for name in known:
        held: Any = schema.field(name).type
        if name in paths and (pa.types.is_string(held) or pa.types.is_large_string(held)):
            return name
    raise SodaError(
        f"{file}: has the columns {', '.join(schema.names) or '(none)'}. Wanted: one of "
        f"{', '.join(paths)}, with paths or as a struct {{bytes, path}}; text, speaker, language and id "
        "may follow."
    )


def base_name(inner: Row) -> str:
    """The sound's own name in a struct {bytes, path}."""
    path = inner.get("path")
    return Path(path).name if isinstance(path, str) else ""
