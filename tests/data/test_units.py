"""Unit shards and parts: a changed bit is refused or changes nothing."""

import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data import units
from megatron_soda.data.units import read_columns, read_shard, read_units, unit_codec, unit_key, write_units
from megatron_soda.errors import SodaError

CODEC = CodecDescription("embedded", "f" * 16, 8, 64, 24_000, 1_920, {"spec": "embedded"})


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    draw = np.random.default_rng(0)
    fields = {"language": "en", "speaker": "s", "prompt": "p", "recording": "r", "seconds": 1.5, "audio": "a.wav"}
    rows = [
        {"id": f"u{i}", "codes": draw.integers(0, 64, (draw.integers(5, 40), 8)), "text": f"text {i}", **fields}
        for i in range(20)
    ]
    path = tmp_path_factory.mktemp("units") / "shard.parquet"
    write_units(path, rows, codec=CODEC, key="k")
    return path


def content(path: Path) -> tuple:
    rows, codes = read_shard(path)
    return unit_codec(path), rows, codes.tobytes(), [str(row) for row in read_units([path])], read_columns(path, ["id"])


def test_a_flipped_bit_is_refused_or_harmless(shard, tmp_path):
    whole, draw = shard.read_bytes(), random.Random(1)
    damaged = tmp_path / "damaged.parquet"
    for at in [8 * whole.index(b"SODAsha2") + 3, *(draw.randrange(8 * len(whole)) for _ in range(150))]:
        flipped = bytearray(whole)
        flipped[at // 8] ^= 1 << at % 8
        damaged.write_bytes(flipped)
        if whole.index(b"SODAsha2") <= at // 8 < whole.index(b"SODAsha2") + 8:  # then it is like one without checksum
            assert content(damaged) == content(shard)
            continue
        for read in (read_shard, lambda path: list(read_units([path])), lambda path: read_columns(path, ["id"])):
            with pytest.raises(SodaError, match=r"damaged\.parquet: "):
                read(damaged)


def test_other_readers_of_parquet_read_it(shard):
    assert pq.read_table(shard).column("id").to_pylist() == [row["id"] for row in read_units([shard])]


def test_a_shard_of_an_earlier_version_is_read(shard, tmp_path, monkeypatch):
    old = tmp_path / "old.parquet"
    monkeypatch.setattr(units, "seal", lambda path: None)
    write_units(old, list(read_units([shard])), codec=CODEC, key="k")
    monkeypatch.undo()
    assert unit_key(old) == "k"
    assert content(old)[2] == content(shard)[2]
