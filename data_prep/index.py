"""The first stage: what is there. Utterances and texts go, in the order of their source, into shards of a fixed size,
which are the jobs of all that follows; memory does not grow with their number.

    FOLDER/items-00000.parquet   a shard is a row group
    FOLDER/index.sqlite          ids and prompts that were seen, while it is made
"""

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.errors import SodaError

from .units import left_out, read_columns
from .utterance import Reject, Sound, Utterance

ITEMS = pa.schema([("utterance", pa.string()), ("stamp", pa.string())])
SHARDS_OF_A_FILE = 256
LONGEST_SHARD = 8  # times the usual: a recording with more utterances than that is cut into several documents
AT_ONCE = 10_000  # rows between two transactions


@dataclass(frozen=True)
class Shard:
    """Row group `group` of `path`: the utterances (or texts) of one job. `key` is a hash of them and of their files'
    sizes and times."""

    number: int
    path: str
    group: int
    count: int
    key: str


@dataclass
class Index:
    """Shards of utterances, how many there are, and the bounds of the sides (see `side`)."""

    shards: list[Shard]
    utterances: int
    cut_recordings: int  # that were too long for one shard, or came back after another one
    bounds: tuple[str, str]


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()


def make_index(
    source: Iterable[Utterance | Reject],
    folder: Path,
    *,
    shard_size: int,
    valid_share: float,
    test_share: float,
    reject: Callable[[Reject], None],
    advance: Callable[[int], None] = lambda n: None,
) -> Index:
    """Writes the shards of the utterances of `source`; of two with one id the second is rejected."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen = _Seen(folder / "index.sqlite")
    writer = _Shards(folder)
    current: list[tuple[str, str]] = []
    recording, size, count, cut = "", 0, 0, 0
    stamps = _Stamps()
    try:
        for item in source:
            if isinstance(item, Reject):
                reject(item)
                continue
            if not seen.new("ids", item.id):
                reject(Reject(str(item.audio), f"duplicate id: {item.id!r}"))
                continue
            starts_new = not item.recording or item.recording != recording
            if starts_new and item.recording and not seen.new("recordings", item.recording):
                cut += 1
            if size >= shard_size * LONGEST_SHARD and not starts_new:
                starts_new, cut = True, cut + 1
            if size >= shard_size and starts_new:
                writer.add(current)
                current, size = [], 0
            recording = item.recording
            seen.new("prompts", _hash(split_key(item)))
            current.append((json.dumps(asdict(item)), stamps[item.audio.path]))
            size, count = size + 1, count + 1
            advance(1)
        writer.add(current)
        shards = writer.close()
        return Index(shards, count, cut, seen.bounds(valid_share, test_share))
    finally:
        seen.close()
        (folder / "index.sqlite").unlink(missing_ok=True)


def read_index(shard: dict[str, Any] | Shard) -> Iterator[tuple[Utterance, str]]:
    """The utterances of a shard, each with the stamp of its file."""
    path, group = (shard.path, shard.group) if isinstance(shard, Shard) else (shard["path"], shard["group"])
    for row in pq.ParquetFile(path).read_row_group(group).to_pylist():
        values = json.loads(row["utterance"])
        yield Utterance(**{**values, "audio": Sound(**values["audio"])}), row["stamp"]


def split_key(item: Any) -> str:
    """What must not stand on two sides: the recording of an utterance, or what it says."""
    return item.recording or item.prompt or item.id


def side(key: str, bounds: tuple[str, str]) -> str:
    """train, valid or test, by the hash of a split key. Only the bounds depend on what else there is."""
    value = _hash(key)
    return "test" if value <= bounds[0] else "valid" if value <= bounds[1] else "train"


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _share(share: float) -> str:
    return f"{int(share * 16**12):012x}" if share else ""


def index_of_units(units: list[Path], folder: Path, valid_share: float, test_share: float) -> Index:
    """The index of unit shards that are there already: without shards of its own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen, count = _Seen(folder / "index.sqlite"), 0
    for path in units:
        for row in read_columns(path, ["recording", "prompt", "id"]):
            if not seen.new("ids", row["id"]):
                raise SodaError(
                    f"{path}: utterance {row['id']!r} stands in another shard too, or twice in this one. If "
                    "prepare.units names one shard twice (a copy, or a link), leave one out."
                )
            seen.new("prompts", _hash(row["recording"] or row["prompt"] or row["id"]))
            count += 1
        for key in left_out(path):
            seen.new("prompts", _hash(key))
    bounds = seen.bounds(valid_share, test_share)
    seen.close()
    shutil.rmtree(folder)
    return Index([], count, 0, bounds)


class _Seen:
    """Sets of strings on disk."""

    def __init__(self, path: Path) -> None:
        self._base = sqlite3.connect(path, isolation_level=None)
        self._base.execute("PRAGMA journal_mode=OFF")
        self._base.execute("PRAGMA synchronous=OFF")
        for name in ("ids", "recordings", "prompts"):
            self._base.execute(f"CREATE TABLE {name} (key TEXT PRIMARY KEY) WITHOUT ROWID")
        self._base.execute("BEGIN")

    def new(self, table: str, key: str) -> bool:
        return self._base.execute(f"INSERT OR IGNORE INTO {table} VALUES (?)", (key,)).rowcount == 1

    def bounds(self, valid_share: float, test_share: float) -> tuple[str, str]:
        """The highest hash of the test side and of the valid side. A share above 0 gets a prompt if there are three."""
        total = self._base.execute("SELECT COUNT(*) FROM prompts").fetchone()[0]
        if not total:  # of a released corpus, whose documents are not counted before
            return _share(test_share), _share(test_share + valid_share)
        least = 1 if total >= 3 else 0
        test = max(round(test_share * total), least if test_share else 0)
        valid = max(round(valid_share * total), least if valid_share else 0)
        return self._at(test), self._at(test + valid)

    def _at(self, count: int) -> str:
        """The count-th lowest hash of a prompt."""
        if count == 0:
            return ""
        return self._base.execute("SELECT key FROM prompts ORDER BY key LIMIT 1 OFFSET ?", (count - 1,)).fetchone()[0]

    def close(self) -> None:
        self._base.close()


class _Shards:
    """Writes shards as row groups, SHARDS_OF_A_FILE to a file."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._shards, self._writer = folder, [], None

    def add(self, rows: list[tuple[str, str]]) -> None:
        if not rows:
            return
        number = len(self._shards)
        path = self._folder / f"items-{number // SHARDS_OF_A_FILE:05d}.parquet"
        if number % SHARDS_OF_A_FILE == 0:
            self.close()
            self._writer = pq.ParquetWriter(path, ITEMS, compression="zstd")
        assert self._writer is not None
        columns = [list(column) for column in zip(*rows, strict=True)]
        self._writer.write_table(pa.table(columns, schema=ITEMS), row_group_size=len(rows))
        self._shards.append(Shard(number, str(path), number % SHARDS_OF_A_FILE, len(rows), digest(rows)))

    def close(self) -> list[Shard]:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        return self._shards


class _Stamps(dict):
    """Size and time of files, asked once for the many recordings of one tar."""

    def __missing__(self, path: str) -> str:
        if len(self) > 10_000:
            self.clear()
        try:
            stat = os.stat(path)
            self[path] = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):
            self[path] = "not there"  # decoding will say so
        return self[path]


def sample(shards: list[Shard], count: int, keep: Callable[[Utterance], bool]) -> list[tuple[Utterance, str]]:
    """At most `count` utterances, the same ones whatever the order of the input: those of the lowest hashes."""
    import heapq

    rows = ((_hash(u.id), u, stamp) for shard in shards for u, stamp in read_index(shard) if keep(u))
    return [(u, stamp) for _, u, stamp in heapq.nsmallest(count, rows, key=lambda row: row[0])]
