"""The files of a token store: replaced only once all are complete, checksummed, and mapped for reading."""

import contextlib
import mmap
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import SodaError
from ..files import atomic_path

Parts = Iterable[tuple[np.ndarray, np.ndarray]]  # the concatenated ids of some documents, and their lengths


def store_file(path: Path, suffix: str) -> Path:
    """A file of the store `path` (which has no suffix itself: a dot is part of its name)."""
    if not path.name or path.name == "..":
        raise SodaError(f"{path}: not a store's name, such as runs/mine/data/train")
    return path.with_name(f"{path.name}.{suffix}")


class Output:
    """A file written sequentially; counts its bytes and computes their CRC-32."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.bytes, self.crc = file, 0, 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.bytes += memoryview(data).nbytes
        self.crc = zlib.crc32(data, self.crc)

    def sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


@contextlib.contextmanager
def outputs(path: Path, suffixes: Sequence[str]) -> Iterator[dict[str, Output]]:
    """The files of the store, by suffix, for writing. If the `with` block succeeds, NAME.json, which described the old
    files, is removed and the new files take their place: without it a store is incomplete."""
    with ExitStack() as stack:
        files = {}
        for suffix in suffixes:
            temporary = stack.enter_context(atomic_path(store_file(path, suffix)))
            files[suffix] = Output(stack.enter_context(open(temporary, "wb")))
        yield files
        for file in files.values():  # a full disk shows up here at the latest
            file.sync()
        store_file(path, "json").unlink(missing_ok=True)


def checksum(path: Path) -> str:
    """The CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return f"{crc:08x}"


def sampled_checksum(path: Path, blocks: int = 64, size: int = 1 << 16) -> str:
    """The CRC-32 of `blocks` blocks of `size` bytes spread evenly over a file, including both ends, or of the whole
    file if it is no longer than that. Takes milliseconds for any file size."""
    length = path.stat().st_size
    if length <= blocks * size:
        return checksum(path)
    crc = 0
    with open(path, "rb") as file:
        for block in range(blocks):
            file.seek((length - size) * block // (blocks - 1))
            crc = zlib.crc32(file.read(size), crc)
    return f"{crc:08x}"


class MappedFile:
    """A file as a read-only array that is paged into memory on access. Raises SodaError if it does not exist.

    Accessing what is no longer in the file would kill the process (SIGBUS), so call `check` before reading.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        if not path.is_file():
            raise SodaError(f"{path}: no such file. Run `soda prepare` to make the store.")
        self.path = path
        with open(path, "rb") as file:
            self.bytes = os.fstat(file.fileno()).st_size
            # mmap keeps its own descriptor, which gives the file's current size.
            self._map = mmap.mmap(file.fileno(), self.bytes, access=mmap.ACCESS_READ) if self.bytes else None
        self.array = np.frombuffer(self._map or b"", dtype, self.bytes // np.dtype(dtype).itemsize)

    def check(self) -> None:
        """Raises SodaError if the file's length has changed since it was opened. Costs about a microsecond."""
        try:
            now = self._map.size() if self._map is not None else 0
        except OSError as error:
            raise SodaError(
                f"{self.path}: can no longer be read ({error.strerror}). Is the disk still there?"
            ) from None
        if now != self.bytes:
            raise SodaError(
                f"{self.path}: has {now} bytes, but had {self.bytes} when it was opened: something has written to it "
                "since. Restore the complete file (from a copy, or with `soda prepare`) and run the same command again."
            )
