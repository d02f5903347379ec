"""Sets of strings on disk: memory does not grow with what is in them."""

import sqlite3
from pathlib import Path


class Seen:
    """Sets, by name, in the file `path`, which is there until `close`."""

    def __init__(self, path: Path, *names: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        self._path = path
        self._base = sqlite3.connect(path, isolation_level=None)
        self._base.execute("PRAGMA journal_mode=OFF")
        self._base.execute("PRAGMA synchronous=OFF")
        for name in names:
            self._base.execute(f"CREATE TABLE {name} (key PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def new(self, name: str, key: str | bytes) -> bool:
        """Adds to a set; whether it was not in there."""
        return self._base.execute(f"INSERT OR IGNORE INTO {name} VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)
