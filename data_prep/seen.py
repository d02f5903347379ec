"""Sets of what has been seen, kept on disk so that memory does not grow."""

import sqlite3
from pathlib import Path


def scratch_base(path: Path) -> sqlite3.Connection:
    """An empty database in the file `path`: fast, and lost if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    base = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):  # KiB
        base.execute(f"PRAGMA {pragma}")
    return base


class Seen:
    """Named sets of strings in the file `path`, which `close` removes."""

    def __init__(self, path: Path, *names: str) -> None:
        self._path, self._base = path, scratch_base(path)
        for name in names:
            self._base.execute(f"CREATE TABLE {name} (key PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def new(self, name: str, key: str | bytes) -> bool:
        """Adds to a set. Returns whether it was new."""
        return self._base.execute(f"INSERT OR IGNORE INTO {name} VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)
