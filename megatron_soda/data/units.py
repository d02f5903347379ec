"""Unit shards: utterances as codes and text, in Parquet. Encoding is the expensive step, so its result is kept.

Parquet's own checksums leave out its headers, so a shard has a SHA-256 of all its bytes, in a gap before Parquet's
footer, where other readers do not look. Every function that returns its rows checks it first.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..codecs.description import CodecDescription
from ..errors import SodaError
from ..files import atomic_path, reading

CANNOT = "cannot be read; if `soda prepare` made it, delete it and run the same command again"
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("codes", pa.list_(pa.int16())),  # frame-major, frames * codebooks
        ("text", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("prompt", pa.string()),  # utterances of one prompt stay on one side of the split
        ("recording", pa.string()),  # consecutive utterances of one recording make one document
        ("seconds", pa.float32()),
        ("audio", pa.string()),  # where the sound came from
    ]
)
_MARK = b"SODAsha2"


@dataclass(frozen=True)
class Row:
    """An utterance in a shard, without its codes, which are the shard's `codes[start:end]`."""

    id: str
    text: str
    language: str
    speaker: str
    prompt: str
    recording: str
    seconds: float
    start: int
    end: int

    @property
    def heard(self) -> bool:
        """Whether it has sound. A translation may have none."""
        return self.end > self.start


def write_units(path: Path, rows: list[dict], *, codec: CodecDescription, key: str = "") -> None:
    """rows: dicts of SCHEMA's fields, with codes (frames, codebooks)."""
    columns = [{**row, "codes": np.asarray(row["codes"], np.int16).reshape(-1)} for row in rows]
    facts = {b"codec": json.dumps(codec.to_dict(), sort_keys=True), b"key": key}
    with atomic_path(path) as temporary:
        pq.write_table(pa.Table.from_pylist(columns, SCHEMA.with_metadata(facts)), temporary, compression="zstd")
        seal(temporary)


def seal(path: Path) -> None:
    """Inserts the checksum into a Parquet file."""
    with open(path, "r+b") as file:
        footer = _footer_at(file)
        file.seek(footer)
        rest = file.read()
        digest = _digest(file, footer, rest)
        file.seek(footer)
        file.write(_MARK + digest + rest)


def check_seal(path: Path) -> None:
    """Raises SodaError if a byte of the shard has changed since it was written. (Shards from older versions and from
    other programs have no checksum.)"""
    with reading(path, CANNOT), open(path, "rb") as file:
        footer = _footer_at(file)
        begin = max(0, footer - len(_MARK) - 32)
        file.seek(begin)
        mark, digest, rest = file.read(len(_MARK)), file.read(32), file.read()
        if mark == _MARK and digest != _digest(file, begin, rest):
            raise ValueError("its checksum does not match: the file is damaged")


def _footer_at(file: BinaryIO) -> int:
    """Where Parquet's footer begins: its length is in the file's last eight bytes."""
    end = file.seek(-8, os.SEEK_END)
    footer = end - int.from_bytes(file.read(4), "little")
    if footer < 0:
        raise ValueError("its footer is longer than the file")
    return footer


def _digest(file: BinaryIO, end: int, rest: bytes) -> bytes:
    """SHA-256 of the first `end` bytes of the file and `rest`."""
    found = hashlib.sha256()
    file.seek(0)
    while end > 0 and (block := file.read(min(end, 1 << 20))):
        found.update(block)
        end -= len(block)
    found.update(rest)
    return found.digest()


def unit_key(path: Path) -> str | None:
    """The key that a shard was written with; None if it is missing or not a complete unit shard."""
    try:
        with reading(path):
            return (pq.read_schema(path).metadata or {}).get(b"key", b"").decode()
    except SodaError:
        return None


def unit_codec(path: Path) -> CodecDescription:
    """A shard's codec. Raises SodaError if the file is not a unit shard."""
    with reading(path, "not a unit shard written by `soda prepare`"):
        return CodecDescription.from_dict(json.loads((pq.read_schema(path).metadata or {})[b"codec"]))


def check_schema(path: Path) -> None:
    """Raises SodaError unless the Parquet file has a unit shard's columns with the right types."""
    with reading(path, CANNOT):
        found = pq.read_schema(path)
    for column in SCHEMA:
        kind = found.field(column.name).type if column.name in found.names else None
        if kind != column.type:
            raise SodaError(
                f"{path}: not a unit shard: column {column.name} must be {column.type}, "
                f"{f'but is {kind}' if kind else f'but the columns are {found.names}'}"
            )


def read_columns(path: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows with some of the columns. Raises SodaError if the shard cannot be read."""
    check_seal(path)
    with reading(path, CANNOT):
        return pq.read_table(path, columns=list(names)).to_pylist()


def read_shard(path: Path) -> tuple[list[Row], np.ndarray]:
    """A shard's utterances, and all their codes: int16 (frames, codebooks). Raises SodaError if it cannot be read."""
    check_seal(path)
    codebooks = unit_codec(path).codebooks
    with reading(path, CANNOT):
        check_schema(path)
        table = pq.read_table(path, columns=SCHEMA.names)
        codes = table.column("codes").combine_chunks()
        lengths = np.asarray(codes.value_lengths().fill_null(0), np.int64)
        values = codes.flatten()
        flat = values.to_numpy(zero_copy_only=False)
        if values.null_count or (lengths % codebooks).any():
            raise SodaError(f"{path}: its codes are not whole frames of {codebooks}")
        ends = np.cumsum(lengths // codebooks).tolist()
        names = ("id", "text", "language", "speaker", "prompt", "recording", "seconds")
        empty = {"seconds": 0.0}
        columns = [[v or empty.get(n, "") for v in table.column(n).to_pylist()] for n in names]
    rows = [Row(*fields) for fields in zip(*columns, [0, *ends][: len(ends)], ends, strict=True)]
    return rows, flat.reshape(-1, codebooks)


def read_units(paths: list[Path]) -> Iterator[dict]:
    """Rows in the order of the shards, with codes (frames, codebooks) int16."""
    for path in sorted(paths):
        check_seal(path)
        codebooks = unit_codec(path).codebooks
        with reading(path, CANNOT):
            check_schema(path)
            rows = pq.read_table(path, columns=SCHEMA.names).to_pylist()
            for row in rows:
                row["codes"] = np.array(row["codes"] or [], np.int16).reshape(-1, codebooks)
        yield from rows


def translations(rows: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Sources and their translations: the recordings of two utterances with sound, transcripts and languages."""
    found = []
    for _, some in groupby(enumerate(rows), key=lambda item: item[1]["recording"] or item[0]):
        group = [row for _, row in some]
        if len(group) == 2 and all(row["text"] and row["language"] and len(row["codes"]) for row in group):
            found.append((group[0], group[1]))
    return found
