"""What libraries raise on odd files becomes one sentence; a defect of ours keeps its traceback."""

import json

import pytest
import safetensors
import soundfile
import yaml
from pyarrow import parquet
from tokenizers import Tokenizer

from megatron_soda.errors import SodaError
from megatron_soda.files import read_json, read_sealed, reading, write_sealed

LIBRARIES = {
    "json": lambda path: json.loads(path.read_text()),
    "yaml": lambda path: yaml.safe_load(path.read_text()),
    "safetensors": lambda path: safetensors.safe_open(path, "np"),
    "parquet": lambda path: parquet.ParquetFile(path),
    "tokenizers": lambda path: Tokenizer.from_file(str(path)),
    "soundfile": lambda path: soundfile.read(path),
    "key": lambda path: {}["a key"],
    "type": lambda path: len(3),  # pyright: ignore[reportArgumentType]
    "number": lambda path: int("1" * 5000),
    "infinite": lambda path: int(float("1e999")),
    "deep": lambda path: json.loads("[" * 100_000),
    "memory": lambda path: bytearray(1 << 60),
}


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("content", [b"\x00\xff\x80: [", None], ids=["garbage", "missing"])
def test_what_a_library_raises_is_one_sentence(tmp_path, library, content):
    path = tmp_path / "odd"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SodaError) as raised, reading(path, "not what it should be"):
        LIBRARIES[library](path)
    said = str(raised.value)
    assert said.startswith(str(path))
    assert "\n" not in said
    assert len(said) < 400 + len(str(path))
    assert raised.value.__cause__ is not None


def test_a_panic_of_rust_is_a_sentence(tmp_path):
    panic = type("PanicException", (BaseException,), {})
    with pytest.raises(SodaError, match=r"x: cannot be read \(index out of bounds\)"), reading("x"):
        raise panic("index out of bounds")


@pytest.mark.parametrize("error", [AssertionError, NameError, ImportError, KeyboardInterrupt, SystemExit])
def test_what_no_file_can_raise_is_not_hidden(error):
    with pytest.raises(error), reading("x"):
        raise error("ours")


def test_a_full_disk_is_not_the_fault_of_the_file():
    with pytest.raises(OSError, match="No space"), reading("x"):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0{}", b"{", b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b"[" * 10**6, b"1" * 5000, b"\xff\xfe{\0}\0",
        b'{"a": 1}x', b"[1]",
    ],
    ids=["empty", "nul", "cut", "surrogate", "key", "deep", "digits", "utf-16", "tail", "list"],
)  # fmt: skip
def test_json_that_is_none(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SodaError, match=r"a\.json: (not valid JSON|holds a list, not a dict)"):
        read_json(tmp_path / "a.json", dict)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xc3\xa4"}')
    assert read_json(tmp_path / "a.json") == {"a": "ä"}


def test_sealed(tmp_path):
    path = tmp_path / "a.json"
    value = {"b": [1, 2.5, None, "ä"], "a": {"c": True}}
    write_sealed(path, value)
    found = read_sealed(path)
    assert {key: one for key, one in found.items() if key != "crc32"} == value
    path.write_text(json.dumps(found))  # without the line breaks
    assert read_sealed(path) == found
    for changed in ({"b": [1, 2.5, None, "a"]}, {"a": {"c": 1}}, {"d": 0}, {"crc32": "00000000"}, {"crc32": None}):
        path.write_text(json.dumps(found | changed))
        with pytest.raises(SodaError, match="have changed since it was written"):
            read_sealed(path)
    write_sealed(path, found)  # sealed anew, not twice
    assert read_sealed(path) == found
