"""The first stage: the index. Utterances and texts go, in source order, into shards of a fixed size, which are the jobs
of all later stages. Memory does not grow with their number.

    FOLDER/items-00000.parquet a shard is a row group FOLDER/index.sqlite ids and recordings seen so far, while the
    index is built
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.audio.sound import Sound

from .seen import Seen
from .utterance import Reject, Utterance

ITEMS = pa.schema([("utterance", pa.string()), ("stamp", pa.string())])
SHARDS_OF_A_FILE = 256
LONGEST_SHARD = 8  # times the usual size: a recording with more utterances than that is split into several documents
AT_ONCE = 10_000  # rows per transaction


@dataclass(frozen=True)
class Shard:
    """Row group `group` of `path`, with the utterances (or texts) of one job. `key` is a hash of them and of the sizes
    and times of their files."""

    number: int
    path: str
    group: int
    count: int
    key: str


@dataclass(frozen=True)
class Index:
    """The shards, and the number of utterances in them."""

    shards: list[Shard]
    utterances: int
    cut_recordings: int  # recordings that were too long for one shard, or whose utterances were not consecutive


def digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()


def make_index(
    source: Iterable[Utterance | Reject],
    folder: Path,
    *,
    shard_size: int,
    reject: Callable[[Reject], None],
    take: Callable[[Utterance], None] = lambda utterance: None,
) -> Index:
    """Writes the utterances of `source` as shards. A second utterance with the same id is rejected. `take` is called
    with each accepted one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    seen = Seen(folder / "index.sqlite", "ids", "recordings")
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
            current.append((json.dumps(asdict(item)), stamps[item.audio.path]))
            size, count = size + 1, count + 1
            take(item)
        writer.add(current)
        return Index(writer.close(), count, cut)
    finally:
        seen.close()


def read_index(shard: Shard) -> Iterator[tuple[Utterance, str]]:
    """The utterances of a shard, each with its file's stamp."""
    for row in pq.ParquetFile(shard.path).read_row_group(shard.group).to_pylist():
        values = json.loads(row["utterance"])
        yield Utterance(**{**values, "audio": Sound(**values["audio"])}), row["stamp"]


def hash_of(key: str) -> str:
    """24 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:24]


class _Shards:
    """Writes shards as row groups, SHARDS_OF_A_FILE per file."""

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
    """Sizes and times of files, looked up once for all recordings in a tar."""

    def __missing__(self, path: str) -> str:
        if len(self) > 10_000:
            self.clear()
        try:
            stat = os.stat(path)
            self[path] = f"{stat.st_size} {stat.st_mtime_ns}"
        except (OSError, ValueError):
            self[path] = "not there"  # decoding will report it
        return self[path]


def sample(shards: list[Shard], count: int, keep: Callable[[Utterance], bool]) -> list[tuple[Utterance, str]]:
    """At most `count` utterances, those with the lowest hashes, so that the order of the input does not matter."""
    import heapq

    rows = ((hash_of(u.id), u, stamp) for shard in shards for u, stamp in read_index(shard) if keep(u))
    return [(u, stamp) for _, u, stamp in heapq.nsmallest(count, rows, key=lambda row: row[0])]
