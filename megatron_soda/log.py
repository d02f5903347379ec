"""Messages while the program runs, through one logger. A command prints its actual result itself.

On a terminal, lines are plain. In files and pipes, each line has the time and, in a job with several processes, the
rank.
"""

import contextlib
import logging
import os
import sys
import time

from .errors import printable

log = logging.getLogger("megatron_soda")


class _Handler(logging.Handler):
    """Warnings and errors go to standard error, the rest to standard output. A closed pipe is ignored."""

    def emit(self, record: logging.LogRecord) -> None:
        is_warning = record.levelno >= logging.WARNING
        stream = sys.stderr if is_warning else sys.stdout
        text = f"{record.levelname.lower()}: {record.getMessage()}" if is_warning else record.getMessage()
        text = printable(text)
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or None
            print(text if stream.isatty() else f"{stamp()} {text}", file=stream, flush=True)


def stamp() -> str:
    """Adds the time, and the rank if there are several."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return time.strftime("%H:%M:%S") + (f" [rank {os.environ.get('RANK', '0')}]" if several else "")


if not log.handlers:
    log.addHandler(_Handler())
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # about CUDA_HOME, if there is no GPU
