"""What must be known of all that was seen, on disk: memory does not grow with it."""

import sqlite3
from pathlib import Path


def scratch_base(path: Path) -> sqlite3.Connection:
    """An empty database in the file `path`, fast, and lost if the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    base = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-65536"):  # KiB
        base.execute(f"PRAGMA {pragma}")
    return base


class Seen:
    """Sets of strings, by name, in the file `path`, which is there until `close`."""

    def __init__(self, path: Path, *names: str) -> None:
        self._path, self._base = path, scratch_base(path)
        for name in names:
            self._base.execute(f"CREATE TABLE {name} (key PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def new(self, name: str, key: str | bytes) -> bool:
        """Adds to a set; whether it was not in there."""
        return self._base.execute(f"INSERT OR IGNORE INTO {name} VALUES (?)", (key,)).rowcount == 1

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)
