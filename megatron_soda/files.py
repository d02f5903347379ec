"""Writing files so that readers see the whole file or none of it, and reading files of unknown origin."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import SodaError, is_disk_full
from .log import log


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is fsynced and renamed to `path`.

    On failure the temporary file is removed and `path` is unchanged. A full disk becomes a SodaError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    open(temporary, "xb").close()  # a folder that cannot be written to is an OSError, whatever library writes then
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except SodaError:
        raise
    except Exception as error:
        if is_disk_full(error, path.parent):
            raise SodaError(
                f"{path}: the disk is full. Nothing was changed; free some space and run the same command again."
            ) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(new: Path, old: Path) -> None:
    """Renames the folder `new` to `old`, in place of the one that may be there, which is removed afterwards."""
    aside = old.with_name(f".{old.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if old.exists():
        os.rename(old, aside)
    os.rename(new, old)
    shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: Path) -> None:
    """Raises SodaError or OSError unless a file can be written in `folder`, which is made: before hours of work whose
    result is to go there."""
    probe = folder / ".writable"
    with atomic_path(probe) as temporary:
        temporary.write_bytes(bytes(4096))
    probe.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Locks a folder for one process: two that write to it would delete each other's files. Raises SodaError
    immediately if another process holds the lock. The kernel releases it when that process ends, however that
    happens."""
    with open(folder / ".lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                log.warning(
                    f"{folder}: this file system cannot lock ({error.strerror}). Make sure that nothing else writes "
                    "there."
                )
                yield
                return
            lock.seek(0)
            raise SodaError(
                f"{folder}: another soda is at work on it ({lock.read().strip() or 'process unknown'}). "
                "Wait for it, or use another folder."
            ) from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        os.fsync(lock.fileno())  # so that other hosts can read it
        yield


def sync_folder(folder: Path) -> None:
    """Makes a rename inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def to_json(value: Any, **options: Any) -> str:
    """JSON with null in place of NaN and Infinity, which it does not have. `options` are passed to json.dumps."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, to_json(value, indent=1, ensure_ascii=False) + "\n")


# ---- reading


@contextlib.contextmanager
def reading(path: str | Path, what: str = "cannot be read") -> Iterator[None]:
    """For reading a file that a user gave, or that may be damaged or foreign. Whatever a library (json, yaml,
    safetensors, tokenizers, sentencepiece, pyarrow, soundfile, ..) or our own code that picks values from the content
    raises inside becomes one sentence: `path: what (why)`. A pipe or a device instead of a file is refused first:
    reading it might never end.

    Put nothing else inside, or bugs of ours would look like a problem with the file. (The original exception stays the
    cause.)
    """
    check_regular(path)
    try:
        yield
    except (SodaError, AssertionError, NameError, ImportError):  # files cannot cause these
        raise
    except FileNotFoundError as error:
        raise SodaError(f"{error.filename or path}: no such file") from error
    except OSError as error:
        if is_disk_full(error):
            raise
        raise SodaError(f"{path}: {what} ({_why(error)})") from error
    except Exception as error:
        raise SodaError(f"{path}: {what} ({_why(error)})") from error
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise SodaError(f"{path}: {what} ({_why(error)})") from error


@contextlib.contextmanager
def no_panic(path: str | Path, what: str) -> Iterator[None]:
    """For work with what was read from `path`: a panic in Rust, which is no Exception, becomes `path: what (why)`."""
    try:
        yield
    except BaseException as error:
        if not _is_panic(error):
            raise
        raise SodaError(f"{path}: {what} ({_why(error)})") from error


def _is_panic(error: BaseException) -> bool:
    """Whether tokenizers or safetensors panicked. Each has a class of its own, which cannot be imported."""
    return type(error).__name__ == "PanicException"


def check_regular(path: str | Path) -> None:
    """Raises SodaError for a pipe, a socket or a device. A path that does not exist passes."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError):
        return
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise SodaError(f"{path}: not a file, but a pipe or a device")


def _why(error: BaseException) -> str:
    """The error as a few words on one line."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, MemoryError):
        return "it needs more memory than there is"
    if isinstance(error, KeyError) and error.args:
        return f"no {error.args[0]!r}"[:300]
    text = (getattr(error, "strerror", None) or str(error)).strip() or type(error).__name__
    first, *more = text.splitlines()
    said = f"{first} {more[0].strip()}" if first.endswith(":") and more else first
    return "".join(letter if letter.isprintable() else "?" for letter in said[:300])


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path, kind: type | None = None) -> Any:
    """Raises SodaError if the file does not exist, is not JSON, contains half a character (a lone surrogate, which
    cannot be written to a file), or holds another `kind` of value (dict or list)."""
    path = Path(path)
    with reading(path, "not valid JSON"):
        value = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()
    if kind and not isinstance(value, kind):
        raise SodaError(f"{path}: holds a {type(value).__name__}, not a {kind.__name__}")
    return value


def write_sealed(path: str | Path, value: dict[str, Any]) -> None:
    """Writes a JSON file with a checksum of its own values."""
    write_json(path, {**value, "crc32": _seal(value)})


def read_sealed(path: str | Path) -> dict[str, Any]:
    """Reads what write_sealed wrote, including the checksum. Raises SodaError if the values have changed. (Older files
    have no checksum.)"""
    value = read_json(path, dict)
    if value.get("crc32", _seal(value)) != _seal(value):
        raise SodaError(f"{path}: its values have changed since it was written: the file is damaged, or was edited")
    return value


def _seal(value: dict[str, Any]) -> str:
    rest = {key: one for key, one in value.items() if key != "crc32"}
    return f"{zlib.crc32(json.dumps(rest, sort_keys=True).encode()):08x}"
