"""Streams text documents from JSONL, Parquet and plain text files."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.errors import SodaError

from .sources import files
from .sources.files import BadLine
from .sources.manifest import python_rows
from .sources.rows import Row, parse_json
from .utterance import Reject

KINDS = (".jsonl", ".parquet", ".txt")


def read_texts(patterns: list[str]) -> Iterator[str | Reject]:
    """The documents in all files that the patterns (files, globs, folders) name, ordered by pattern, file and line.

    A document is the field `text` of each line of a .jsonl, the column `text` of each row of a .parquet, or each
    non-blank line of a .txt; .jsonl and .txt also as .gz and .zst. Surrounding white space is stripped, nothing else is
    changed. An unusable line or file becomes a Reject. Raises SodaError for a pattern that names nothing, and for a
    Parquet file without the column.
    """
    for pattern in patterns:
        _, places = files.expand(pattern)
        failed: list[Reject] = []
        for place in places:
            for file in _of_folder(place, failed) if place.is_dir() else [place]:
                for where, text in _documents(file):
                    if isinstance(text, str):
                        text = _checked(text)
                    yield Reject(where, str(text)) if isinstance(text, BadLine) else text
        yield from failed


def _of_folder(folder: Path, failed: list[Reject]) -> Iterator[Path]:
    for here, _, names in files.walk(folder, failed):
        yield from (here / name for name in names if files.kind(name) in KINDS)


def _documents(file: Path) -> Iterator[tuple[str, str | BadLine]]:
    kind = files.kind(file)
    if kind == ".parquet" and file.suffix.lower() == ".parquet":
        yield from _parquet(file)
    elif kind in (".jsonl", ".txt"):
        for number, line in files.lines(file):
            if isinstance(line, BadLine) or line.strip():
                yield f"{file}:{number}", _field(line) if kind == ".jsonl" and isinstance(line, str) else line
    else:
        yield str(file), BadLine(f"not a text file: its name does not end in {', '.join(KINDS)}")


def _field(line: str) -> str | BadLine:
    try:
        row = parse_json(line)
    except BadLine as error:
        return error
    return _text_of(row)


def _text_of(row: Row) -> str | BadLine:
    if "text" not in row:
        return BadLine("no 'text'")
    text = row["text"]
    return (
        text if isinstance(text, str) else BadLine(f"wrong type: text: a string is needed, not {type(text).__name__}")
    )


def _parquet(file: Path) -> Iterator[tuple[str, str | BadLine]]:
    number = 0
    try:
        with pq.ParquetFile(files.regular(file)) as table:
            names = table.schema_arrow.names
            if "text" not in names:
                raise SodaError(f"{file}: has the columns {', '.join(names) or '(none)'}; a column 'text' is needed.")
            for batch in table.iter_batches(256, columns=["text"]):
                for row in python_rows(batch):
                    yield f"{file}:{number}", row if isinstance(row, BadLine) else _text_of(row)
                    number += 1
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = "damaged" if number else "not Parquet: or it is cut short"
        yield f"{file}:{number}" if number else str(file), BadLine(f"{reason} ({error})")


def _checked(text: str) -> str | BadLine:
    text = text.strip()
    if not text:
        return BadLine("empty text")
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # half a character, from JSON's \ud800
        return BadLine("not valid Unicode: text")
    return text
