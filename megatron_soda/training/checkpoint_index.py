"""index.json: what torch_dist keeps in two pickles, without a pickle.

torch_dist describes its tensors in .metadata and keeps everything else in common.pt. Both are pickles, and a pickle
that a stranger wrote can run code however carefully its names are checked. They are still written, for other programs
to read, but never opened: index.json holds the same facts, and torch's Metadata is built from it field by field. Only
the tensors themselves go through torch.load, with weights_only. Imports no megatron-core.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import SodaError
from ..files import read_json, write_json

INDEX = "index.json"
_FORMAT = 1
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8)
}


def write_index(folder: Path, metadata: Metadata, common: dict[str, Any]) -> None:
    """index.json out of torch's Metadata and what is no sharded tensor (plain values, and scalar tensors)."""
    described: dict[str, Any] = metadata.state_dict_metadata
    places: dict[str, list[dict[str, Any]]] = {name: [] for name in described}
    for place, stored in metadata.storage_data.items():
        chunk = next(c for c in described[place.fqn].chunks if c.offsets == place.offset)
        places[place.fqn].append(
            {
                "offset": list(chunk.offsets),
                "shape": list(chunk.sizes),
                "file": stored.relative_path,
                "start": stored.offset,
                "bytes": stored.length,
            }
        )
    tensors = {
        name: {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "shape": list(tensor.size),
            "chunks": places[name],
        }
        for name, tensor in described.items()
    }
    write_json(folder / INDEX, {"format": _FORMAT, "common": _encode(common), "tensors": tensors})


def read_index(folder: Path) -> tuple[Metadata, dict[str, Any]]:
    """Metadata and the common state from index.json. SodaError if it is missing, or describes what cannot be."""
    path = folder / INDEX
    if not path.is_file() and (folder / ".metadata").is_file():
        raise SodaError(
            f"{folder}: has no {INDEX}; an older version of megatron_soda or another program wrote it. If you trust "
            f"it, for its index can run code: python tools/index_checkpoint.py {folder}"
        )
    try:
        index = read_json(path)
        if index["format"] != _FORMAT:
            raise ValueError(f"format {index['format']}, and {_FORMAT} is known here")
        sizes = {file.name: file.stat().st_size for file in folder.glob("__*_*.distcp") if file.is_file()}
        tensors, storage = {}, {}
        for name, entry in index["tensors"].items():
            tensors[name] = _tensor(entry)
            for chunk in entry["chunks"]:
                storage[MetadataIndex(name, torch.Size(_numbers(chunk["offset"])))] = _place(chunk, sizes)
        return Metadata(state_dict_metadata=tensors, storage_data=storage), _decode(index["common"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise SodaError(f"{path}: does not describe a checkpoint ({error!r}). It was not loaded.") from None


def _tensor(entry: dict[str, Any]) -> TensorStorageMetadata:
    shape, chunks, count = _numbers(entry["shape"]), [], 0
    for chunk in entry["chunks"]:
        offset, size = _numbers(chunk["offset"]), _numbers(chunk["shape"])
        inside = len(offset) == len(size) == len(shape)
        if not inside or any(o + s > whole for o, s, whole in zip(offset, size, shape, strict=True)):
            raise ValueError(f"a chunk of {size} at {offset} in a tensor of {shape}")
        chunks.append(ChunkStorageMetadata(torch.Size(offset), torch.Size(size)))
        count += math.prod(size)
    if count != math.prod(shape):
        raise ValueError(f"chunks of {count} elements in a tensor of {shape}")
    return TensorStorageMetadata(TensorProperties(dtype=_DTYPES[entry["dtype"]]), torch.Size(shape), chunks)


def _place(chunk: dict[str, Any], sizes: dict[str, int]) -> _StorageInfo:
    """Where a chunk lies, in one of the folder's own files: no other name is known here."""
    name, (start, length) = chunk["file"], _numbers([chunk["start"], chunk["bytes"]])
    if name not in sizes:
        raise ValueError(f"a file {name!r} that is not there")
    if start + length > sizes[name]:
        raise ValueError(f"{name} has {sizes[name]} bytes, and should have {start + length} or more")
    return _StorageInfo(name, start, length)


def _numbers(values: Any) -> list[int]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 1 << 62 for v in values):
        raise ValueError(f"{values!r}, and not a list of sizes")
    return values


def _encode(value: Any) -> Any:
    """Plain values to JSON; what JSON does not have is written as an object with the key "": its kind."""
    if isinstance(value, dict):
        if all(isinstance(key, str) and key for key in value):
            return {key: _encode(v) for key, v in value.items()}
        return {"": "dict", "items": [[_encode(k), _encode(v)] for k, v in value.items()]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, tuple):
        return {"": "tuple", "items": [_encode(v) for v in value]}
    if isinstance(value, Tensor) and value.ndim == 0:
        return {"": "scalar", "dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"a {type(value).__name__} has no place in {INDEX}")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    match value.get(""):
        case None:
            return {key: _decode(v) for key, v in value.items()}
        case "dict":
            return {_decode(k): _decode(v) for k, v in value["items"]}
        case "tuple":
            return tuple(_decode(v) for v in value["items"])
        case "scalar":
            return torch.tensor(value["value"], dtype=_DTYPES[value["dtype"]])
    raise ValueError(f"a {value['']!r} in the common state")
