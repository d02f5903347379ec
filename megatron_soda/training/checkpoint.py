"""Checkpoints in megatron-core's torch_dist format: RUN/checkpoints/step_00000250, read back at any layout.

A checkpoint is written under a temporary name, synced to the disk, and renamed when every rank is done: the rename is
what makes it the newest. In it, beside torch_dist's files:

checkpoint.json  the step, what data is used up, and of what model, vocabulary and optimizer it is
manifest.json    bytes and SHA-256 of every other file; a checkpoint that does not agree with it is not used

torch_dist's index is a pickle. It is read by an unpickler that knows a few harmless classes (`check_no_code`), and the
rest with weights_only, so a checkpoint that somebody else made cannot run code.
"""

import contextlib
import hashlib
import io
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from ..config import Model, Recipe
from ..errors import SodaError
from ..files import read_json, sync_folder, write_json
from ..vocab import TokenSpace
from .optimizer import choose_adam, finish_load, prepare_load

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
_NOT_OF_THE_MODEL = ("preset", "init", "init_std", "embedding_class_std", "head_class_std")


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, rising."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit() and (f / "checkpoint.json").is_file())


def newest_whole(run: Path) -> Path | None:
    """The newest checkpoint that agrees with its manifest; every damaged one above it is named. None if there is none.

    All ranks call this; each reads its share of the files. SodaError if there are checkpoints, and all are damaged.
    """
    steps = saved_steps(run)
    if dist.is_initialized():
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, steps)
        if any(seen != steps for seen in everyone):
            raise SodaError(
                f"{run / 'checkpoints'}: not all ranks see the same checkpoints there. The run folder must lie on a "
                "disk that all hosts share."
            )
    for step in reversed(steps):
        folder = folder_of(run, step)
        problems = damage(folder)
        if not problems:
            return folder
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"warning: {folder} is damaged and not used: {problems[0]}", flush=True)
    if steps:
        raise SodaError(
            f"{run / 'checkpoints'}: every checkpoint is damaged. To start from the beginning, move the folder away."
        )
    return None


def damage(folder: Path) -> list[str]:
    """What does not agree with the manifest; the same list on every rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problems = []
    try:
        manifest = read_json(folder / "manifest.json")
        for index, (name, (size, checksum)) in enumerate(sorted(manifest.items())):
            if index % ranks != rank:
                continue
            path = folder / name
            if not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
            elif _checksum(path) != checksum:
                problems.append(f"{name} has other bytes than were written")
    except (SodaError, OSError, ValueError, TypeError, AttributeError) as error:
        problems.append(str(error))
    if ranks == 1:
        return problems
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, problems)
    return sorted({problem for found in everyone for problem in found})


def describe(recipe: Recipe, space: TokenSpace) -> dict[str, Any]:
    """What must agree between a checkpoint and a recipe."""
    sizes = {k: v for k, v in asdict(recipe.model).items() if k not in _NOT_OF_THE_MODEL}
    optimizer = {
        "name": recipe.training.optimizer,
        "distributed": recipe.parallel.distributed_optimizer,
        # The distributed optimizer keeps float32 weights in any case; the plain one's state has another form in bf16.
        "half": recipe.training.precision != "fp32" and not recipe.parallel.distributed_optimizer,
        # Nor does it tell torch's Adam and a fused one the same count of steps.
        "torch": recipe.parallel.distributed_optimizer or choose_adam(recipe.training.optimizer == "cautious")[2],
    }
    return {"model": sizes, "space": space.to_dict(), "optimizer": optimizer}


def read_description(folder: Path, model: Model, space: TokenSpace, optimizer: dict | None = None) -> dict[str, Any]:
    """checkpoint.json; SodaError if it is of another model, vocabulary or (if given) optimizer, naming what differs."""
    saved = read_json(folder / "checkpoint.json")
    sizes = {k: v for k, v in asdict(model).items() if k not in _NOT_OF_THE_MODEL}
    for part, values in (("model", sizes), ("space", space.to_dict()), ("optimizer", optimizer or {})):
        for key, value in values.items():
            if saved.get(part, {}).get(key) != value:
                raise SodaError(
                    f"{folder}: a checkpoint of another {_PARTS[part]}: its {part}.{key} is "
                    f"{saved.get(part, {}).get(key)}, the recipe's is {value}. Use another `run` folder, or the recipe "
                    "it was made with."
                )
    return saved


_PARTS = {"model": "model", "space": "vocabulary", "optimizer": "optimizer"}


class Saver:
    """Writes checkpoints, while training goes on if `training.async_save`, and forgets old ones. All ranks call all."""

    def __init__(self, recipe: Recipe, models: list, optimizer: MegatronOptimizer, description: dict) -> None:
        self.run, self.models, self.optimizer, self.description = Path(recipe.run), models, optimizer, description
        self.keep_last, self.keep_every = recipe.training.keep_last, recipe.training.keep_every
        self.asynchronous = recipe.training.async_save
        self.queue: Any = AsyncCallsQueue() if self.asynchronous else None
        self.final: Path | None = None  # of the checkpoint under way
        self.state: dict[str, Any] = {}
        self.seal: _Seal | None = None
        if dist.get_rank() == 0:
            for leftover in (self.run / "checkpoints").glob(".step_*"):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Begins the checkpoint of `step` finished steps, after the one before. `state` is the same on every rank."""
        self.finish()
        self.final = folder_of(self.run, step)
        self.state = {**self.description, "step": step, **state}
        self._on_first(self._begin)
        sharded = sharded_state(self.models, self.optimizer, loading=False)
        with self._readable_errors():
            request: Any = dist_checkpointing.save(sharded, str(self._temporary), async_sharded_save=self.asynchronous)
            if self.asynchronous:
                self.queue.schedule_async_request(request)
        if not self.asynchronous:
            self.seal = _Seal(self._temporary)
            self.finish()

    def poll(self) -> None:
        """Goes on with what is under way, if every rank is ready to; returns at once if not."""
        if self.final is None:
            return
        if self.seal is None:
            with self._readable_errors():
                if not self.queue.maybe_finalize_async_calls(blocking=False):
                    return
            self.seal = _Seal(self._temporary)
        waiting = torch.tensor([float(self.seal.busy())], device=self._device)
        dist.all_reduce(waiting)
        if not waiting.item():
            self._complete()

    def finish(self) -> None:
        """Waits until the checkpoint under way is durable."""
        if self.final is None:
            return
        if self.seal is None:
            with self._readable_errors():
                self.queue.maybe_finalize_async_calls(blocking=True)
            self.seal = _Seal(self._temporary)
        self._complete()

    @property
    def _temporary(self) -> Path:
        assert self.final is not None
        return self.final.with_name(f".{self.final.name}.tmp")

    @property
    def _device(self) -> torch.device:
        return next(self.models[0].parameters()).device

    def _complete(self) -> None:
        """Every rank's files are synced: rank 0 adds the manifest and renames."""
        assert self.final is not None
        assert self.seal is not None
        everyone: list[Any] = [None] * dist.get_world_size()
        with self._readable_errors():
            dist.all_gather_object(everyone, self.seal.result())
            failed = [found for found in everyone if isinstance(found, str)]
            if failed:
                raise OSError(failed[0])
        self._on_first(self._appear, {name: entry for found in everyone for name, entry in found.items()})
        self.final = self.seal = None
        if dist.get_rank() == 0:
            self._forget()

    def _begin(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _appear(self, manifest: dict) -> None:
        assert self.final is not None
        write_json(self._temporary / "checkpoint.json", self.state)
        write_json(self._temporary / "manifest.json", manifest)
        if self.final.exists():
            shutil.rmtree(self.final)
        os.replace(self._temporary, self.final)
        sync_folder(self.final.parent)

    def _on_first(self, work: Callable[..., None], *arguments: Any) -> None:
        """Has the first rank do something that all wait for; what goes wrong there is an error on all."""
        failed = [""]
        if dist.get_rank() == 0:
            try:
                work(*arguments)
            except (OSError, SodaError) as error:
                failed = [str(error) or repr(error)]
        dist.broadcast_object_list(failed, 0)
        if failed[0]:
            with self._readable_errors():
                raise OSError(failed[0])

    def _forget(self) -> None:
        steps = saved_steps(self.run)
        if not self.keep_last:
            return
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                # Renamed first: a half-removed folder must not look like a checkpoint.
                doomed = folder_of(self.run, step).with_name(f".step_{step:08d}.old")
                with contextlib.suppress(OSError):  # what cannot be removed now may be the next time
                    os.replace(folder_of(self.run, step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (OSError, RuntimeError, CheckpointException) as error:  # the last is a BaseException of torch's
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            final, self.final, self.seal = self.final, None, None
            reason = (str(error).strip() or repr(error)).splitlines()[-1]
            raise SodaError(
                f"{final}: cannot write the checkpoint ({reason}). Those before it are whole. "
                "Free some space and run the same command again: it goes on from the newest."
            ) from None


class _Seal:
    """Syncs and checksums this rank's files of a checkpoint, in a thread."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, tuple[int, str]] | str = {}
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        rank = dist.get_rank()
        entries = {}
        try:
            for path in sorted(self.folder.iterdir()):
                writer = path.name[2:].partition("_")[0] if path.name.startswith("__") else "0"
                if writer == str(rank):
                    _sync_file(path)
                    entries[path.name] = (path.stat().st_size, _checksum(path))
            self.entries = entries
        except OSError as error:
            self.entries = str(error)

    def busy(self) -> bool:
        return self.thread.is_alive()

    def result(self) -> dict[str, tuple[int, str]] | str:
        """{file: (bytes, SHA-256)}, or what went wrong."""
        self.thread.join()
        return self.entries


def load(folder: Path, models: list, optimizer: MegatronOptimizer | None) -> None:
    """Reads weights, and Adam's state if an optimizer is given, at whatever layout the ranks now have."""
    check_no_code(folder)
    if optimizer is not None:
        prepare_load(optimizer)
    sharded = sharded_state(models, optimizer, loading=True)
    with _weights_only():
        loaded: Any = dist_checkpointing.load(sharded, str(folder))
    for index, model in enumerate(models):
        missing, unknown = model.load_state_dict(loaded[f"model{index}"], strict=False)
        left = [name for name in (*missing, *unknown) if not name.endswith("_extra_state")]
        if left:
            raise SodaError(f"{folder}: the model and the checkpoint do not agree on {', '.join(left[:5])}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        finish_load(optimizer)


def sharded_state(models: list, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    """What torch_dist saves: every tensor under its name in the whole model, so that any layout finds it.

    Transformer Engine's extra state (the histories of delayed FP8 scaling) is left out: local layers have none, and it
    is a pickle. After a resume these histories begin anew.
    """
    state: dict[str, Any] = {
        f"model{index}": {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        for index, model in enumerate(models)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=_OPTIMIZER_FORMAT)
    return state


class _Unpickler(pickle.Unpickler):
    """Knows the classes of torch_dist's index and nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        harmless = module.startswith("torch.distributed.checkpoint.") and name in _INDEX_CLASSES
        if harmless or (module, name) in _INDEX_TYPES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


_INDEX_CLASSES = {
    "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
    "MetadataIndex", "StorageMeta", "_StorageInfo", "_MEM_FORMAT_ENCODING", "SavePlan", "WriteItem", "WriteItemType",
    "TensorWriteData", "BytesIOWriteData",
}  # fmt: skip
_INDEX_TYPES = {
    ("torch", "Size"), ("torch.serialization", "_get_layout"),
    *(("torch", name) for name in ("float32", "float64", "bfloat16", "float16", "int64", "int32", "uint8", "bool")),
}  # fmt: skip


def check_no_code(folder: Path) -> None:
    """SodaError if the pickled index would do anything but describe tensors."""
    path = folder / ".metadata"
    try:
        with path.open("rb") as file:
            index = _Unpickler(file).load()
        if not isinstance(index, Metadata) or len(list(folder.glob("*.metadata"))) > 1:
            raise ValueError(f"it holds {type(index).__name__}, or is not the only one")
    except FileNotFoundError:
        raise SodaError(f"{path}: no such file; this is no torch_dist checkpoint") from None
    except Exception as error:  # a damaged pickle raises anything
        raise SodaError(f"{path}: not an index of tensors ({error}). It was not loaded.") from None


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.load without unpickling of anything but tensors and plain values, whatever the caller says."""
    original = torch.load

    def safe(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "weights_only": True})

    torch.load = safe
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            yield
    finally:
        torch.load = original


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
