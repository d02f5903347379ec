"""The files that a pattern names and their contents, compressed or not, always as a stream."""

import glob
import hashlib
import itertools
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path, check_regular

from ..utterance import Reject

PACKED = (".gz", ".zst")
TARS = (".tar", ".tar.gz", ".tgz")
LONGEST_LINE = 16 * 2**20  # bytes
# Bytes read at once. A byte of gzip unpacks to at most 1 kB, a byte of zstd to 32 kB, and a whole block is unpacked.
BLOCK = {".gz": 2**14, ".tgz": 2**14, ".zst": 2**12}
# What a packed file may unpack to: a file of nothing but zeros would fill the disk. Text unpacks to ten times its size.
MOST_TIMES, ALWAYS = 200, 2**28


class BadLine(ValueError):  # noqa: N818  (becomes a Reject)
    """Why a line, member or file is not an utterance. The part before ':' is one of a few fixed phrases, to count
    by."""


def expand(pattern: str) -> tuple[Path, list[Path]]:
    """Returns the folder that names are relative to, and the files and folders that `pattern` names, sorted.

    A file or folder with exactly that name takes precedence over a glob. The contents of a folder that also matches are
    not listed again. A glob's matches are held in memory; a folder's files are not. Raises SodaError if nothing is
    found.
    """
    given = Path(pattern).expanduser()
    if given.exists():
        return (given if given.is_dir() else given.parent), [given]
    if not glob.has_magic(str(given)):
        raise SodaError(f"{given}: no such folder or file. Give a folder, a file, or a glob like 'data/**/*.jsonl'.")
    base, found = matches(given)
    kept: list[Path] = []
    for path in found:
        check_regular(path)  # a pipe is read only if it is named itself
        if not kept or kept[-1] not in path.parents:
            kept.append(path)
    if not kept:
        raise SodaError(f"{given}: matches nothing. `**` stands for any number of folders, `*` for one name.")
    return base, kept


def matches(pattern: Path) -> tuple[Path, list[Path]]:
    """Returns the folder before the first glob part, and the sorted matches. Folders that exist exactly as written take
    precedence over what they could match: /data/[a]/*.wav."""
    parts = pattern.parts
    there = next(count for count in range(len(parts), -1, -1) if os.path.exists(Path(*parts[:count])))
    escaped = Path(glob.escape(str(Path(*parts[:there]))), *parts[there:])
    base = Path(*parts[:there], *itertools.takewhile(lambda part: not glob.has_magic(part), parts[there:]))
    return base, sorted(map(Path, glob.iglob(str(escaped), recursive=True)))


def walk(top: Path, failed: list[Reject]) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Each folder with the sorted names of its folders and files, from the top down, without hidden ones.

    Removing a folder from the list keeps the walk out of it. Links are followed, but not back up. A folder that cannot
    be read is added to `failed`.
    """

    def unreadable(error: OSError) -> None:
        failed.append(Reject(str(error.filename), f"cannot be read: {error.strerror}"))

    for name, folders, files in os.walk(top, onerror=unreadable, followlinks=True):
        here = os.path.realpath(name) + os.sep
        folders[:] = sorted(
            folder
            for folder in folders
            if not folder.startswith(".") and not here.startswith(os.path.realpath(os.path.join(name, folder)) + os.sep)
        )
        odd = set(_odd(name))
        failed.extend(Reject(os.path.join(name, file), "not a file: a pipe or a device") for file in sorted(odd))
        yield Path(name), folders, sorted(file for file in files if not file.startswith(".") and file not in odd)


def _odd(folder: str) -> Iterator[str]:
    """The names of pipes, sockets and devices in a folder: opening one could wait forever."""
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                if not entry.name.startswith(".") and not (entry.is_file() or entry.is_dir()):
                    check_regular(entry.path)
            except SodaError:
                yield entry.name
            except OSError:  # a link in a circle: its reader will report it
                pass


def relative(path: Path, root: Path) -> str:
    """The path from `root`, with '/'."""
    return Path(os.path.relpath(path, root)).as_posix()


def stem(name: str) -> str:
    """a/b of a/b.wav and of a/b.jsonl.gz."""
    return os.path.splitext(name.removesuffix(".gz").removesuffix(".zst"))[0]


def kind(path: Path | str) -> str:
    """The suffix that gives a file's type, without that of the compression: .jsonl for a.JSONL.gz."""
    name = Path(path)
    return (Path(name.stem) if name.suffix.lower() in PACKED else name).suffix.lower()


def regular(path: Path) -> Path:
    """The path. Raises BadLine for a pipe or a device: reading it might never end."""
    try:
        check_regular(path)
    except SodaError:
        raise BadLine("not a file: a pipe or a device") from None
    return path


class Unpacked:
    """Counts what a packed file unpacks to. Raises SodaError when it is too much."""

    def __init__(self, path: Path) -> None:
        self.path, self.before, self.after = path, 0, 0

    def add(self, packed: int, unpacked: int) -> None:
        self.before, self.after = self.before + packed, self.after + unpacked
        if self.after > max(ALWAYS, MOST_TIMES * self.before):
            raise SodaError(
                f"{self.path}: unpacks to over {MOST_TIMES} times its size; leave it out, or unpack it first if it is "
                "what it should be"
            )


def blocks(path: Path) -> Iterator[bytes]:
    """A file's content in small pieces, unpacked if .gz, .tgz or .zst. Raises BadLine after the last good one, and
    SodaError if it unpacks to far too much."""
    packing = path.suffix.lower()
    decoder: Any = None
    empty = True
    size = Unpacked(path)
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK.get(packing, 2**18)):
                if packing not in BLOCK:
                    yield block
                    continue
                if not empty and decoder is None:
                    block = block.lstrip(b"\0")  # gzip files on tapes are padded
                empty = False
                size.add(len(block), 0)
                while block:
                    decoder = decoder or _decoder(packing)
                    piece = decoder.decompress(block)
                    size.add(0, len(piece))
                    yield piece
                    block = b""
                    if decoder.eof:  # files may be joined
                        block, decoder = decoder.unused_data.lstrip(b"\0"), None
    except (zlib.error, zstandard.ZstdError) as error:
        raise BadLine(f"damaged: {error}") from None
    except OSError as error:
        raise BadLine(f"cannot be read: {error.strerror or error}") from None
    if packing in BLOCK and (decoder is not None or empty):
        raise BadLine(f"cut short: the {packing} file ends too early")


def _decoder(packing: str) -> Any:
    if packing == ".zst":
        return zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()  # as made by zstd --long=31
    return zlib.decompressobj(wbits=31)


def lines(path: Path) -> Iterator[tuple[int, str | BadLine]]:
    """The lines of a UTF-8 file with their numbers and without line ends; in place of a bad line, what is wrong with
    it. If a file is truncated, the lines before the cut are good and a BadLine ends it.
    """
    number = 1
    rest = bytearray()
    try:
        for block in blocks(path):
            *whole, last = block.split(b"\n")
            for piece in whole:
                yield number, _decoded(rest + piece, number)
                rest.clear()
                number += 1
            rest += last
            del rest[LONGEST_LINE + 1 :]  # it will be rejected: no need to keep more of it
    except BadLine as error:
        yield number, error
        return
    if rest:
        yield number, _decoded(rest, number)


def _decoded(raw: bytearray, number: int) -> str | BadLine:
    if len(raw) > LONGEST_LINE:
        return BadLine(f"line too long: over {LONGEST_LINE // 2**20} MB")
    try:
        return raw.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        return BadLine("not UTF-8")


def unpacked(path: Path, scratch: Path) -> Path:
    """Unpacks `path` into `scratch`, once. For a truncated file, unpacks what there is (its reader will report it)."""
    state = regular(path).stat()
    key = hashlib.sha256(f"{path.resolve()}\0{state.st_size}\0{state.st_mtime_ns}".encode(errors="surrogateescape"))
    output = scratch / f"{path.stem.removesuffix('.tar')}-{key.hexdigest()[:16]}{kind(path.stem + '.gz') or '.tar'}"
    if not output.is_file():
        with atomic_path(output) as temporary, open(temporary, "wb") as file:
            try:
                for block in blocks(path):
                    file.write(block)
            except BadLine:
                if file.tell() == 0:
                    raise
            os.utime(temporary, ns=(state.st_atime_ns, state.st_mtime_ns))  # unpacked again it is the same file
    return output
