"""The one exception that users are meant to see."""

import contextlib
import errno
import json
import os
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
    permission error."""
    if isinstance(error, SodaError):
        return str(error)
    if is_disk_full(error):
        return "the disk is full. Free some space and run the same command again: it resumes from what was completed."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"{error.filename}: cannot be written or read ({error.strerror}). Choose another `run` folder."
    raise error


def say(text: str) -> None:
    """Prints to standard error, unless it is closed."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def tell_torchrun(text: str) -> None:
    """Writes the reason why this process ends to where torchrun looks for it, for its table of failures."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(datetime.now().timestamp()))}  # the names are torchrun's
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": text, "extraInfo": extra}}, file)


def run_tool(main: Callable[..., None]) -> None:
    """Runs the main function of a script in tools/ on its command line. A SodaError exits with status 2."""
    import typer

    try:
        typer.run(main)
    except SodaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
