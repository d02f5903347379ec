"""The one exception that users are meant to see."""

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path


class SodaError(Exception):
    """Something the user can fix: the message says what is wrong, where, and what to do.

    Commands print only the message, without a traceback, and exit with status 2. Any other exception is a bug of ours
    and keeps its traceback.
    """


def is_disk_full(error: BaseException, folder: str | Path | None = None) -> bool:
    """Whether writing failed because the disk is full or a quota is used up, whichever library reports it. safetensors
    and sqlite say so only in their message; libsndfile only says "System error.", so for that we check the free space
    in `folder`."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if any(words in str(error) for words in ("No space left on device", "disk is full", "Disk quota exceeded")):
        return True
    if folder is None or isinstance(error, OSError) or not isinstance(error, Exception):
        return False
    room = os.statvfs(folder)
    return room.f_bavail * room.f_frsize < 65536


def user_message(error: Exception) -> str:
    """What a command prints for an error before it ends. Re-raises anything but a SodaError, a full disk, or a
    path or disk that cannot be used."""
    if isinstance(error, SodaError):
        return str(error)
    if is_disk_full(error):
        return "the disk is full. Free some space and run the same command again: it resumes from what was completed."
    if isinstance(error, OSError) and error.errno in _ELSEWHERE:
        return f"{error.filename}: cannot be written or read ({error.strerror}). Choose another `run` folder."
    if any(f"(os error {number})" in str(error) for number in _ELSEWHERE):  # from Rust, without the file's name
        return f"a file cannot be written or read ({error}). Choose another `run` folder."
    raise error


_ELSEWHERE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG)


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """`text` without what would act on a terminal: control characters, in names or texts from files, become \\x1b.
    Likewise what reorders text, and halves of characters, which cannot be printed. Line ends and tabs stay."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def say(text: str) -> None:
    """Prints to standard error, unless it is closed."""
    with contextlib.suppress(OSError):
        print(printable(text), file=sys.stderr, flush=True)


def tell_torchrun(text: str) -> None:
    """Writes the reason why this process ends to where torchrun looks for it, for its table of failures."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = printable(text)
        extra = {"py_callstack": text, "timestamp": str(int(datetime.now().timestamp()))}  # the names are torchrun's
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def run_tool(main: Callable[..., None]) -> None:
    """Runs the main function of a script in tools/ on its command line. A SodaError exits with status 2."""
    import typer

    try:
        typer.run(main)
    except SodaError as error:
        say(f"error: {error}")
        sys.exit(2)
