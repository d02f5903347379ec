"""Manifests: a line, or a Parquet row, for each utterance, with the path of its sound file or the sound itself.

Columns: audio (path relative to the manifest); optional text, speaker, language, id, recording, prompt, and start and
end (or NeMo's offset and duration) in seconds. rows.NAMES has the other names they go by. jsonl has one object a line;
csv and tsv begin with a line of column names (tsv has no quoting).
"""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.errors import SodaError

from ..utterance import Reject, Sound, Utterance
from . import files, rows
from .files import BadLine
from .rows import Found, Row

KINDS = (".jsonl", ".csv", ".tsv", ".parquet")
FILE_NAMES = tuple(f"manifest{kind}{packed}" for kind in KINDS for packed in ("", *files.PACKED))
EXAMPLE = """Example of a manifest.jsonl (UTF-8), beside the sound files:
{"audio": "wavs/a.wav", "text": "Good morning.", "speaker": "anna", "language": "en"}
{"audio": "wavs/b.flac", "text": "Guten Morgen.", "speaker": "bert", "language": "de"}"""


def read(root: Path, places: list[Path], scratch: Path, needs_text: bool) -> Found:
    """Manifest files, and the manifest.* of folders and of the folders in them.

    The sound files are only checked to exist inside the manifest's folder; a symbolic link in it may point anywhere.
    An id that is not given is the sound's path without suffix, after the manifest's name where there are several.
    Raises SodaError for columns that do not fit, two manifests in a folder, a single file that is none.
    """
    failed: list[Reject] = []
    manifests = [file for place in places for file in (_of_folder(place, failed) if place.is_dir() else [place])]
    for file in manifests:
        name = files.relative(file, root)
        if files.kind(file) not in KINDS:
            if len(manifests) == 1:
                raise SodaError(f"{file}: a manifest's name ends in .jsonl, .csv or .tsv, or .parquet.\n{EXAMPLE}")
            yield Reject(name, f"not a manifest: its name does not end in {', '.join(KINDS)}")
        elif files.kind(file) == ".parquet":
            yield from parquet(file, name, scratch, len(manifests) > 1, needs_text)
        else:
            yield from _text(file, name, len(manifests) > 1, needs_text)
    yield from failed


def _of_folder(folder: Path, failed: list[Reject]) -> Iterator[Path]:
    for here, folders, names in files.walk(folder, failed):
        present = [name for name in FILE_NAMES if name in names]
        if len(present) > 1:
            raise SodaError(f"{here}: has {' and '.join(present)}; keep one, or give the path of the one to use")
        if present:
            folders.clear()  # there is nothing but its sound files
            yield here / present[0]


def _text(file: Path, name: str, several: bool, needs_text: bool) -> Found:
    prefix = f"{files.stem(name)}:" if several else ""

    def make(row: Row) -> Utterance:
        return of_path(row, file.parent, prefix, needs_text)

    yield from rows.collect(records(file, name), make)


def of_path(row: Row, folder: Path, prefix: str, needs_text: bool) -> Utterance:
    """The utterance of a row with a path. Raises BadLine."""
    audio, id = rows.string(row, "audio"), rows.string(row, "id")
    if not audio:
        raise BadLine("no 'audio'")
    path, relative = rows.inside(folder, audio)
    start, end = rows.segment(row)
    if not id:
        id = prefix + files.stem(relative) + (f":{start}-{end}" if start or end else "")
    return rows.utterance(row, Sound(str(path), start=start, end=end), id, needs_text)


def records(file: Path, name: str) -> Iterator[tuple[str, Row | BadLine]]:
    """The lines of a jsonl, csv or tsv as rows, or what is wrong with them, with where they are.

    Raises SodaError for a first line without a column for the sound."""
    parse: Callable[[str], Row] | None = rows.parse_json if files.kind(file) == ".jsonl" else None
    for number, line in files.lines(file):
        where = f"{name}:{number}"
        if isinstance(line, BadLine):
            yield where, line
            continue
        if not line.strip():
            continue
        try:
            if parse is None:  # the first line of a csv or tsv
                parse = _table_parser(file, line)
            else:
                yield where, parse(line)
        except BadLine as error:
            yield where, error


def _table_parser(manifest: Path, header: str) -> Callable[[str], Row]:
    def cells(line: str) -> list[str]:
        if files.kind(manifest) == ".tsv":
            return line.split("\t")
        try:
            return next(csv.reader([line], strict=True, skipinitialspace=True))
        except csv.Error as error:
            raise BadLine(f"not csv: {error}") from None

    names = [name.strip().casefold() for name in cells(header)]
    if not set(names) & set(rows.NAMES["audio"]):
        raise SodaError(
            f"{manifest}: its first line must name the columns, one of {', '.join(rows.NAMES['audio'])} among them, "
            f"but has {names}."
        )

    def parse(line: str) -> Row:
        values = cells(line)
        if len(values) > len(names):
            raise BadLine(
                f"wrong number of cells: {len(values)} cells for {len(names)} columns; quote a text that has the "
                "separator in it"
            )
        return dict(zip(names, values + [""] * (len(names) - len(values)), strict=True))

    return parse


# --- Parquet ---


def parquet(file: Path, name: str, scratch: Path, several: bool, needs_text: bool) -> Found:
    """Rows with the path of a sound file, or with the sound itself in a struct column {bytes, path}, not read here.

    A start and end beside the sound itself say where it was cut from: they are not looked at.

    Raises SodaError for columns that do not fit."""
    try:
        source = files.unpacked(file, scratch) if file.suffix.lower() == ".gz" else file
        table = pq.ParquetFile(source)
        sound = sound_column(file, table.schema_arrow)
    except (pa.ArrowException, OSError, ValueError) as error:
        yield Reject(name, f"not Parquet: or it is cut short ({error})")
        return
    with table:
        prefix = f"{files.stem(name)}:" if several else ""

        def make(row: Row) -> Utterance:
            inner = row.get(sound)
            if not isinstance(inner, dict):
                return of_path(rows.numbers_as_names(row), file.parent, prefix, needs_text)
            others = rows.numbers_as_names({key: found for key, found in row.items() if key != sound})
            if inner["bytes"] is None:
                return of_path({**others, "audio": inner.get("path")}, file.parent, prefix, needs_text)
            number = row[ROW]
            assert isinstance(number, int)
            within = Sound(str(source), row=number, column=sound, name=base_name(inner))
            return rows.utterance(
                others, within, rows.string(others, "id") or f"{files.stem(name)}:{number}", needs_text
            )

        yield from rows.collect(_parquet_rows(table, name, sound), make)


ROW = "\0row"  # beside a row's columns


def _parquet_rows(table: pq.ParquetFile, name: str, sound: str) -> Iterator[tuple[str, Row | BadLine]]:
    schema = table.schema_arrow
    embedded = pa.types.is_struct(schema.field(sound).type)
    others = [
        column
        for column in schema.names
        if column in rows.ALL_NAMES and not pa.types.is_nested(schema.field(column).type)
    ]
    if embedded and schema.field(sound).type.get_field_index("path") >= 0:
        others.append(f"{sound}.path")
    number = 0
    for group in range(table.num_row_groups):
        bytes_there = _bytes_there(table, group, sound) if embedded else None
        # Where some rows have bytes and some a path, only the bytes tell which.
        mixed = [f"{sound}.bytes"] if embedded and bytes_there is None else []
        try:
            for batch in table.iter_batches(8 if mixed else 1024, row_groups=[group], columns=others + mixed):
                for row in python_rows(batch):
                    if isinstance(row, BadLine):
                        yield f"{name}:{number}", row
                        number += 1
                        continue
                    if embedded:
                        held = row.get(sound)
                        inner = held if isinstance(held, dict) else {}
                        known = inner.get("bytes") if mixed else b"" if bytes_there else None
                        row[sound] = {**inner, "bytes": known}
                    yield f"{name}:{number}", {**row, ROW: number}
                    number += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            yield f"{name}:{number}", BadLine(f"damaged: {error}")
            return


def python_rows(batch: pa.RecordBatch) -> list[dict[str, object] | BadLine]:
    """A batch's rows. Arrow does not check that a string is UTF-8: a row where one is not is a BadLine."""
    try:
        return list(batch.to_pylist())
    except UnicodeDecodeError:
        if batch.num_rows == 1:
            return [BadLine("not UTF-8")]
        return [row for number in range(batch.num_rows) for row in python_rows(batch.slice(number, 1))]


def _bytes_there(table: pq.ParquetFile, group: int, sound: str) -> bool | None:
    """Whether all rows of a row group, or none, have the sound itself, from its statistics; None: some have."""
    content = table.metadata.row_group(group)
    for index in range(content.num_columns):
        column = content.column(index)
        if column.path_in_schema == f"{sound}.bytes":
            nulls: int | None = getattr(column.statistics, "null_count", None)
            return True if nulls == 0 else False if nulls == content.num_rows else None
    return False


def sound_column(file: Path, schema: pa.Schema) -> str:
    """The column with the sounds: the first struct with bytes, else one with paths. Raises SodaError for neither."""
    known = [name for name in (*rows.NAMES["audio"], *schema.names) if schema.get_field_index(name) >= 0]
    for name in known:
        held = schema.field(name).type
        if pa.types.is_struct(held) and held.get_field_index("bytes") >= 0:
            return name
    for name in known:
        held: Any = schema.field(name).type
        if name in rows.NAMES["audio"] and (pa.types.is_string(held) or pa.types.is_large_string(held)):
            return name
    raise SodaError(
        f"{file}: has the columns {', '.join(schema.names) or '(none)'}. Wanted: one of "
        f"{', '.join(rows.NAMES['audio'])}, with paths or as a struct {{bytes, path}}; text, speaker, language and id "
        "may follow."
    )


def base_name(inner: Row) -> str:
    """The sound's own name in a struct {bytes, path}."""
    path = inner.get("path")
    return Path(path).name if isinstance(path, str) else ""
