"""Results that took long, kept in a file line by line, so that an interrupted evaluation goes on where it was."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import reading


class Kept:
    """Values by name in `path`: a line with the key, then a line per value. A file with another key is started over,
    and a line that was half written is dropped. SodaError for a damaged file."""

    def __init__(self, path: Path, key: Any, check: Callable[[Any], Any] = lambda value: value) -> None:
        """check: called with every value that is read; returns it, or raises ValueError if it cannot be right."""
        path.parent.mkdir(parents=True, exist_ok=True)
        heading = f"{json.dumps(key)}\n".encode()
        before = path.read_bytes() if path.is_file() else b""
        whole = before[: before.rfind(b"\n") + 1]
        if not whole.startswith(heading):
            whole = heading
            path.write_bytes(heading)
        self.values: dict[str, Any] = {}
        with reading(path, "damaged; delete it and evaluate again"):
            for line in whole.splitlines()[1:]:
                name, value = json.loads(line)
                self.values[name] = check(value)
        self._file = path.open("r+b")
        self._file.truncate(len(whole))
        self._file.seek(len(whole))

    def add(self, name: str, value: Any) -> None:
        self.values[name] = value
        self._file.write(f"{json.dumps([name, value])}\n".encode())
        self._file.flush()

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
