"""Results that took long, kept in a file line by line, so that an interrupted evaluation goes on where it was."""

import contextlib
import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import reading


class Kept:
    """Values by name in `path`: a line with the key, then a line per value. A file with another key is started over,
    and a line that was half written is dropped. Another process that opens the file waits until this one closes it.
    SodaError for a damaged file."""

    def __init__(self, path: Path, key: Any, check: Callable[[Any], Any] = lambda value: value) -> None:
        """check: called with every value that is read; returns it, or raises ValueError if it cannot be right."""
        path.parent.mkdir(parents=True, exist_ok=True)
        heading = f"{json.dumps(key)}\n".encode()
        self._file = path.open("a+b")
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        before = self._file.read()
        whole = before[: before.rfind(b"\n") + 1]
        if not whole.startswith(heading):
            whole = b""
        self._file.truncate(len(whole))
        if not whole:
            self._file.write(heading)
            self._file.flush()
        self.values: dict[str, Any] = {}
        with reading(path, "damaged; delete it and evaluate again"):
            for line in whole.splitlines()[1:]:
                name, value = json.loads(line)
                self.values[name] = check(value)

    def add(self, name: str, value: Any) -> None:
        self.values[name] = value
        self._file.write(f"{json.dumps([name, value])}\n".encode())
        self._file.flush()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
