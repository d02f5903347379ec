"""The index of a checkpoint: what torch's own description says, and a message for whatever else it may hold."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_soda.errors import SodaError
from megatron_soda.training.checkpoint_index import INDEX, read_index


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """A checkpoint among others."""
    return Path(shutil.copytree(saved, tmp_path / "run")) / "checkpoints" / "step_00000012"


def _first(index: dict) -> dict:
    return next(iter(index["tensors"].values()))


def _changed(change):
    def apply(text: str) -> str:
        index = json.loads(text)
        change(index)
        return json.dumps(index)

    return apply


HOSTILE = {
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "a list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "no format": _changed(lambda i: i.pop("format")),
    "another format": _changed(lambda i: i.update(format=2)),
    "tensors a list": _changed(lambda i: i.update(tensors=[])),
    "tensor a number": _changed(lambda i: i["tensors"].update(x=1)),
    "dtype a class": _changed(lambda i: _first(i).update(dtype="load")),
    "shape a string": _changed(lambda i: _first(i).update(shape="12")),
    "negative": _changed(lambda i: _first(i)["chunks"][0].update(offset=[-1, 0])),
    "true for one": _changed(lambda i: _first(i)["chunks"][0].update(start=True)),
    "a fraction": _changed(lambda i: _first(i)["chunks"][0].update(start=0.5)),
    "huge": _changed(lambda i: _first(i).update(shape=[1 << 40, 1 << 40])),
    "outside the tensor": _changed(lambda i: _first(i)["chunks"][0].update(offset=[1, 0])),
    "a hole": _changed(lambda i: _first(i)["chunks"].clear()),
    "past the end": _changed(lambda i: _first(i)["chunks"][0].update(bytes=1 << 30)),
    "elsewhere": _changed(lambda i: _first(i)["chunks"][0].update(file="../step_00000006/__0_0.distcp")),
    "absolute": _changed(lambda i: _first(i)["chunks"][0].update(file="/etc/passwd")),
    "no file": _changed(lambda i: _first(i)["chunks"][0].update(file="__7_0.distcp")),
    "a pickle": _changed(lambda i: _first(i)["chunks"][0].update(file="common.pt")),
    "common of an unknown kind": _changed(lambda i: i.update(common={"": "os.system", "items": ["ls"]})),
    "common unhashable": _changed(lambda i: i.update(common={"": "dict", "items": [[[1], 2]]})),
}


@pytest.mark.parametrize("change", HOSTILE)
def test_an_index_of_nonsense_is_a_message(folder, change):
    path = folder / INDEX
    read_index(folder)
    path.write_text(HOSTILE[change](path.read_text()))
    with pytest.raises(SodaError, match=r"index\.json: "):
        read_index(folder)


def test_the_index_says_what_torch_says(folder):
    """Other programs read .metadata: the same tensors, in the same places."""
    theirs = FileSystemReader(folder).read_metadata()
    ours, common = read_index(folder)

    def tensors(metadata):
        return {
            name: (entry.properties.dtype, entry.size, sorted((tuple(c.offsets), tuple(c.sizes)) for c in entry.chunks))
            for name, entry in metadata.state_dict_metadata.items()
        }

    def places(metadata):
        return {
            (where.fqn, where.offset): (at.relative_path, at.offset, at.length)
            for where, at in metadata.storage_data.items()
        }

    assert len(theirs.state_dict_metadata) > 30
    assert tensors(ours) == tensors(theirs)
    assert places(ours) == places(theirs)
    assert repr(common) == repr(torch.load(folder / "common.pt", weights_only=True))
