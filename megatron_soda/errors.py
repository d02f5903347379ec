"""The one exception that users are meant to see."""

import errno
import sys
from collections.abc import Callable


class SodaError(Exception):
    """Something the user can put right: the message says what was wrong, where, and what to do.

    The commands print the message alone, without a traceback, and exit with status 2. Everything else that
    is raised is a defect of ours and keeps its traceback.
    """


def user_message(error: SodaError | OSError) -> str:
    """What to print for an error at the end of a command. Raises an OSError that is no full or forbidden disk again."""
    if isinstance(error, SodaError):
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            "the disk is full. Free some space and run the same command again: it goes on from what was written whole."
        )
    if error.errno in (errno.EACCES, errno.EROFS):
        return f"{error.filename}: may not be written or read ({error.strerror}). Choose another `run` folder."
    raise error


def run_tool(main: Callable[..., None]) -> None:
    """Runs the main function of a script in tools/ on its command line. A SodaError ends it with status 2."""
    import typer

    try:
        typer.run(main)
    except SodaError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
