"""Megatron's own format, which stock megatron-core reads: 4 bytes per token, 20 per document.

NAME.bin   the ids, little-endian int32
NAME.idx   header, then of every document its length in tokens (int32), where it begins in bytes (int64), and its number
           (int64), as megatron.core.datasets.indexed_dataset reads them
"""

import shutil
import struct
import tempfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import SodaError
from ..vocab import TokenSpace
from .files import MappedFile, Output, Parts, outputs, store_file

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
INT32 = 4  # Megatron's code for the dtype
_ENTRIES_AT_ONCE = 1 << 20


SUFFIXES = ("idx", "bin")


def write_indexed(path: Path, parts: Parts, space: TokenSpace, slots: int) -> dict[str, Output]:
    """Writes NAME.bin and NAME.idx; memory is bounded by one part."""
    documents = 0
    with outputs(path, SUFFIXES) as files, tempfile.TemporaryFile(dir=path.parent) as spool:
        for ids, lengths in parts:
            files["bin"].write(np.ascontiguousarray(ids, dtype="<i4").data)
            spool.write(np.ascontiguousarray(lengths, dtype="<i4").data)
            documents += len(lengths)
        _write_index(files["idx"], spool, documents)
    return files


def _write_index(file: Output, lengths: BinaryIO, count: int) -> None:
    """Writes the index of documents whose lengths are the int32 values in the file `lengths`."""
    file.write(HEADER.pack(MAGIC, 1, INT32, count, count + 1))
    lengths.seek(0)
    shutil.copyfileobj(lengths, file, 1 << 20)
    lengths.seek(0)
    end = 0
    while block := lengths.read(4 * _ENTRIES_AT_ONCE):
        bytes_each = 4 * np.frombuffer(block, "<i4").astype("<i8")
        ends = end + np.cumsum(bytes_each)
        file.write((ends - bytes_each).data)
        end = int(ends[-1])
    for first in range(0, count + 1, _ENTRIES_AT_ONCE):
        file.write(np.arange(first, min(first + _ENTRIES_AT_ONCE, count + 1), dtype="<i8").data)


class IndexedTokens:
    """Reads NAME.bin and NAME.idx. Raises SodaError if one is truncated or in another format."""

    def __init__(self, path: Path, space: TokenSpace, slots: int) -> None:
        self.path = path
        self._map_index()
        expected = int(self._pointers[-1]) + 4 * int(self._lengths[-1]) if self.documents else 0
        ids = MappedFile(store_file(path, "bin"), "<i4")
        bytes_there = ids.bytes
        if bytes_there != expected or bytes_there % 4:
            raise SodaError(
                f"{store_file(path, 'bin')}: {bytes_there} bytes, but the index says {expected}. "
                "The file was truncated or belongs to another index; run `soda prepare` again."
            )
        self._ids = ids.array
        self.size = len(self._ids)
        self.mapped = (self._index, ids)

    def _map_index(self) -> None:
        path = store_file(self.path, "idx")
        self._index = MappedFile(path, "u1")
        data = self._index.array
        if len(data) < HEADER.size:
            raise SodaError(f"{path}: {len(data)} bytes are too few for an index")
        magic, version, dtype, count, documents = HEADER.unpack(bytes(data[: HEADER.size]))
        if magic != MAGIC or version != 1 or dtype != INT32:
            raise SodaError(f"{path}: not an index of int32 tokens in Megatron's format (version 1)")
        expected = HEADER.size + 12 * count + 8 * documents
        if len(data) != expected or documents != count + 1:
            raise SodaError(f"{path}: {len(data)} bytes, but its header says {expected}. Run `soda prepare` again.")
        self.documents = count
        self._lengths = np.frombuffer(data, "<i4", count, HEADER.size)  # in tokens
        self._pointers = np.frombuffer(data, "<i8", count, HEADER.size + 4 * count)  # where they begin, in bytes

    def read(self, start: int, count: int) -> np.ndarray:
        return np.array(self._ids[start : start + count])

    def span(self, index: int) -> tuple[int, int]:
        """A document's first token and number of tokens."""
        return int(self._pointers[index]) // 4, int(self._lengths[index])

    def offsets(self, first: int, last: int) -> np.ndarray:
        end = self._pointers[last] // 4 if last < self.documents else self.size
        return np.append(self._pointers[first:last] // 4, np.int64(end))

    def check_index(self) -> None:
        end = 0  # of the preceding documents, in bytes
        for first in range(0, self.documents, _ENTRIES_AT_ONCE):
            lengths = self._lengths[first : first + _ENTRIES_AT_ONCE].astype(np.int64)
            pointers = self._pointers[first : first + _ENTRIES_AT_ONCE]
            wanted = end + 4 * (np.cumsum(lengths) - lengths)
            bad = np.flatnonzero((lengths < 1) | (pointers != wanted))
            if len(bad):
                i = bad[0]
                raise SodaError(
                    f"{store_file(self.path, 'idx')}: document {first + i} has {lengths[i]} tokens from byte "
                    f"{pointers[i]} on; expected at least one, from byte {wanted[i]} on. Run `soda prepare` again."
                )
            end = int(wanted[-1] + 4 * lengths[-1])
