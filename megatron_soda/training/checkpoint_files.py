"""The files of a checkpoint: megatron-core's torch_dist tensors, written by threads and read through our own index.

megatron-core determines which tensors a rank saves and loads. Its `save` and `load` are not used, because its versions
differ in what they do with everything else. Nor is its writer: it forks processes or starts a manager, which are killed
by a signal to the process group, breaking the checkpoint, and which outlive a killed trainer.
"""

import copy
import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as megatron_torch
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync, _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, SerializationFormat, _write_item
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

from ..errors import SodaError
from .checkpoint_index import read_index, write_index

Entries = dict[str, tuple[int, str]]  # file name: bytes, SHA-256


# ---- writing


class Save:
    """Saves tensors to `folder`, which is empty. All ranks create one, and all call `finish`.

    With `background` the tensors are copied first, so training may change them while they are written.
    """

    def __init__(self, state: dict[str, Any], folder: Path, background: bool) -> None:
        parts: Any = save_preprocess(state)  # what has shards, and what does not
        # Adam's step count is in the common part, and the next step increments it in place.
        self._writer = Writer(folder, copy.deepcopy(parts[1]), copy=background)
        flat, _, _ = megatron_torch._replace_state_dict_keys_with_sharded_keys(parts[0], keep_only_main_replica=True)
        planner = megatron_torch.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        plain = megatron_torch.mcore_to_pyt_state_dict(flat, is_loading=False)
        self._plan: Any = save_state_dict_async_plan(plain, self._writer, planner=planner)[0]
        self._thread = threading.Thread(target=self._writer.write, name="checkpoint", daemon=True)
        self._thread.start()

    def busy(self) -> bool:
        """Whether this rank's files are still being written."""
        return self._thread.is_alive()

    def finish(self) -> Entries:
        """Waits for every rank's files and writes the index. Returns what all ranks wrote, the same on each. Raises
        WriteError on every rank if one of them failed."""
        self._thread.join()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self._writer.failure or self._writer.entries)
        for rank, found in enumerate(everyone):
            if isinstance(found, str):
                raise WriteError(found if len(everyone) == 1 else f"rank {rank}: {found}")
        save_state_dict_async_finalize(*self._plan)
        if dist.get_rank() == 0:
            save_config(CheckpointingConfig("torch_dist", 1), str(self._writer.path))
        return {name: entry for entries in everyone for name, entry in entries.items()}


class Writer(FileSystemWriterAsync):
    """Writes one rank's files with threads of this process; `entries` and `failure` hold the outcome.

    `common` is everything that is not a tensor. With `copy`, tensors already on the CPU are copied too.
    """

    def __init__(self, folder: Path, common: dict[str, Any], copy: bool) -> None:
        super().__init__(str(folder), thread_count=2)
        self.common, self.copy = common, copy
        self.entries: Entries = {}
        self.failure = ""
        self._files: list[tuple[str, list[tuple[WriteItem, Tensor]]]] = []
        self._results: list[Any] = []

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Decides which tensors go to which file, and moves them to the CPU."""
        for items in filter(None, _split_by_size_and_type(self.thread_count, plan.items)):
            name = f"{plan.storage_data.prefix}{len(self._files)}.distcp"
            self._files.append((name, [(item, _to_cpu(item, planner, self.copy)) for item in items]))
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def write(self) -> None:
        """Writes, syncs and checksums this rank's files."""
        try:
            if dist.get_rank() == 0:
                torch.save(self.common, Path(self.path) / "common.pt")
            with ThreadPoolExecutor(self.thread_count, "checkpoint") as pool:
                for name, entry, results in pool.map(self._write_file, *zip(*self._files, strict=True)):
                    self._results += results
                    self.entries[name] = entry
        except Exception as error:  # Save.finish raises it on every rank
            self.failure = _why(error, Path(self.path))
        finally:
            self._files = []  # releases a copy of the whole state

    def _write_file(self, name: str, tensors: list[Any]) -> tuple[str, tuple[int, str], list[Any]]:
        results = []
        with open(Path(self.path) / name, "wb", buffering=1 << 20) as file, _Checked(file) as stream:
            for item, tensor in tensors:
                try:
                    results.append(
                        _write_item(self.transforms, stream, tensor, item, name, SerializationFormat.TORCH_SAVE)
                    )
                except RuntimeError as error:  # torch's, which hides why the stream refused more
                    raise (stream.failure or error) from None
            file.flush()
            os.fsync(file.fileno())
        return name, (stream.size, stream.digest.hexdigest()), results

    def retrieve_write_results(self) -> Any:
        return self._results

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        """On the first rank: writes .metadata for other programs, and the index."""
        vars(metadata).pop("all_local_plans", None)  # megatron-core's cache, most of the file
        super().finish(metadata, results)
        metadata.storage_data = {r.index: r.storage_data for wrote in results for r in wrote}  # torch: in a copy
        write_index(Path(self.path), metadata, self.common)


class _Checked(io.RawIOBase):
    """A file written sequentially: counts and checksums its content, and records why it failed."""

    def __init__(self, file: Any) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        try:
            self.file.write(view)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self.digest.update(view)
        self.size += len(view)
        return len(view)


def _to_cpu(item: WriteItem, planner: SavePlanner, copy: bool) -> Tensor:
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, Tensor):
        raise ValueError(f"a checkpoint can only hold tensors, not {item.index.fqn}")
    tensor = tensor.detach()
    part = tensor.numel() * tensor.itemsize < tensor.untyped_storage().size()  # torch.save would write all of it
    if tensor.device.type == "cpu":
        return tensor.clone() if copy or part else tensor
    return tensor.to("cpu", non_blocking=True)


class WriteError(OSError):
    """Its message gives the reason, for the user."""


@contextmanager
def readable_errors(folder: Path) -> Iterator[None]:
    """Turns errors while writing `folder` into WriteError, and recognises a full disk."""
    try:
        yield
    except (torch.OutOfMemoryError, SodaError, WriteError):
        raise
    except (OSError, RuntimeError, ValueError, CheckpointException) as error:  # the last is a BaseException of torch's
        raise WriteError(_why(error, folder)) from None


def _why(error: BaseException, folder: Path) -> str:
    text = (str(error).strip() or repr(error)).splitlines()[-1]
    place = folder if folder.is_dir() else folder.parent
    try:
        free = shutil.disk_usage(place).free
    except OSError:
        free = None
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or os.strerror(errno.ENOSPC) in text
    # torch's C++ writer, used for common.pt, only says at which byte it stopped.
    if full or (free is not None and free < 1 << 20):
        return f"the disk is full{'' if free is None else f' ({free / 2**20:.1f} MiB left)'}. Free some space"
    return text


# ---- reading


def load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fills a sharded state dict from a checkpoint, at the ranks' current layout. All ranks call this.

    Raises SodaError if the index or the tensors do not fit this state.
    """
    original = torch.load

    def tensors_only(*args: Any, **kwargs: Any) -> Any:  # whatever the caller or the environment says
        return original(*args, **{**kwargs, "weights_only": True})

    torch.load = tensors_only
    try:
        with _together(folder):
            common = read_index(folder)[1]
            sharded, local, factories = load_preprocess(state)
            merge(common, local)
            sharded, _ = extract_sharded_base(sharded)
        metadata = determine_global_metadata(sharded)[1]
        with _together(folder):  # only the first rank checks it
            validate_sharding_integrity(metadata)
        with _together(folder):
            merge(common, megatron_torch.TorchDistLoadShardedStrategy().load(sharded, folder))
            common = apply_factory_merges(common, factories)  # type: ignore[arg-type]
    finally:
        torch.load = original
    return common


@contextmanager
def _together(folder: Path) -> Iterator[None]:
    """An error inside on any rank becomes a SodaError on all of them, which would otherwise wait for that rank."""
    failure: BaseException | None = None
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (CheckpointException, Exception) as error:  # whatever torch and megatron-core raise for foreign bytes
        failure = error
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, failure and _why_not_loaded(failure, folder))
    if any(everyone):
        raise SodaError(next(filter(None, everyone))) from failure


def _why_not_loaded(failure: BaseException, folder: Path) -> str:
    failed = getattr(failure, "failures", None)
    cause: Any = next(iter(failed.values()))[0] if failed else failure
    if isinstance(cause, SodaError):
        return str(cause)
    return f"{folder}: cannot be loaded into this model ({(str(cause).strip() or repr(cause)).splitlines()[0]})"


class Reader(FileSystemReader):
    """torch's reader, on our index."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_index(Path(self.path))[0]

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """torch's own reads all of a stored tensor again for each part of it, and a rank has a table in ten parts."""
        parts: dict[MetadataIndex, list[ReadItem]] = {}
        for item in plan.items:
            parts.setdefault(item.storage_index, []).append(item)
        for index, items in parts.items():
            stored = self.storage_data[index]
            with open(Path(self.path) / stored.relative_path, "rb") as file:
                view: Any = _create_file_view(file, stored.offset, stored.length)
                whole = torch.load(view, map_location="cpu", weights_only=True)
            for item in items:
                part = narrow_tensor_by_index(whole, item.storage_offsets, item.lengths)
                target = planner.resolve_tensor(item).detach()
                if target.shape != part.shape:
                    raise ValueError(f"{index.fqn} is stored as {tuple(part.shape)}, not {tuple(target.shape)}")
                target.copy_(part)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


megatron_torch._get_filesystem_reader = lambda folder, **_: Reader(folder)  # type: ignore[assignment]
