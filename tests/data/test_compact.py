"""The compact store: the tokens of .bin/.idx from a third of the bytes, in any token space; damage is named."""

import os
import re
import shutil
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.data import compact, indexed
from megatron_soda.data.convert import convert_stores
from megatron_soda.data.files import Output
from megatron_soda.data.store import Store, convert, write_parts, write_store
from megatron_soda.data.windows import Windows
from megatron_soda.errors import SodaError
from megatron_soda.files import locked
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, contents, documents, write_data

COMPACT = ("frames", "json", "spans", "text")


@st.composite
def corpora(draw):
    """A token space, the codes of a frame, and documents of text and whole frames in any order, legal or not."""
    codebooks = draw(st.integers(1, 17))
    slots = draw(st.integers(1, codebooks))
    text = draw(st.sampled_from([3, 60, 200, 252, 253, 300, 65_000, 65_532, 65_533, 128_256, (1 << 24) - 4]))
    entries = draw(st.sampled_from([1, 2, 3, 16, 17, 1000, 1024, 2048, 2049, 65_536]))
    space = TokenSpace(text, 1, 2, codebooks, entries)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def frames(count):
        return (rng.integers(0, entries, (count, slots)) + space.audio_base + entries * np.arange(slots)).reshape(-1)

    made = []
    for _ in range(draw(st.integers(1, 6))):
        runs = [
            frames(rng.integers(0, 9)) if rng.random() < 0.5 else rng.integers(0, space.audio_base, rng.integers(0, 9))
            for _ in range(rng.integers(1, 6))
        ]
        document = np.concatenate([*runs, [rng.integers(0, space.audio_base)]]).astype(np.int32)
        made.append(document)
    return space, slots, made


@given(corpora(), st.data())
@settings(max_examples=150, deadline=None)
def test_any_window_of_any_corpus_is_the_same(corpus, data):
    space, slots, made = corpus
    with tempfile.TemporaryDirectory() as folder:
        cut = data.draw(st.integers(0, len(made)))
        parts = [(np.concatenate(some), np.array([len(d) for d in some])) for some in (made[:cut], made[cut:]) if some]
        write_parts(Path(folder) / "c", parts, space, "compact", slots=slots)
        store = Store(Path(folder) / "c")
        store.check_index()
        stream = np.concatenate(made)
        assert (store.size, len(store), store.slots, store.format) == (len(stream), len(made), slots, "compact")
        for _ in range(8):
            start = data.draw(st.integers(0, len(stream)))
            count = data.draw(st.integers(0, len(stream) - start))
            found = store.read(start, count)
            assert found.dtype == np.int32
            assert np.array_equal(found, stream[start : start + count])
        for i, document in enumerate(made):
            assert np.array_equal(store.document(i), document)
        assert store.offsets(0, len(made)).tolist() == [0, *np.cumsum([len(d) for d in made])]
        for start, count in ((0, len(stream) + 1), (-1, 2), (len(stream) + 1, 0)):
            with pytest.raises(IndexError):
                store.read(start, count)


def test_sizes():
    """11 bytes a frame of SODA's, 17 bits an id of its text; other codecs follow from their sizes."""
    soda = TokenSpace(128_256, 128_000, 128_001)
    assert (compact.frame_bits(soda), compact.text_bits(soda)) == (11, 17)
    assert compact.text_bits(TokenSpace(65_532, 1, 2)) == 16  # the markers' ids are the largest
    assert compact.text_bits(TokenSpace(65_533, 1, 2)) == 17
    assert compact.text_bytes(soda, 9) == 34
    assert compact.frame_bits(TokenSpace(10, 1, 2, 8, 1024)) == 10


def test_the_files_are_as_described(tmp_path):
    space = TokenSpace(300, 1, 2, 2, 8)
    base = space.audio_base
    write_store(tmp_path / "s", [np.array([1, 299, base + 5, base + 8 + 6, base + 7, base + 8, 2])], space, "compact")
    assert (tmp_path / "s.frames").read_bytes() == bytes([5 | 6 << 3, 7])
    assert (tmp_path / "s.text").read_bytes() == (1 | 299 << 9 | 2 << 18).to_bytes(9, "little")
    header = struct.pack("<8sIHBBQQQQ", b"SODASPAN", 1, 2, 3, 9, 7, 1, 1, 2)
    assert (tmp_path / "s.spans").read_bytes() == header + struct.pack("<6q", 2, 7, 0, 2, 0, 7)


def test_same_documents_same_bytes_and_the_other_format_is_removed(tmp_path):
    write_store(tmp_path / "a", documents(20), SPACE)
    for name in ("a", "b"):
        write_store(tmp_path / name, documents(20), SPACE, "compact")
    assert {p.suffix[1:] for p in tmp_path.glob("a.*")} == set(COMPACT)
    for suffix in COMPACT:
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("format", ["megatron", "compact"])
def test_stores_cut_at_every_byte(tmp_path, format):
    """Never a crash, never a read outside: a store that is not whole is refused when it is opened."""
    write_store(tmp_path / "s", documents(3), SPACE, format)
    for path in Store(tmp_path / "s").files.values():
        whole = path.read_bytes()
        for end in range(len(whole)):
            path.write_bytes(whole[:end])
            with pytest.raises(SodaError, match=rf"s\.({path.suffix[1:]}|bin)"):
                Store(tmp_path / "s")
        path.write_bytes(whole + b"\0")
        with pytest.raises(SodaError):
            Store(tmp_path / "s")
        path.unlink()
        with pytest.raises(SodaError, match="no such file"):
            Store(tmp_path / "s")
        path.write_bytes(whole)
    assert Store(tmp_path / "s").document(2).tolist() == documents(3)[2].tolist()


@pytest.mark.parametrize("format", ["megatron", "compact"])
@pytest.mark.parametrize("left", [0, 1, 0.5, -1])
def test_a_store_cut_short_while_it_is_open(tmp_path, format, left):
    """What is no longer there would be zeros up to the end of a page, and a SIGBUS beyond."""
    write_store(tmp_path / "s", documents(600), SPACE, format)
    store = Store(tmp_path / "s")
    ids = store.read(0, store.size)
    windows = Windows(store, 32, 0)
    for path in store.files.values():
        whole = path.read_bytes()
        os.truncate(path, int(left * len(whole)) if isinstance(left, float) else left % len(whole))
        for read in (
            lambda: store.read(store.size - 9, 9), lambda: windows[0], lambda: store.document(1),
            lambda: store.offsets(0, 3), store.check_index, lambda: list(store.parts()),
        ):  # fmt: skip
            with pytest.raises(SodaError) as error:
                read()
            assert str(error.value).startswith(f"{path}: has {path.stat().st_size} bytes, but had {len(whole)} ")
        path.write_bytes(whole)
        assert np.array_equal(store.read(0, store.size), ids)


@pytest.mark.parametrize("format", ["megatron", "compact"])
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_damaged_bytes_are_named_or_are_other_tokens(format, data):
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "s", documents(6), SPACE, format)
        name = data.draw(st.sampled_from(sorted(Store(Path(folder) / "s").files)))
        path = Path(folder) / f"s.{name}"
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(0, min(len(content) - 1, 300)) | st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content)
        try:
            store = Store(Path(folder) / "s")
            for start in (0, store.size // 2, store.size - 1):
                assert len(store.read(start, store.size - start)) == store.size - start
            for i in range(len(store)):
                assert store.document(i).dtype == np.int32
            store.check_index()
        except SodaError as error:
            assert re.search(r"/s(\.(bin|idx|spans|text|frames))?: ", str(error))  # noqa: PT017


def test_another_space_or_magic(tmp_path):
    write_store(tmp_path / "s", documents(3), SPACE, "compact")
    whole = (tmp_path / "s.spans").read_bytes()
    (tmp_path / "s.spans").write_bytes(b"SODASPAM" + whole[8:])
    with pytest.raises(SodaError, match=r"s\.spans: not the spans of a compact store"):
        Store(tmp_path / "s")
    (tmp_path / "s.spans").write_bytes(whole)
    write_store(tmp_path / "t", documents(3, space=TokenSpace(64, 1, 2, 4, 32)), TokenSpace(64, 1, 2, 4, 32), "compact")
    shutil.copy(tmp_path / "t.json", tmp_path / "s.json")
    with pytest.raises(SodaError, match="they belong to two different stores"):
        Store(tmp_path / "s")
    (tmp_path / "s.json").write_text('{"format": "zip", "space": {}}')
    with pytest.raises(SodaError, match="no token space and format"):
        Store(tmp_path / "s")


@pytest.mark.parametrize(
    ("tokens", "where"),
    [
        ([1, SPACE.audio_base, 2], "document 3, token 1"),  # a frame cut short
        ([1, 5, *(SPACE.audio_base + np.array([0, 16, 32, 50, 16, 0, 32, 48]))], "document 3, token 6"),  # wrong order
        ([1, 5, SPACE.size, *(SPACE.audio_base + np.array([16, 32, 48])), 2], "document 3, token 2"),
        ([1, 7, -3, 2], "document 3, token 2"),
    ],
)
def test_what_is_no_frame_is_refused(tmp_path, tokens, where):
    made = documents(3)
    parts = [(np.concatenate(made[:2]), np.array([len(d) for d in made[:2]]))]
    last = np.array(tokens, np.int32)
    parts.append((np.concatenate([made[2], last, made[0]]), np.array([len(made[2]), len(last), len(made[0])])))
    with pytest.raises(SodaError, match=f"{where}: neither text nor a whole frame of 4"):
        write_parts(tmp_path / "s", parts, SPACE, "compact")
    assert not list(tmp_path.iterdir())


def test_conversion_both_ways(tmp_path, capsys):
    write_data(tmp_path)
    before = contents(tmp_path)
    convert_stores(tmp_path, [], "compact", None)
    assert {name.split(".")[1] for name in contents(tmp_path)} == set(COMPACT)
    assert Store(tmp_path / "train").meta["codec"] == "none"
    assert "read back and compared" in capsys.readouterr().err
    convert_stores(tmp_path, [], "compact", None)
    assert capsys.readouterr().err.count("is already compact") == 3
    convert_stores(tmp_path, ["test"], "megatron", tmp_path / "other" / "test")
    assert (tmp_path / "other" / "test.bin").read_bytes() == before["test.bin"]
    assert Store(tmp_path / "test").format == "compact"
    convert_stores(tmp_path, [], "megatron", None)
    shutil.rmtree(tmp_path / "other")
    assert contents(tmp_path) == before
    convert_stores(tmp_path, [], "compact", tmp_path / "x")
    assert {name.split(".")[1] for name in contents(tmp_path / "x")} == set(COMPACT)
    shutil.rmtree(tmp_path / "x")
    assert contents(tmp_path) == before
    with pytest.raises(SodaError, match="not a store format"):
        convert_stores(tmp_path, [], "zip", None)


def test_conversions_take_care(tmp_path, capsys):
    folder = tmp_path / "x[bold]y"
    write_data(folder)
    before = contents(folder)
    with pytest.raises(SodaError, match="a store already exists there"):
        convert_stores(folder, ["train"], "compact", folder / "valid")
    with pytest.raises(SodaError, match=r"is a folder; name a store in it, such as .*/x\[bold\]y/train"):
        convert_stores(folder, ["train"], "compact", folder)
    with pytest.raises(SodaError, match="not a store's name"):
        convert_stores(Path(), ["."], "compact", None)
    with locked(folder), pytest.raises(SodaError, match="another soda is at work"):
        convert_stores(folder, [], "compact", None)
    assert contents(folder) == before
    convert_stores(folder, [], "compact", None)
    assert "x[bold]y/train: " in capsys.readouterr().err
    # Killed at the last moment, or amid writing: what is left is removed by the next one.
    (folder / "train.bin").write_bytes(b"old")
    convert_stores(folder, [], "compact", None)
    (folder / "..train.new.bin.123.tmp").write_bytes(b"half")
    (folder / ".train.new.idx").write_bytes(b"whole")
    convert_stores(folder, [], "megatron", None)
    assert contents(folder) == before


def test_a_full_disk_leaves_the_old_store(tmp_path, monkeypatch):
    write_store(tmp_path / "s", documents(20), SPACE)
    before = contents(tmp_path)

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Output, "sync", full)
    for format in ("megatron", "compact"):
        with pytest.raises(SodaError, match=r"the disk is full\. Nothing was changed"):
            write_store(tmp_path / "s", documents(30), SPACE, format)
        assert contents(tmp_path) == before


def test_a_conversion_that_fails_leaves_the_store(tmp_path, monkeypatch):
    write_store(tmp_path / "s", documents(20), SPACE)
    before = contents(tmp_path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Store(tmp_path / "s"), tmp_path / "s", "compact", interrupted)
    assert contents(tmp_path) == before
    made = compact.write_compact

    def failing(path, parts, space, slots):
        files = made(path, parts, space, slots)
        content = bytearray((path.with_name(f"{path.name}.frames")).read_bytes())
        content[7] ^= 1
        path.with_name(f"{path.name}.frames").write_bytes(content)
        return files

    monkeypatch.setitem(
        __import__("megatron_soda.data.store", fromlist=["FORMATS"]).FORMATS,
        "compact", (compact.SUFFIXES, compact.CompactTokens, failing),
    )  # fmt: skip
    with pytest.raises(SodaError, match="not what was read"):
        convert(Store(tmp_path / "s"), tmp_path / "s", "compact")
    assert contents(tmp_path) == before


def test_beyond_two_to_the_31(tmp_path):
    """Tokens and documents beyond 2**31, in files that are nearly all holes."""
    many, length = 2**31 + 5, 3
    with open(tmp_path / "m.idx", "wb") as file:
        file.write(indexed.HEADER.pack(indexed.MAGIC, 1, indexed.INT32, many, many + 1))
        file.seek(indexed.HEADER.size + 4 * (many - 1))
        file.write(np.int32(length).tobytes())
        file.seek(indexed.HEADER.size + 4 * many + 8 * (many - 1))
        file.write(np.int64(4 * length * (many - 1)).tobytes())
        file.truncate(indexed.HEADER.size + 12 * many + 8 * (many + 1))
    with open(tmp_path / "m.bin", "wb") as file:
        file.seek(4 * (length * many - 3))
        file.write(np.array([7, 8, 9], "<i4").tobytes())
    write_store(tmp_path / "x", documents(1), SPACE)
    shutil.copy(tmp_path / "x.json", tmp_path / "m.json")
    store = Store(tmp_path / "m")
    assert (len(store), store.size) == (many, length * many)
    assert store.document(many - 1).tolist() == [7, 8, 9]

    base, frame = SPACE.audio_base, 2  # 4 codes of 4 bits
    frames, text = 2**31 + 7, 2**31 + 16  # one span a frame
    tokens = text + 4 * frames
    with open(tmp_path / "c.spans", "wb") as file:
        file.write(compact.HEADER.pack(compact.MAGIC, 1, 4, 4, 7, tokens, many, frames, frames))
        starts, firsts = compact.HEADER.size, compact.HEADER.size + 8 * (frames + 1)
        begins = firsts + 8 * (frames + 1)
        for table, count, last in (
            (starts, frames, [tokens - 5, tokens]),
            (firsts, frames, [frames - 1, frames]),
            (begins, many, [tokens - 7, tokens]),
        ):
            file.seek(table + 8 * (count - 1))
            file.write(np.array(last, "<i8").tobytes())
    words = (1 << 7 * 5 | 9 << 7 * 6 | 2 << 7 * 7).to_bytes(7, "little")  # text is a multiple of 8
    for name, size, end in (("frames", frames * frame, b"\x21\x43"), ("text", 7 * text // 8, words)):
        with open(tmp_path / f"c.{name}", "wb") as file:
            file.seek(size - len(end))
            file.write(end)
    write_store(tmp_path / "y", documents(1), SPACE, "compact")
    shutil.copy(tmp_path / "y.json", tmp_path / "c.json")
    store = Store(tmp_path / "c")
    assert (len(store), store.size) == (many, tokens)
    wanted = [1, 9, base + 1, base + 16 + 2, base + 32 + 3, base + 48 + 4, 2]
    assert store.document(many - 1).tolist() == wanted
    assert store.read(tokens - 4, 4).tolist() == wanted[3:]
    assert store.offsets(many - 1, many).tolist() == [tokens - 7, tokens]
