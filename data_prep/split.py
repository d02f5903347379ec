"""The split: utterances that share a recording, a prompt, a text or the sound itself go to the same side.

Sharing is transitive: two utterances may be in one group only because each shares something with a third. A group's
side depends on a hash of what it shares and on the number of groups, not on the order of the input. Everything is in
SQLite files, so memory does not grow with the number of utterances.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from megatron_soda.data.units import read_columns, read_shard
from megatron_soda.errors import SodaError

from .index import Shard, hash_of, read_index
from .seen import Seen, scratch_base
from .utterance import prompt_key

SIDES = ("train", "valid", "test")
ID = "id"


def keys_of(
    by: Iterable[str], *, id: str, recording: str = "", prompt: str = "", text: str = "", audio: str = ""
) -> list[str]:
    """What an utterance may share with others, and its id. Texts are compared ignoring case and punctuation."""
    values = {"recording": recording, "prompt": prompt, "text": prompt_key(text, otherwise=""), "audio": audio}
    return [*(f"{kind}\0{values[kind]}" for kind in by if values[kind]), f"{ID}\0{id}"]


class Groups:
    """Groups of utterances, in the file `path`. First `add` all of them, then `divide`, then ask for each one's
    `side`."""

    def __init__(self, path: Path) -> None:
        self._path, self._base = path, scratch_base(path)
        # `above` leads to the key that represents the group, its smallest, whose `count` is the group's.
        self._base.execute("CREATE TABLE keys (key TEXT PRIMARY KEY, above TEXT, count INTEGER) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def close(self) -> None:
        self._base.close()
        self._path.unlink(missing_ok=True)

    def add(self, keys: Iterable[str]) -> None:
        """Adds an utterance, given what it may share (at least one key)."""
        roots = {self._root(hash_of(key), insert=True) for key in keys}
        first = min(roots)
        for other in roots - {first}:
            (count,) = self._base.execute("SELECT count FROM keys WHERE key = ?", (other,)).fetchone()
            self._base.execute("UPDATE keys SET above = ? WHERE key = ?", (first, other))
            self._base.execute("UPDATE keys SET count = count + ? WHERE key = ?", (count, first))
        self._base.execute("UPDATE keys SET count = count + 1 WHERE key = ?", (first,))

    def _root(self, key: str, insert: bool = False) -> str:
        """The key that represents the group of `key`; empty if `key` is unknown."""
        path: list[str] = []
        while True:
            row = self._base.execute("SELECT above FROM keys WHERE key = ?", (key,)).fetchone()
            if row is None:
                if not insert:
                    return ""
                self._base.execute("INSERT INTO keys VALUES (?, ?, 0)", (key, key))
                return key
            if row[0] == key:
                break
            path.append(key)
            key = row[0]
        for passed in path[:-1]:  # so that next time it is one step
            self._base.execute("UPDATE keys SET above = ? WHERE key = ?", (key, passed))
        return key

    def divide(self, valid_share: float, test_share: float) -> None:
        """Assigns groups to sides: each side's share of their number, and at least one if there are three. A group with
        more utterances than a side's share goes to training, as long as there are others."""
        base = self._base
        base.create_function("rank", 1, hash_of, deterministic=True)  # the smallest of many keys tends to be small
        base.execute("CREATE TABLE groups (key TEXT PRIMARY KEY, rank TEXT, count INTEGER, side TEXT) WITHOUT ROWID")
        base.execute("INSERT INTO groups SELECT key, rank(key), count, 'train' FROM keys WHERE above = key")
        groups, utterances = base.execute("SELECT COUNT(*), SUM(count) FROM groups").fetchone()
        for side, share in (("test", test_share), ("valid", valid_share)):
            wanted = max(round(share * groups), 1 if share and groups >= 3 else 0)
            base.execute(
                "UPDATE groups SET side = ? WHERE key IN (SELECT key FROM groups WHERE side = 'train' "
                "ORDER BY CASE WHEN count <= ? THEN 0 ELSE count END, rank LIMIT ?)",
                (side, max(1, share * (utterances or 0)), wanted),
            )

    def side(self, keys: Iterable[str]) -> str:
        """The side of the first key that is in a group; empty if none is. All keys of an utterance agree."""
        for key in keys:
            if root := self._root(hash_of(key)):
                return self._base.execute("SELECT side FROM groups WHERE key = ?", (root,)).fetchone()[0]
        return ""

    def counts(self) -> dict[str, int]:
        """The number of groups on each side."""
        found = dict(self._base.execute("SELECT side, COUNT(*) FROM groups GROUP BY side").fetchall())
        return {side: found.get(side, 0) for side in SIDES}

    def largest(self) -> tuple[int, int]:
        """Utterances in the largest group, and in all."""
        largest, total = self._base.execute("SELECT MAX(count), SUM(count) FROM groups").fetchone()
        return largest or 0, total or 0


def by_share(key: str, valid_share: float, test_share: float) -> str:
    """The side of something outside the groups, such as a document of a released corpus: by its hash alone."""
    at = int(hash_of(key)[:12], 16) / 16**12
    return "test" if at < test_share else "valid" if at < test_share + valid_share else "train"


def group_units(units: list[Path], groups: Groups, by: Sequence[str], scratch: Path) -> None:
    """Adds all utterances of unit shards. An utterance's sound is represented by its codes. Raises SodaError for a
    duplicate id."""
    seen = Seen(scratch, "ids")
    try:
        for path in units:
            rows, codes = read_shard(path)
            for row in rows:
                if not seen.new("ids", row.id):
                    raise SodaError(
                        f"{path}: utterance {row.id!r} is in another shard too, or twice in this one. If "
                        "prepare.units names one shard twice (a copy or a link), remove one."
                    )
                sound = codes[row.start : row.end].tobytes()
                audio = hashlib.sha256(sound).hexdigest() if sound else ""
                named = {name: getattr(row, name) for name in ("id", "recording", "prompt", "text")}
                groups.add(keys_of(by, **named, audio=audio))
    finally:
        seen.close()


# One digit per row of a shard, the index of its side in SIDES. Workers get these because they cannot query the groups.


def sides_of_units(units: list[Path], groups: Groups) -> list[str]:
    return [
        "".join(_digit(groups.side([f"{ID}\0{row['id']}"])) for row in read_columns(path, ["id"])) for path in units
    ]


def sides_of_texts(shards: list[Shard], groups: Groups, valid_share: float, test_share: float) -> list[str]:
    """A text that is also spoken, and so is in the groups, goes to that side; any other text goes by its hash."""

    def side(text: str, id: str) -> str:
        keys = keys_of(["text"], id=id, text=text)
        return groups.side(keys) or by_share(keys[0], valid_share, test_share)

    return ["".join(_digit(side(item.text, item.id)) for item, _ in read_index(shard)) for shard in shards]


def _digit(side: str) -> str:
    return str(SIDES.index(side))
