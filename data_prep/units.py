"""Unit shards: utterances as codes and text, in Parquet. Encoding is the dear step, so its product is kept."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.files import atomic_path

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("codes", pa.list_(pa.int16())),  # frame-major, frames * codebooks
        ("text", pa.string()),
        ("language", pa.string()),
        ("speaker", pa.string()),
        ("prompt", pa.string()),  # utterances of one prompt stay on one side of the split
        ("seconds", pa.float32()),
        ("audio", pa.string()),  # the source file
    ]
)


def write_units(path: Path, rows: list[dict], *, codebooks: int, fingerprint: str) -> None:
    """rows: dicts of SCHEMA's fields, with codes (frames, codebooks)."""
    columns = [{**row, "codes": np.asarray(row["codes"], np.int16).reshape(-1)} for row in rows]
    table = pa.Table.from_pylist(columns, SCHEMA.with_metadata({"codec": fingerprint, "codebooks": str(codebooks)}))
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_units(paths: list[Path]) -> Iterator[dict]:
    """Rows in the order of the shards, with codes (frames, codebooks) int16."""
    for path in sorted(paths):
        table = pq.read_table(path)
        codebooks = int((table.schema.metadata or {})[b"codebooks"])
        for row in table.to_pylist():
            row["codes"] = np.array(row["codes"], np.int16).reshape(-1, codebooks)
            yield row
