"""The encoded bytes of a recording, wherever they are: in a file, a range of a tar, or a value in a Parquet file."""

import io
import os
import threading
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from .sound import BadAudio, Sound


class _Range(io.RawIOBase):
    """`size` bytes of a file starting at `offset`, as a file. Seeking never fails, because libsndfile seeks through a
    callback, where an exception would only be printed."""

    def __init__(self, file: BinaryIO, offset: int, size: int) -> None:
        self.file, self.offset, self.size, self.at = file, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = (0, self.at, self.size)[whence]
        self.at = max(0, base + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.size - self.at)
        if count <= 0:
            return 0
        self.file.seek(self.offset + self.at)
        with memoryview(buffer) as view:
            count = cast(io.BufferedIOBase, self.file).readinto(view[:count])
        self.at += count
        return count


class _Patched(_Range):
    """A file with some bytes replaced: {position: bytes}."""

    def __init__(self, file: BinaryIO, patch: dict[int, bytes]) -> None:
        super().__init__(file, 0, file.seek(0, os.SEEK_END))
        self.patch = patch

    def readinto(self, buffer: Any) -> int:
        before = self.at
        count = super().readinto(buffer)
        with memoryview(buffer).cast("B") as view:
            for at, new in self.patch.items():
                for position, byte in enumerate(new, at - before):
                    if 0 <= position < count:
                        view[position] = byte
        return count


def patched(file: BinaryIO, patch: dict[int, bytes]) -> BinaryIO:
    """`file` with the bytes in `patch` ({position: bytes}) replaced."""
    return cast(BinaryIO, io.BufferedReader(_Patched(file, patch), 1 << 16))


def open_sound(sound: Sound, stack: ExitStack) -> tuple[BinaryIO, str]:
    """Returns the recording's encoded bytes as a file, and its name. Raises BadAudio if they do not exist."""
    if not Path(sound.path).is_file():
        raise BadAudio("no such file")
    name = sound.name or sound.path
    if sound.row >= 0:
        data, inner = _parquet_value(sound)
        file, size = io.BytesIO(data), len(data)
        name = sound.name or inner
    else:
        file = stack.enter_context(open(sound.path, "rb"))  # noqa: SIM115  (the stack closes it)
        size = os.fstat(file.fileno()).st_size
    if sound.offset >= 0:
        if sound.size < 0 or sound.offset + sound.size > size:
            raise BadAudio(f"cut off: bytes {sound.offset} + {sound.size} of a file of {size}")
        size = sound.size
    if size == 0:
        raise BadAudio("empty file")
    if sound.offset >= 0 or sound.row >= 0:
        file = io.BufferedReader(_Range(cast(BinaryIO, file), max(0, sound.offset), size), 1 << 16)
    return cast(BinaryIO, file), name


def _parquet_value(sound: Sound) -> tuple[bytes, str]:
    stat = os.stat(sound.path)
    stamp = stat.st_mtime_ns, stat.st_size
    starts = _group_starts(sound.path, stamp)
    if not sound.row < starts[-1]:
        raise BadAudio(f"no such row: {sound.row} of {starts[-1]}")
    group = int(np.searchsorted(starts, sound.row, side="right")) - 1
    with _one_thread:  # else several read the same group
        column = _row_group(sound.path, stamp, sound.column, group)
    value = column[sound.row - starts[group]].as_py()
    data, name = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, "")
    if not isinstance(data, bytes):
        raise BadAudio("no audio in this row")
    return data, name or ""


@lru_cache(maxsize=8)
def _group_starts(path: str, stamp: tuple[int, int]) -> tuple[int, ...]:
    """The first row of each row group, followed by the number of rows."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        rows = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    return (0, *(int(end) for end in np.cumsum(rows)))


_one_thread = threading.Lock()


@lru_cache(maxsize=1)  # utterances come in file order
def _row_group(path: str, stamp: tuple[int, int], column: str, group: int) -> Any:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        if column not in file.schema_arrow.names:
            raise BadAudio(f"no such column: {column}")
        return file.read_row_group(group, columns=[column]).column(0)
