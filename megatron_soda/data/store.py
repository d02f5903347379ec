"""A token store: one long stream of int32 ids with document offsets, in Megatron's `.bin/.idx` format.

NAME.bin   the ids, little-endian int32
NAME.idx   header and document lengths, as megatron.core.datasets.indexed_dataset reads them
NAME.json  the token space, and the fingerprints of the codec and the tokenizer that made the ids
"""

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


def write_store(path: str | Path, documents: Iterable[np.ndarray], space: TokenSpace, **provenance: Any) -> int:
    """Writes documents of ids as the store `path` (no suffix) and returns the number of tokens.

    `.bin` and `.idx` appear before `.json`, so a store with a `.json` is whole. Memory stays bounded by one
    document and the list of lengths.
    """
    path = Path(path)
    _file(path, "json").unlink(missing_ok=True)
    lengths = []
    with atomic_path(_file(path, "bin")) as temporary, open(temporary, "wb") as file:
        for document in documents:
            if len(document) == 0:
                raise ValueError("a document must have at least one token")
            lengths.append(len(document))
            file.write(np.ascontiguousarray(document, dtype="<i4").tobytes())
    sizes = np.array(lengths, dtype="<i4")
    pointers = np.zeros(len(sizes), dtype="<i8")
    np.cumsum(4 * sizes[:-1].astype(np.int64), out=pointers[1:])
    with atomic_path(_file(path, "idx")) as temporary, open(temporary, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, _INT32, len(sizes), len(sizes) + 1))
        file.write(sizes.tobytes() + pointers.tobytes() + np.arange(len(sizes) + 1, dtype="<i8").tobytes())
    tokens = int(sizes.sum(dtype=np.int64))
    write_json(_file(path, "json"), {"tokens": tokens, "documents": len(sizes), "space": space.to_dict(), **provenance})
    return tokens


class Store:
    """Random access to a store. `size` is the number of tokens; `read` copies, nothing else touches the disk.

    Raises SodaError if a file is missing, cut short, or not of this format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        for suffix in ("bin", "idx", "json"):
            if not _file(self.path, suffix).is_file():
                raise SodaError(f"{_file(self.path, suffix)}: no such file. Run `soda prepare` to make the store.")
        self.meta = read_json(_file(self.path, "json"))
        try:
            self.space = TokenSpace(**self.meta["space"])
        except (KeyError, TypeError) as error:
            raise SodaError(f"{_file(self.path, 'json')}: no token space in it ({error})") from None
        lengths = self._read_index()
        self.offsets = np.zeros(len(lengths) + 1, np.int64)  # document i is tokens [offsets[i], offsets[i + 1])
        np.cumsum(lengths, out=self.offsets[1:])
        self.size = int(self.offsets[-1])
        bytes_there = _file(self.path, "bin").stat().st_size
        if bytes_there != 4 * self.size:
            raise SodaError(
                f"{_file(self.path, 'bin')}: {bytes_there} bytes, but the index tells of {4 * self.size}. "
                "The file was cut short or belongs to another index; run `soda prepare` again."
            )
        if self.size == 0:
            raise SodaError(f"{self.path}: the store has no tokens")
        self._ids = np.memmap(_file(self.path, "bin"), dtype="<i4", mode="r")

    def _read_index(self) -> np.ndarray:
        path = _file(self.path, "idx")
        data = path.read_bytes()
        if len(data) < _HEADER.size:
            raise SodaError(f"{path}: {len(data)} bytes are too few for an index")
        magic, version, dtype, count, documents = _HEADER.unpack_from(data)
        if magic != _MAGIC or version != 1 or dtype != _INT32:
            raise SodaError(f"{path}: not an index of int32 tokens in Megatron's format (version 1)")
        expected = _HEADER.size + 12 * count + 8 * documents
        if len(data) != expected:
            raise SodaError(f"{path}: {len(data)} bytes, but its header tells of {expected}. Run `soda prepare` again.")
        lengths = np.frombuffer(data, "<i4", count, _HEADER.size)
        if count and lengths.min() < 1:
            raise SodaError(f"{path}: document {int(lengths.argmin())} has a length of {lengths.min()}")
        return lengths

    def __len__(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    def read(self, start: int, count: int) -> np.ndarray:
        """int32 (count,): tokens [start, start + count) of the stream."""
        if start < 0 or start + count > self.size:
            raise IndexError(f"tokens {start} to {start + count} of {self.size}")
        return np.array(self._ids[start : start + count])

    def document(self, index: int) -> np.ndarray:
        """int32: the tokens of one document."""
        return self.read(int(self.offsets[index]), int(self.offsets[index + 1] - self.offsets[index]))

    def check_space(self, space: TokenSpace, wanted_by: str) -> None:
        if self.space != space:
            raise SodaError(
                f"{self.path}: its ids are of another vocabulary ({self.space}) than {wanted_by} ({space}). "
                "Use the data folder that the model was trained on, or prepare the data again."
            )


def _file(path: Path, suffix: str) -> Path:
    return path.with_name(f"{path.name}.{suffix}")
