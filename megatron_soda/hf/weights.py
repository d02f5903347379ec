"""Folders of safetensors, read and written a tensor at a time."""

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ..errors import SodaError
from ..files import read_json, reading, write_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # transformers' names
SHARD_BYTES = 2 * 10**9  # a larger tensor has a file of its own
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Weights:
    """The tensors of a model folder. Nothing but safetensors is read, so no file can run code.

    SodaError if there are none, the index names a file that is not one of the folder's or not there, a file is damaged,
    or index and files do not agree.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}  # safetensors' names of them
        self.files: dict[str, Path] = {}  # of every tensor
        listed = self._listed()
        for path in sorted({folder / name for name in listed.values()} if listed else {folder / WHOLE}):
            with reading(path, "not a whole file of safetensors"), safe_open(path, "pt") as file:
                names: list[str] = file.keys()
                for name in names:
                    part = file.get_slice(name)
                    self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), str(part.get_dtype())
                    if listed.get(name, path.name) != path.name or name in self.files:
                        raise SodaError(f"{path}: {name} is in two files, or not in the one that {INDEX} names")
                    self.files[name] = path
        if lost := sorted(listed.keys() - self.files.keys()):
            raise SodaError(f"{folder / listed[lost[0]]}: {lost[0]} is not in it, and {INDEX} says it is")

    def _listed(self) -> dict[str, str]:
        """Tensors and the files they are in, by the index. Empty if all are in one file."""
        path = self.folder / INDEX
        if not path.is_file():
            if not (self.folder / WHOLE).is_file():
                found = sorted(p.name for p in self.folder.glob("*") if p.suffix in (".safetensors", ".bin", ".pt"))
                raise SodaError(
                    f"{self.folder}: no {WHOLE} and no {INDEX} in it"
                    + (f" (there is {', '.join(found[:3])})" if found else "")
                    + ". Only safetensors are read: model.save_pretrained(FOLDER) of transformers writes them."
                )
            return {}
        with reading(path, "not an index of safetensors"):
            listed = dict(read_json(path, dict)["weight_map"])
            for name, file in listed.items():
                if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
                    raise SodaError(f"{path}: {name} is in {file!r}, which is no file of this folder")
        if not listed:
            raise SodaError(f"{path}: names no tensors")
        return listed

    @property
    def dtype(self) -> torch.dtype:
        """The format that holds all tensors as they are: theirs if they have one and it can be trained in."""
        found = {DTYPES.get(name) for name in self.dtypes.values()}
        return torch.bfloat16 if found == {torch.bfloat16} else torch.float32

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """SodaError unless these tensors, of these shapes and in a floating-point format, are all there are."""
        missing, unknown = wanted.keys() - self.shapes.keys(), self.shapes.keys() - wanted.keys()
        for what, names in (("lacks", missing), ("has unknown tensors:", unknown)):
            if names:
                raise SodaError(f"{self.folder}: the model {what} {_some(names)}")
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise SodaError(
                    f"{self.files[name]}: {name} is {list(self.shapes[name])}, and config.json makes it {list(shape)}"
                )
            if self.dtypes[name] not in DTYPES:
                raise SodaError(
                    f"{self.files[name]}: {name} is {self.dtypes[name]}; only {', '.join(DTYPES)} can be read. A "
                    "quantised model has to be saved in one of these first."
                )

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from the file. SodaError if a value is not finite."""
        path = self.files[name]
        with reading(path, f"cannot read {name} in it"), safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        if not all(torch.isfinite(end) for end in torch.aminmax(tensor)):
            raise SodaError(f"{path}: {name} has values that are not finite numbers")
        return tensor


def _some(names: Any) -> str:
    shown = sorted(names)
    return ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


class ShardWriter:
    """Writes the tensors `shapes` into `folder`, in that order, in files of at most SHARD_BYTES, as transformers names
    them. No more than the tensor at hand is in memory. `finish` is a ValueError unless all were written."""

    def __init__(self, folder: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        self.folder, self.shapes, self.dtype = folder, shapes, dtype
        self.bytes = {name: torch.Size(shape).numel() * dtype.itemsize for name, shape in shapes.items()}
        shards = self._shards()
        count = len(shards)
        self.files = {
            WHOLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors": names
            for number, names in enumerate(shards, 1)
        }
        self._begins = {names[0]: file for file, names in self.files.items()}
        self._left = list(reversed(shapes))
        self._open: BinaryIO | None = None

    def _shards(self) -> list[list[str]]:
        shards: list[list[str]] = []
        size = 0
        for name, more in self.bytes.items():
            if not shards or size + more > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += more
        return shards

    def write(self, name: str, tensor: Tensor) -> None:
        """The next tensor of `shapes`, in any floating-point format."""
        if self._left[-1:] != [name] or tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{name} {tuple(tensor.shape)} is not the tensor that comes next ({self._left[-1:]})")
        if name in self._begins:
            self.close()
            self._begin(self._begins[name])
        assert self._open is not None
        self._open.write(tensor.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data)
        self._left.pop()

    def _begin(self, file: str) -> None:
        """The header of a file: eight bytes of length, then JSON with the place of every tensor."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for name in self.files[file]:
            end = at + self.bytes[name]
            header[name] = {"dtype": _NAMES[self.dtype], "shape": list(self.shapes[name]), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
        self._open = open(self.folder / file, "wb", buffering=1 << 20)  # noqa: SIM115
        self._open.write(len(text).to_bytes(8, "little") + text)

    def close(self) -> None:
        if self._open is not None:
            self._open.flush()
            os.fsync(self._open.fileno())
            self._open.close()
            self._open = None

    def finish(self) -> None:
        """Writes the index, if there are several files, and looks whether all is there."""
        self.close()
        if self._left:
            raise ValueError(f"not written: {_some(self._left)}")
        if len(self.files) > 1:
            places = {name: file for file, names in self.files.items() for name in names}
            write_json(
                self.folder / INDEX, {"metadata": {"total_size": sum(self.bytes.values())}, "weight_map": places}
            )
        Weights(self.folder).check(self.shapes)
