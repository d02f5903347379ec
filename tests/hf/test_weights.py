"""Folders of safetensors: written a tensor at a time as transformers would, and read whoever wrote them."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_soda.errors import SodaError
from megatron_soda.hf import weights
from megatron_soda.hf.weights import INDEX, WHOLE, ShardWriter, Weights

SHAPES = {"a.weight": (7, 5), "b.weight": (3,), "c.weight": (2, 3), "d.weight": (11, 4)}
TENSORS = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(i))
    for i, (name, shape) in enumerate(SHAPES.items())
}


def write(folder: Path, dtype: torch.dtype = torch.float32) -> ShardWriter:
    writer = ShardWriter(folder, SHAPES, dtype)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    return writer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_file(tmp_path, dtype):
    write(tmp_path, dtype)
    assert [path.name for path in tmp_path.iterdir()] == [WHOLE]
    found = load_file(tmp_path / WHOLE)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == SHAPES
    assert all(torch.equal(found[name], tensor.to(dtype)) for name, tensor in TENSORS.items())


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 160)  # a and b; c; d, which is larger
    write(tmp_path)
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*files, INDEX]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(tensor.numel() for tensor in TENSORS.values())
    assert index["weight_map"] == dict(zip(SHAPES, [files[0], files[0], files[1], files[2]], strict=True))
    read = Weights(tmp_path)
    read.check(SHAPES)
    assert all(torch.equal(read.read(name), tensor) for name, tensor in TENSORS.items())
    for file in files:  # the tensors of a file begin at a multiple of eight bytes
        assert struct.unpack("<Q", (tmp_path / file).read_bytes()[:8])[0] % 8 == 0


def test_every_tensor_is_written_in_its_turn(tmp_path):
    writer = ShardWriter(tmp_path, SHAPES, torch.float32)
    with pytest.raises(ValueError, match="not the tensor that comes next"):
        writer.write("b.weight", TENSORS["b.weight"])
    with pytest.raises(ValueError, match="not the tensor that comes next"):
        writer.write("a.weight", TENSORS["c.weight"])
    writer.write("a.weight", TENSORS["a.weight"])
    with pytest.raises(ValueError, match=r"not written: b\.weight, c\.weight, d\.weight"):
        writer.finish()
    with pytest.raises(SodaError, match=r"model\.safetensors: not a whole file"):
        Weights(tmp_path)


def other_shape(folder: Path) -> None:
    save_file(TENSORS | {"b.weight": torch.ones(4)}, folder / WHOLE)


def missing(folder: Path) -> None:
    save_file({name: t for name, t in TENSORS.items() if name != "c.weight"}, folder / WHOLE)


def unknown(folder: Path) -> None:
    save_file(TENSORS | {"e.bias": torch.ones(4)}, folder / WHOLE)


def integers(folder: Path) -> None:
    save_file(TENSORS | {"b.weight": torch.ones(3, dtype=torch.int8)}, folder / WHOLE)


def truncated(folder: Path) -> None:
    data = (folder / WHOLE).read_bytes()
    (folder / WHOLE).write_bytes(data[:-7])


def huge_header(folder: Path) -> None:
    (folder / WHOLE).write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def overlapping(folder: Path) -> None:
    header = {n: {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]} for n in ("a.weight", "b.weight")}
    text = json.dumps(header).encode()
    (folder / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text + bytes(12))


def no_json(folder: Path) -> None:
    (folder / WHOLE).write_bytes(struct.pack("<Q", 8) + b"\xff" * 8)


def a_pickle(folder: Path) -> None:
    (folder / WHOLE).rename(folder / "pytorch_model.bin")


def index(folder: Path, places: object) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (other_shape, r"b\.weight is \[4\], and config\.json makes it \[3\]"),
        (missing, r"the model lacks c\.weight"),
        (unknown, r"has unknown tensors: e\.bias"),
        (integers, r"b\.weight is I8; only F32, BF16, F16 can be read"),
        (truncated, r"model\.safetensors: not a whole file of safetensors"),
        (huge_header, r"model\.safetensors: not a whole file of safetensors"),
        (overlapping, r"model\.safetensors: not a whole file of safetensors"),
        (no_json, r"model\.safetensors: not a whole file of safetensors"),
        (a_pickle, r"no model\.safetensors .*there is pytorch_model\.bin.*Only safetensors are read"),
        (lambda f: index(f, dict.fromkeys(SHAPES, "../" + WHOLE)), r"is in '\.\./model\.safetensors', which is no"),
        (lambda f: index(f, dict.fromkeys(SHAPES, "other.safetensors")), r"other\.safetensors: no such file"),
        (lambda f: index(f, dict.fromkeys([*SHAPES, "z"], WHOLE)), r"model\.safetensors: z is not in it"),
        (lambda f: index(f, {}), r"names no tensors"),
        (lambda f: index(f, 5), r"index\.json: not an index of safetensors"),
        (lambda f: (f / INDEX).write_text("{"), r"index\.json: not valid JSON"),
        (lambda f: index(f, dict.fromkeys(SHAPES, 7)), r"is in 7, which is no file"),
    ],
)  # fmt: skip
def test_what_is_no_model(tmp_path, damage, said):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(SodaError, match=said):
        Weights(tmp_path).check(SHAPES)


def test_a_tensor_in_two_files(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 160)
    write(tmp_path)
    save_file(
        {"a.weight": torch.ones(7, 5), "c.weight": torch.ones(2, 3)}, tmp_path / "model-00002-of-00003.safetensors"
    )
    with pytest.raises(SodaError, match=r"a\.weight is in two files"):
        Weights(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(tmp_path, value, dtype):
    bad = TENSORS["d.weight"].clone()
    bad[10, 3] = value
    save_file({name: t.to(dtype) for name, t in (TENSORS | {"d.weight": bad}).items()}, tmp_path / WHOLE)
    read = Weights(tmp_path)
    read.check(SHAPES)
    read.read("a.weight")
    with pytest.raises(SodaError, match=r"d\.weight has values that are not finite"):
        read.read("d.weight")
