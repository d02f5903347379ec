"""A token store: one long stream of int32 ids with document offsets, in Megatron's `.bin/.idx` format.

NAME.bin   the ids, little-endian int32
NAME.idx   header and document lengths, as megatron.core.datasets.indexed_dataset reads them
NAME.json  the token space, the codes of a frame, and the fingerprints of the codec and the tokenizer that made the ids
"""

import shutil
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import SodaError
from ..files import atomic_path, read_json, write_json
from ..vocab import TokenSpace

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_INT32 = 4  # Megatron's code of the dtype
_ENTRIES_AT_ONCE = 1 << 20


def write_store(path: str | Path, documents: Iterable[np.ndarray], space: TokenSpace, **provenance: Any) -> int:
    """Writes documents of ids as the store `path` (no suffix) and returns the number of tokens."""
    return write_parts(path, ((document, np.array([len(document)])) for document in documents), space, **provenance)


def write_parts(
    path: str | Path, parts: Iterable[tuple[np.ndarray, np.ndarray]], space: TokenSpace, **provenance: Any
) -> int:
    """Writes the store `path` (no suffix) out of parts, each the ids of some documents one after the other and their
    lengths. Returns the number of tokens.

    `.bin` and `.idx` appear before `.json`, so a store with a `.json` is whole. Memory stays bounded by one part.
    """
    path = Path(path)
    _file(path, "json").unlink(missing_ok=True)
    tokens = documents = 0
    with atomic_path(_file(path, "idx")) as index:
        sizes = index.with_suffix(".sizes")
        try:
            with (
                atomic_path(_file(path, "bin")) as temporary,
                open(temporary, "wb") as file,
                open(sizes, "wb") as out,
            ):
                for ids, lengths in parts:
                    if len(lengths) and (lengths.min() < 1 or lengths.sum() != len(ids)):
                        raise ValueError("a document must have at least one token, and the lengths must sum to the ids")
                    file.write(np.ascontiguousarray(ids, dtype="<i4").data)
                    out.write(np.ascontiguousarray(lengths, dtype="<i4").data)
                    tokens, documents = tokens + len(ids), documents + len(lengths)
            _write_index(index, sizes, documents)
        finally:
            sizes.unlink(missing_ok=True)
    write_json(_file(path, "json"), {"tokens": tokens, "documents": documents, "space": space.to_dict(), **provenance})
    return tokens


def _write_index(path: Path, sizes: Path, count: int) -> None:
    """The index of documents whose lengths are the int32 of the file `sizes`."""
    with open(path, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _INT32, count, count + 1))
        with open(sizes, "rb") as lengths:
            shutil.copyfileobj(lengths, file)
        with open(sizes, "rb") as lengths:
            end = 0
            while block := lengths.read(4 * _ENTRIES_AT_ONCE):
                bytes_each = 4 * np.frombuffer(block, "<i4").astype("<i8")
                ends = end + np.cumsum(bytes_each)
                file.write((ends - bytes_each).data)
                end = int(ends[-1])
        for first in range(0, count + 1, _ENTRIES_AT_ONCE):
            file.write(np.arange(first, min(first + _ENTRIES_AT_ONCE, count + 1), dtype="<i8").data)


class Store:
    """Random access to a store. `size` is the number of tokens; `read` copies, nothing else touches the disk.

    Opening takes the same time for any number of documents: files are mapped, and of the index only the header and the
    end are looked at. Raises SodaError if a file is missing, cut short, or not of this format; `check_index` checks
    the rest of the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for suffix in ("bin", "idx", "json"):
            if not _file(self.path, suffix).is_file():
                raise SodaError(f"{_file(self.path, suffix)}: no such file. Run `soda prepare` to make the store.")
        self.meta = read_json(_file(self.path, "json"))
        try:
            self.space = TokenSpace(**self.meta["space"])
            self.slots = int(self.meta.get("slots", self.space.codebooks))  # codes of a frame: 1 if semantic-only
        except (KeyError, TypeError) as error:
            raise SodaError(f"{_file(self.path, 'json')}: no token space in it ({error})") from None
        self._lengths, self._pointers = self._map_index()  # of the documents: in tokens, and where they begin in bytes
        expected = int(self._pointers[-1]) + 4 * int(self._lengths[-1]) if len(self) else 0
        bytes_there = _file(self.path, "bin").stat().st_size
        if bytes_there != expected or bytes_there % 4:
            raise SodaError(
                f"{_file(self.path, 'bin')}: {bytes_there} bytes, but the index tells of {expected}. "
                "The file was cut short or belongs to another index; run `soda prepare` again."
            )
        if bytes_there == 0:
            raise SodaError(f"{self.path}: the store has no tokens")
        self.size = bytes_there // 4
        self._ids = np.memmap(_file(self.path, "bin"), dtype="<i4", mode="r")

    def _map_index(self) -> tuple[np.ndarray, np.ndarray]:
        path = _file(self.path, "idx")
        bytes_there = path.stat().st_size
        if bytes_there < _HEADER.size:
            raise SodaError(f"{path}: {bytes_there} bytes are too few for an index")
        with open(path, "rb") as file:
            magic, version, dtype, count, documents = _HEADER.unpack(file.read(_HEADER.size))
        if magic != _MAGIC or version != 1 or dtype != _INT32:
            raise SodaError(f"{path}: not an index of int32 tokens in Megatron's format (version 1)")
        expected = _HEADER.size + 12 * count + 8 * documents
        if bytes_there != expected:
            raise SodaError(
                f"{path}: {bytes_there} bytes, but its header tells of {expected}. Run `soda prepare` again."
            )
        data = np.memmap(path, mode="r")
        lengths = np.frombuffer(data, "<i4", count, _HEADER.size)
        return lengths, np.frombuffer(data, "<i8", count, _HEADER.size + lengths.nbytes)

    def __len__(self) -> int:
        """Number of documents."""
        return len(self._lengths)

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): tokens [start, start + count) of the stream."""
        if start < 0 or start + count > self.size:
            raise IndexError(f"tokens {start} to {start + count} of {self.size}")
        return np.array(self._ids[start : start + count])

    def document(self, index: int) -> np.ndarray:
        """int32: the tokens of one document."""
        if not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return self.read(int(self._pointers[index]) // 4, int(self._lengths[index]))

    def offsets(self, first: int, last: int) -> np.ndarray:
        """int64 (last - first + 1,): the tokens at which documents first to last - 1 begin, and that where they end."""
        end = self._pointers[last] // 4 if last < len(self) else self.size
        return np.append(self._pointers[first:last] // 4, np.int64(end))

    def check_index(self) -> None:
        """SodaError if a document is empty, or does not begin where the one before it ends. Reads the whole index."""
        end = 0  # of the documents before, in bytes
        for first in range(0, len(self), _ENTRIES_AT_ONCE):
            lengths = self._lengths[first : first + _ENTRIES_AT_ONCE].astype(np.int64)
            pointers = self._pointers[first : first + _ENTRIES_AT_ONCE]
            wanted = end + 4 * (np.cumsum(lengths) - lengths)
            bad = np.flatnonzero((lengths < 1) | (pointers != wanted))
            if len(bad):
                i = bad[0]
                raise SodaError(
                    f"{_file(self.path, 'idx')}: document {first + i} has {lengths[i]} tokens from byte {pointers[i]} "
                    f"on; at least one, from byte {wanted[i]} on, was expected. Run `soda prepare` again."
                )
            end = int(wanted[-1] + 4 * lengths[-1])

    def check_space(self, space: TokenSpace, wanted_by: str) -> None:
        if self.space != space:
            raise SodaError(
                f"{self.path}: its ids are of another vocabulary ({self.space}) than {wanted_by} ({space}). "
                "Use the data folder that the model was trained on, or prepare the data again."
            )


def _file(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
