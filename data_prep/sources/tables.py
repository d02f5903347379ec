"""csv and tsv as rows, including quoted cells that span lines, stray quotes, and tsv without any quoting."""

import csv
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_soda.errors import SodaError

from . import files, rows
from .files import BadLine
from .rows import Row, Wanted

MOST_LINES = 1000  # in one quoted cell


def read(file: Path, wanted: Wanted) -> Iterator[tuple[int, Row | BadLine]]:
    """The records of a csv or tsv as rows, or what is wrong with them, and the lines on which they begin. Raises
    SodaError if the first line has no column for the sound."""
    if files.kind(file) == ".csv":
        cells = _csv_cells
    else:
        cells = _quoted_tsv_cells if _is_quoted(file) else _tsv_cells
    names: list[str] = []
    source, ahead = files.lines(file), deque[tuple[int, str | BadLine]]()
    while (item := ahead.popleft() if ahead else next(source, None)) is not None:
        number, line = item
        if isinstance(line, BadLine):
            yield number, line
            continue
        if not line.strip():
            continue
        try:
            try:
                values = cells(line)
            except _OpenCell:
                values = _over_lines(line, source, ahead, cells, len(names))
            if names:
                yield number, _row(names, values)
            else:
                names = _names(file, values, wanted)
        except BadLine as error:
            yield number, error


def _names(file: Path, header: list[str], wanted: Wanted) -> list[str]:
    given = [name.strip() for name in header]
    names = [name if name in wanted.columns.values() else name.casefold() for name in given]
    if not set(names) & set(wanted.names("audio")):
        raise SodaError(
            f"{file}: its first line must name the columns, one of {', '.join(wanted.names('audio'))} among them, "
            f"but has {given}."
        )
    wanted.there = wanted.there or given
    wanted.see(names)
    return names


def _row(names: list[str], values: list[str]) -> Row:
    if len(values) > len(names):
        raise BadLine(
            f"wrong number of cells: {len(values)} cells for {len(names)} columns; quote a text that has the "
            "separator in it"
        )
    return {**dict(zip(names, values + [""] * (len(names) - len(values)), strict=True)), rows.UNTYPED: True}


class _OpenCell(BadLine):
    """A quoted cell does not end within these lines."""


def _tsv_cells(line: str) -> list[str]:
    return line.split("\t")


def _quoted_tsv_cells(line: str) -> list[str]:
    return _parsed(line, delimiter="\t")


def _csv_cells(line: str) -> list[str]:
    return _parsed(line, skipinitialspace=True)


def _parsed(line: str, **options: Any) -> list[str]:
    try:
        return next(csv.reader([line], strict=True, **options))
    except csv.Error as error:
        kind = _OpenCell if str(error) == "unexpected end of data" else BadLine
        raise kind(f"not csv: {error}") from None


def _over_lines(
    line: str,
    source: Iterator[tuple[int, str | BadLine]],
    ahead: deque[tuple[int, str | BadLine]],
    cells: Callable[[str], list[str]],
    columns: int,
) -> list[str]:
    """The cells of a record that continues on the following lines, which are then taken from `ahead`. If no line closes
    it properly, the quote is a stray one: only `line` is bad, and the following lines stand on their own."""
    parts, size = [line], len(line)
    while len(parts) <= MOST_LINES and size <= files.LONGEST_LINE:
        if len(parts) > len(ahead):
            item = next(source, None)
            if item is None:
                break
            ahead.append(item)
        _, more = ahead[len(parts) - 1]
        if isinstance(more, BadLine):
            break
        parts.append(more)
        size += len(more)
        if '"' not in more:
            continue
        try:
            values = cells("\n".join(parts))
        except _OpenCell:
            continue
        except BadLine:
            break
        if columns and len(values) > columns:
            break
        for _ in parts[1:]:
            ahead.popleft()
        return values
    raise BadLine("not csv: a quote is not closed")


_CELL = r'(?:"[^"]*(?:""[^"]*)*"|[^"\t]*)'
_RECORD = re.compile(rf"{_CELL}(?:\t{_CELL})*")


def _is_quoted(file: Path) -> bool:
    """Whether Python's csv module could have written this tsv: every cell that contains a quote is quoted as a whole,
    with its own quotes doubled, and some cell had to be quoted, or the whole first line is. The first quote that does
    not fit decides against it.
    """
    if not file.is_file():  # a pipe can only be read once
        return False
    columns, needed, parts, quotes, size = 0, False, [], 0, 0
    for _, line in files.lines(file):
        if isinstance(line, BadLine) or not (parts or line.strip()):
            continue
        if parts and columns > 1 and parts[0].count("\t") >= columns - 1 and line.count("\t") >= columns - 1:
            return False  # both are complete lines: what looks like a cell that spans lines is two stray quotes
        parts.append(line)
        quotes, size = quotes + line.count('"'), size + len(line)
        if quotes % 2:
            if len(parts) > MOST_LINES or size > files.LONGEST_LINE:
                return False
            continue
        record, parts, quotes, size = "\n".join(parts), [], 0, 0
        if '"' not in record and columns:
            continue
        if not _RECORD.fullmatch(record):
            return False
        try:
            values = _quoted_tsv_cells(record)
        except BadLine:
            return False
        if not columns:
            columns = len(values)
            needed = all(cell.startswith('"') for cell in record.split("\t"))
        elif len(values) != columns:
            return False
        needed = needed or any(mark in value for value in values for mark in '\t\n"')
    return needed and not parts
