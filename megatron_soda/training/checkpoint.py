"""Checkpoints in megatron-core's torch_dist format: RUN/checkpoints/step_00000250, readable at any layout.

A checkpoint is written under a temporary name, synced to disk, and renamed once every rank is done; the rename makes it
the newest. Besides the tensors and their index (checkpoint_files.py, checkpoint_index.py), it contains:

checkpoint.json the step, the data used so far, and the model, vocabulary and optimizer
manifest.json    bytes and SHA-256 of every other file; a checkpoint that does not agree with it is not used
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer

from ..config import Model, Recipe
from ..errors import SodaError
from ..files import read_json, sha256, sync_folder, write_json
from ..log import log
from ..vocab import TokenSpace
from . import checkpoint_files
from .checkpoint_files import Entries
from .checkpoint_index import INDEX
from .optimizer import choose_adam, finish_load, prepare_load

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
_NOT_OF_THE_MODEL = ("preset", "init", "init_std", "embedding_class_std", "head_class_std")
_NEEDED = ("checkpoint.json", INDEX)


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps that have a checkpoint, intact or damaged, in ascending order."""
    names = [folder.name[5:] for folder in (run / "checkpoints").glob("step_*") if folder.is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def newest_whole(run: Path, before: int | None = None) -> Path | None:
    """The newest checkpoint (`before` a step) that matches its manifest. None if there is no checkpoint.

    Newer ones that do not match are reported. All ranks call this; each reads its share of the files. Raises SodaError
    if there are checkpoints but all are damaged.
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
    steps = [step for step in steps if before is None or step < before]
    for step in reversed(steps):
        folder = folder_of(run, step)
        problems = damage(folder)
        if not problems:
            return folder
        if not dist.is_initialized() or dist.get_rank() == 0:
            log.warning(f"{folder} is damaged and not used: {problems[0]}")
    if steps:
        raise SodaError(
            f"{run / 'checkpoints'}: every checkpoint{f' before step {before}' if before else ''} is damaged. "
            "To start from the beginning, move the folder away."
        )
    return None


def damage(folder: Path) -> list[str]:
    """What does not match the manifest; the same list on every rank."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    problems = _listed_wrong(folder)
    for index, (name, (size, digest)) in enumerate(sorted(_manifest(folder).items()) if not problems else ()):
        if index % ranks == rank:
            try:
                if (folder / name).stat().st_size != size or sha256(folder / name) != digest:
                    problems.append(f"{name} has changed since it was written")
            except (OSError, SodaError) as error:
                problems.append(f"{name} cannot be read ({error})")
    if ranks == 1:
        return problems
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, problems)
    return sorted({problem for found in everyone for problem in found})


def _listed_wrong(folder: Path) -> list[str]:
    """What is wrong with the manifest, and with the names and sizes of its files; quick to check."""
    try:
        manifest = _manifest(folder)
        problems = [
            f"{name} is not in manifest.json: an older version wrote it" for name in _NEEDED if name not in manifest
        ]
        for name, (size, _) in sorted(manifest.items()):
            path = folder / name
            if Path(name).name != name:
                problems.append(f"manifest.json names a file in another folder: {name!r}")
            elif not path.is_file():
                problems.append(f"{name} is missing")
            elif path.stat().st_size != size:
                problems.append(f"{name} has {path.stat().st_size} bytes, not {size}")
        return problems
    except (SodaError, OSError, ValueError, TypeError, AttributeError) as error:
        return [str(error)]


def _manifest(folder: Path) -> dict[str, tuple[int, str]]:
    return {name: (size, digest) for name, (size, digest) in read_json(folder / "manifest.json").items()}


def identity(folder: Path) -> str:
    """Identifies a checkpoint by content, wherever it is: the hash of its manifest, which has the hash of every file.
    Empty if it has none."""
    path = folder / "manifest.json"
    return sha256(path) if path.is_file() else ""


def manifest_of(folder: Path, known: Entries | None = None) -> Entries:
    """Bytes and SHA-256 of all files except the manifest, which are synced to disk. `known`: those of files already
    synced."""
    entries = dict(known or {})
    for path in sorted(folder.iterdir()):
        if path.name not in (*entries, "manifest.json"):
            _sync_file(path)
            entries[path.name] = (path.stat().st_size, sha256(path))
    return entries


def seal(temporary: Path, final: Path, description: dict[str, Any], entries: Entries) -> None:
    """Makes a checkpoint of a folder of tensors and their index: adds what describes them, and renames it."""
    write_json(temporary / "checkpoint.json", description)
    write_json(temporary / "manifest.json", manifest_of(temporary, entries))
    _remove(final)  # a damaged one of this step
    os.replace(temporary, final)
    sync_folder(final.parent)


def describe_model(model: Model, space: TokenSpace) -> dict[str, Any]:
    sizes = {k: v for k, v in asdict(model).items() if k not in _NOT_OF_THE_MODEL}
    return {"model": sizes, "space": space.to_dict()}


def describe(recipe: Recipe, space: TokenSpace) -> dict[str, Any]:
    """What must match between a checkpoint and a recipe."""
    optimizer = {
        "name": recipe.optimizer.name,
        "distributed": recipe.parallel.distributed_optimizer,
        # The distributed optimizer always keeps float32 weights; the plain one's state has a different form in bf16.
        "half": recipe.precision.dtype != "fp32" and not recipe.parallel.distributed_optimizer,
        # Nor does it give torch's Adam and a fused one the same step count.
        "torch": recipe.parallel.distributed_optimizer or choose_adam(recipe.optimizer.name == "cautious")[2],
    }
    return {**describe_model(recipe.model, space), "optimizer": optimizer}


def read_description(folder: Path, model: Model, space: TokenSpace, optimizer: dict | None = None) -> dict[str, Any]:
    """Reads checkpoint.json. Raises SodaError for a different model, vocabulary or (if given) optimizer, naming what
    differs."""
    saved = read_json(folder / "checkpoint.json")
    for part, values in {**describe_model(model, space), "optimizer": optimizer or {}}.items():
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
    """Writes checkpoints, in the background if `checkpoint.async_save`, and removes old ones. All ranks call every
    method. `origin`: the checkpoint that training continued from, in this run or another.
    """

    def __init__(
        self, recipe: Recipe, models: list, optimizer: MegatronOptimizer, description: dict, origin: Path | None = None
    ) -> None:
        self.run, self.models, self.optimizer, self.description = Path(recipe.run), models, optimizer, description
        self.keep_last, self.keep_every = recipe.checkpoint.keep_last, recipe.checkpoint.keep_every
        self.asynchronous = recipe.checkpoint.async_save
        self.final: Path | None = None  # of the checkpoint in progress
        self.state: dict[str, Any] = {}
        self.save: checkpoint_files.Save | None = None
        self.origin = origin.resolve() if origin else None
        self.written: set[int] = set()  # steps whose checkpoints are ours and intact
        if dist.get_rank() == 0:
            for leftover in (self.run / "checkpoints").glob(".step_*"):  # left by a killed run
                shutil.rmtree(leftover, ignore_errors=True)

    def start(self, step: int, state: dict[str, Any]) -> None:
        """Starts the checkpoint after `step` finished steps, once the previous one is complete. `state` is the same on
        every rank."""
        self.finish()
        self.final = folder_of(self.run, step)
        self.state = {**self.description, "step": step, **state}
        self._on_first(self._begin)
        with self._readable_errors():
            sharded = sharded_state(self.models, self.optimizer, loading=False)
            self.save = checkpoint_files.Save(sharded, self._temporary, self.asynchronous)
        if not self.asynchronous:
            self.finish()

    def poll(self) -> None:
        """Continues the checkpoint in progress if every rank is ready; returns at once if not."""
        if self.save is None:
            return
        waiting = torch.tensor([float(self.save.busy())], device=next(self.models[0].parameters()).device)
        dist.all_reduce(waiting)
        if not waiting.item():
            self.finish()

    def finish(self) -> None:
        """Waits until the checkpoint in progress is durable."""
        if self.save is None:
            return
        with self._readable_errors():
            entries = self.save.finish()
        self._on_first(self._appear, entries)
        self.final = self.save = None

    @property
    def _temporary(self) -> Path:
        assert self.final is not None
        return self.final.with_name(f".{self.final.name}.tmp")

    def _begin(self) -> None:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)

    def _appear(self, entries: Entries) -> None:
        """Once every rank's tensors are on disk: adds their description and renames."""
        assert self.final is not None
        seal(self._temporary, self.final, self.state, entries)
        self._forget(self.state["step"])

    def _forget(self, newest: int) -> None:
        """Removes old checkpoints. Damaged ones do not count as kept, nor do those ahead of us, which are damaged."""
        self.written.add(newest)
        if not self.keep_last:
            return
        steps = [step for step in saved_steps(self.run) if step <= newest]
        whole = [step for step in steps if step in self.written or not _listed_wrong(folder_of(self.run, step))]
        for step in steps:
            folder = folder_of(self.run, step)
            needed = step in whole[-self.keep_last :] or (self.keep_every and step % self.keep_every == 0)
            if not needed and step != newest and folder.resolve() != self.origin:
                _remove(folder)

    def _on_first(self, work: Callable[..., None], *arguments: Any) -> None:
        """Has the first rank do something that all wait for; a failure there is an error on all."""
        failed = [""]
        if dist.get_rank() == 0:
            try:
                with checkpoint_files.readable_errors(self._temporary):
                    work(*arguments)
            except (checkpoint_files.WriteError, SodaError) as error:
                failed = [str(error)]
        dist.broadcast_object_list(failed, 0)
        if failed[0]:
            with self._readable_errors():
                raise checkpoint_files.WriteError(failed[0])

    @contextlib.contextmanager
    def _readable_errors(self) -> Iterator[None]:
        try:
            with checkpoint_files.readable_errors(self._temporary):
                yield
        except checkpoint_files.WriteError as error:
            if dist.get_rank() == 0:
                shutil.rmtree(self._temporary, ignore_errors=True)
            final, self.final, self.save = self.final, None, None
            raise SodaError(
                f"{final}: cannot write the checkpoint: {error}. Earlier ones are intact; the same command resumes "
                "from the newest of them."
            ) from None


def load(folder: Path, models: list, optimizer: MegatronOptimizer | None) -> None:
    """Reads weights, and Adam's state if an optimizer is given, at the ranks' current layout."""
    if optimizer is not None:
        prepare_load(optimizer)
    loaded = checkpoint_files.load(sharded_state(models, optimizer, loading=True), folder)
    for index, model in enumerate(models):
        missing, unknown = model.load_state_dict(loaded[f"model{index}"], strict=False)
        left = [name for name in (*missing, *unknown) if not name.endswith("_extra_state")]
        if left:
            raise SodaError(f"{folder}: the model and the checkpoint do not agree on {', '.join(left[:5])}")
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        finish_load(optimizer)


def sharded_state(models: list, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    """What torch_dist saves: every tensor under its name in the whole model, so that any layout can find it.

    Transformer Engine's extra state (the histories of delayed FP8 scaling) is left out: local layers have none, and it
    is a pickle. After a resume these histories start over.
    """
    state: dict[str, Any] = {
        f"model{index}": {k: v for k, v in model.sharded_state_dict().items() if not k.endswith("_extra_state")}
        for index, model in enumerate(models)
    }
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=_OPTIMIZER_FORMAT)
    return state


def _remove(folder: Path) -> None:
    """Renames it first, because a half-removed folder must not look like a checkpoint."""
    doomed = folder.with_name(f".{folder.name}.old")
    with contextlib.suppress(OSError):  # it does not exist, or cannot be removed now, but perhaps next time
        os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
