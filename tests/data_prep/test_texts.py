"""Text documents: what is kept, what is a reject, and where a compressed file was cut."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.sources import files
from data_prep.texts import read_texts
from data_prep.utterance import Reject
from megatron_soda.errors import SodaError


def read(*patterns: Path | str) -> tuple[list[str], dict[str, str]]:
    everything = list(read_texts([str(pattern) for pattern in patterns]))
    rejects = [one for one in everything if isinstance(one, Reject)]
    return [one for one in everything if isinstance(one, str)], {Path(one.where).name: one.reason for one in rejects}


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines: list[tuple[bytes, str]] = [
        (b'{"text": " "}', "empty text"),
        (b'{"text": 7}', "wrong type"),
        (b'{"text": null}', "wrong type"),
        (b'{"body": "x"}', "no 'text'"),
        (b"[]", "not a JSON object"),
        (b'{"text": "x"', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
    ]
    good = json.dumps({"text": "\n first\n\n  second\t", "id": 1}).encode()
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join([good, b"", *(line for line, _ in lines), b'{"text": "last"}']))
    texts, rejects = read(path)
    assert texts == ["first\n\n  second", "last"]
    assert {where: reason.split(":")[0] for where, reason in rejects.items()} == {
        f"a.jsonl:{number}": reason for number, (_, reason) in enumerate(lines, start=3)
    }


def test_txt_and_its_compressed_forms(tmp_path: Path) -> None:
    content = b"one\n\n \n  two  words \r\nthree"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(content[:7]) + gzip.compress(content[7:]) + b"\0" * 100)
    whole = zstandard.ZstdCompressor().compress
    (tmp_path / "c.txt.zst").write_bytes(whole(content[:7]) + whole(content[7:]))
    (tmp_path / "d.md").write_text("no")
    assert read(tmp_path) == (["one", "two  words", "three"] * 3, {})
    assert read(tmp_path / "*.txt*") == (["one", "two  words", "three"] * 3, {})
    assert list(read(tmp_path / "*")[1]) == ["d.md"]
    with pytest.raises(SodaError, match="matches nothing"):
        read(tmp_path / "*.jsonl")
    with pytest.raises(SodaError, match="no such folder or file"):
        read(tmp_path / "none.txt")


@pytest.mark.parametrize("packing", ["gz", "zst"])
def test_cut_short_wherever_it_was_cut(tmp_path: Path, packing: str) -> None:
    lines = [f"line {number} {number**5}" for number in range(40)]
    content = "\n".join(lines).encode()
    packed = (
        gzip.compress(content) if packing == "gz" else zstandard.ZstdCompressor(write_checksum=True).compress(content)
    )
    path = tmp_path / f"a.txt.{packing}"
    most = 0
    for length in range(len(packed)):
        path.write_bytes(packed[:length])
        texts, rejects = read(path)
        assert texts == lines[: len(texts)]
        assert list(rejects.values()) == [f"cut short: the .{packing} file ends too early"]
        assert list(rejects) == [f"a.txt.{packing}:{len(texts) + 1}"]
        most = max(most, len(texts))
    assert most == len(lines) - 1  # the last has no end of line: it might go on
    path.write_bytes(packed[:-4] + b"\1\2\3\4")
    assert next(iter(read(path)[1].values())).startswith("damaged:")


def test_parquet(tmp_path: Path) -> None:
    table = pa.table({"id": [1, 2, 3, 4], "text": ["  a\nb ", None, "", "c"]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    assert read(tmp_path) == (
        ["a\nb", "c"],
        {"a.parquet:1": "wrong type: text: a string is needed, not NoneType", "a.parquet:2": "empty text"},
    )
    not_utf8 = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"ok"]).buffers())
    pq.write_table(pa.table({"text": not_utf8}), tmp_path / "a.parquet")
    assert read(tmp_path) == (["ok"], {"a.parquet:0": "not UTF-8"})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-9])
    texts, rejects = read(tmp_path)
    assert texts == ["ok"]
    assert rejects["b.parquet"].startswith("not Parquet: or it is cut short")
    pq.write_table(table.select(["id"]), tmp_path / "c.parquet")
    with pytest.raises(SodaError, match="has the columns id; a column 'text' is needed"):
        read(tmp_path)


def test_a_long_line_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 1000)
    (tmp_path / "a.txt").write_text(f"{'x' * 1000}\n{'y' * 1001}\n{'z' * 600_000}\nend")
    texts, rejects = read(tmp_path)
    assert texts == ["x" * 1000, "end"]
    assert [reason.split(":")[0] for reason in rejects.values()] == ["line too long"] * 2


def test_a_line_without_end_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 2**20)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(bytes(100 * 2**20), 1))
    tracemalloc.start()
    _, rejects = read(tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(rejects) == 1
    assert peak < 60 * 2**20


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(["a.txt", "a.jsonl", "a.txt.gz", "a.jsonl.zst", "a.parquet"]), content=st.binary(max_size=200)
)
def test_any_bytes_never_raise(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    for text in read(tmp_path / name)[0]:
        assert text == text.strip() != ""
