"""The tensors of a checkpoint one at a time, without process groups: for conversions, which never hold a whole model.

A tensor of all layers is one entry in the index, with the layer as its first dimension; here it is named by the entry
and the layer.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import WriteItem, WriteItemType
from torch.distributed.checkpoint.utils import _create_file_view

from ..errors import SodaError
from ..files import reading
from .checkpoint_files import Entries, _Checked
from .checkpoint_index import read_index, write_index

_FILE_BYTES = 2 << 30  # a file of a written checkpoint is closed once it has more


class TensorReader:
    """Reads the tensors of the checkpoint `folder`, whatever layout wrote it. SodaError if its index is no index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        metadata, _ = read_index(folder)
        self._described: dict[str, Any] = dict(metadata.state_dict_metadata)
        self._places: dict[tuple[str, torch.Size], Any] = {
            (place.fqn, place.offset or torch.Size()): stored for place, stored in metadata.storage_data.items()
        }

    def names(self) -> set[str]:
        """Of the model's own tensors, not the optimizer's."""
        return {name for name in self._described if not name.startswith("optimizer.")}

    def shape(self, name: str, layer: int | None = None) -> tuple[int, ...] | None:
        """The shape of a tensor, None if the checkpoint has none of this name (and layer)."""
        if name not in self._described:
            return None
        size = tuple(self._described[name].size)
        if layer is None:
            return size
        return size[1:] if size and layer < size[0] else None

    def dtype(self, name: str) -> torch.dtype:
        return self._described[name].properties.dtype

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A tensor on the CPU. SodaError if there is none, or its file is not what the index says."""
        if self.shape(name, layer) is None:
            raise SodaError(f"{self.folder}: has no tensor {name}{'' if layer is None else f' of layer {layer}'}")
        described = self._described[name]
        begin, size = [0] * len(described.size), list(described.size)
        if layer is not None:
            begin[0], size[0] = layer, 1
        whole: Tensor | None = None
        left = torch.Size(size).numel()
        for chunk in described.chunks:
            low = [max(a, b) for a, b in zip(begin, chunk.offsets, strict=True)]
            ends = zip(begin, size, chunk.offsets, chunk.sizes, strict=True)
            high = [min(a + n, b + m) for a, n, b, m in ends]
            if any(h <= a for a, h in zip(low, high, strict=True)):
                continue
            tensor = self._read_chunk(name, chunk)
            tensor = tensor[_slices(low, high, chunk.offsets)]
            left -= tensor.numel()
            if whole is None and list(tensor.shape) == size:
                whole = tensor
                continue
            whole = torch.empty(size, dtype=tensor.dtype) if whole is None else whole
            whole[_slices(low, high, begin)] = tensor
        if whole is None or left:
            raise SodaError(f"{self.folder}: the index does not say where all of {name} lies")
        return whole if layer is None else whole[0]

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        stored = self._places[name, chunk.offsets]
        path = self.folder / stored.relative_path
        with reading(path, f"cannot read {name} in it"), open(path, "rb") as file:
            view: Any = _create_file_view(file, stored.offset, stored.length)
            tensor = torch.load(view, map_location="cpu", weights_only=True)
            if not isinstance(tensor, Tensor) or (tensor.shape, tensor.dtype) != (chunk.sizes, self.dtype(name)):
                raise ValueError(f"not a tensor of {self.dtype(name)} {tuple(chunk.sizes)}")
        return tensor


def _slices(low: list[int], high: list[int], begin: Any) -> tuple[slice, ...]:
    return tuple(slice(a - b, h - b) for a, h, b in zip(low, high, begin, strict=True))


class TensorWriter:
    """Writes tensors into `folder`, which is empty, as the trainer's own writer would; `finish` makes it readable."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: Entries = {}
        self._shapes: dict[str, tuple[list[int], torch.dtype]] = {}
        self._chunks: dict[str, list[ChunkStorageMetadata]] = {}
        self._storage: dict[MetadataIndex, Any] = {}
        self._stream: _Checked | None = None

    def write(self, name: str, tensor: Tensor, layer: int | None = None, layers: int = 0) -> None:
        """A whole tensor, or that of one layer of `layers`."""
        tensor = tensor.detach().contiguous()
        shape, offset = list(tensor.shape), [0] * tensor.ndim
        if layer is not None:
            tensor, shape, offset = tensor[None], [layers, *shape], [layer, *offset]
        index = MetadataIndex(name, torch.Size(offset))
        known = self._shapes.setdefault(name, (shape, tensor.dtype))
        if known != (shape, tensor.dtype) or index in self._storage:
            raise ValueError(f"{name} is written twice, or with two shapes or dtypes")
        self._chunks.setdefault(name, []).append(ChunkStorageMetadata(index.offset or torch.Size(), tensor.shape))
        file, stream = self._open()
        if tensor.untyped_storage().nbytes() != tensor.numel() * tensor.itemsize:
            tensor = tensor.clone()  # torch.save would write the whole storage
        item = WriteItem(index, WriteItemType.SHARD)
        try:
            form = SerializationFormat.TORCH_SAVE
            result = _write_item(_StorageWriterTransforms(), stream, tensor, item, file, form)
        except RuntimeError as error:  # torch's, which hides why the stream would not take more
            raise (stream.failure or error) from None
        self._storage[index] = result.storage_data
        if stream.size > _FILE_BYTES:
            self._close()

    def finish(self) -> Entries:
        """Writes the index. -> bytes and SHA-256 of the files with tensors. ValueError if a layer was left out."""
        self._close()
        described: dict[str, Any] = {}
        for name, (shape, dtype) in self._shapes.items():
            if sum(chunk.sizes.numel() for chunk in self._chunks[name]) != torch.Size(shape).numel():
                raise ValueError(f"not all layers of {name} were written")
            properties = TensorProperties(dtype=dtype)
            described[name] = TensorStorageMetadata(properties, torch.Size(shape), self._chunks[name])
        metadata = Metadata(state_dict_metadata=described, storage_data=self._storage)
        write_index(self.folder, metadata, {})
        (self.folder / ".metadata").write_bytes(pickle.dumps(metadata))  # for other programs: nothing here reads it
        torch.save({}, self.folder / "common.pt")
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))
        return self._entries

    def _open(self) -> tuple[str, _Checked]:
        name = f"__0_{len(self._entries)}.distcp"
        if self._stream is None:
            self._stream = _Checked(open(self.folder / name, "wb", buffering=1 << 20))  # noqa: SIM115
        return name, self._stream

    def _close(self) -> None:
        if self._stream is None:
            return
        stream, self._stream = self._stream, None
        stream.file.flush()
        os.fsync(stream.file.fileno())
        stream.file.close()
        self._entries[f"__0_{len(self._entries)}.distcp"] = (stream.size, stream.digest.hexdigest())


@contextmanager
def written(folder: Path) -> Iterator[TensorWriter]:
    """A TensorWriter whose file is closed whatever happens."""
    writer = TensorWriter(folder)
    try:
        yield writer
    finally:
        if writer._stream is not None:
            writer._stream.file.close()
