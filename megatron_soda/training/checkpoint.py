"""Checkpoints in megatron-core's torch_dist format: RUN/checkpoints/step_00000250, read back at any layout.

A checkpoint is written under a temporary name and renamed when every rank is done, so a folder of that name is
whole. `checkpoint.json` in it says what model it is of. Load only checkpoints you trust: torch_dist's index is a
pickle. (What is meant to be shared is the Hugging Face export, which has none.)
"""

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from ..config import Model
from ..errors import SodaError
from ..files import read_json, sync_folder, write_json
from ..vocab import TokenSpace
from .optimizer import finish_load, prepare_load

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def saved_steps(run: Path) -> list[int]:
    """Steps that have a whole checkpoint, rising."""
    folders = (run / "checkpoints").glob("step_*")
    return sorted(int(f.name[5:]) for f in folders if f.name[5:].isdigit() and (f / "checkpoint.json").is_file())


def latest(run: Path) -> Path | None:
    steps = saved_steps(run)
    return folder_of(run, steps[-1]) if steps else None


def describe(model: Model, space: TokenSpace) -> dict[str, Any]:
    """What must agree between a checkpoint and a recipe."""
    sizes = {
        k: v
        for k, v in asdict(model).items()
        if k not in ("preset", "init_std", "embedding_class_std", "head_class_std")
    }
    return {"model": sizes, "space": space.to_dict()}


def check_same_model(folder: Path, model: Model, space: TokenSpace) -> dict[str, Any]:
    """The checkpoint's description; SodaError if it is of another model, naming what differs."""
    saved = read_json(folder / "checkpoint.json")
    wanted = describe(model, space)
    for part, values in wanted.items():
        for key, value in values.items():
            if saved.get(part, {}).get(key) != value:
                raise SodaError(
                    f"{folder}: a checkpoint of another model: its {part}.{key} is {saved.get(part, {}).get(key)}, "
                    f"the recipe's is {value}. Use another `run` folder, or the recipe it was made with."
                )
    return saved


def save(
    run: Path, step: int, model: Any, optimizer: MegatronOptimizer, description: dict[str, Any], state: dict
) -> Path:
    """Writes the checkpoint of `step` finished steps. `state` is small and the same on every rank."""
    final = folder_of(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    if dist.get_rank() == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    sharded = _sharded_state(model, optimizer, loading=False)
    try:
        dist_checkpointing.save(sharded, str(temporary))
    except (OSError, CheckpointException) as error:  # the second is torch's, and no Exception but a BaseException
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).strip().splitlines()[-1]
        raise SodaError(
            f"{final}: cannot write the checkpoint ({reason}). Those before it are whole. "
            "Free some space and run the same command again: it goes on from the newest."
        ) from None
    if dist.get_rank() == 0:
        write_json(temporary / "checkpoint.json", {**description, "step": step, **state})
        for path in temporary.iterdir():
            _sync_file(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
        sync_folder(final.parent)
    dist.barrier()
    return final


def load(folder: Path, model: Any, optimizer: MegatronOptimizer | None) -> None:
    """Reads weights, and Adam's state if an optimizer is given, at whatever layout the ranks now have."""
    if optimizer is not None:
        prepare_load(optimizer)
    sharded = _sharded_state(model, optimizer, loading=True)
    loaded: Any = dist_checkpointing.load(sharded, str(folder))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        finish_load(optimizer)


def _sharded_state(model: Any, optimizer: MegatronOptimizer | None, *, loading: bool) -> dict[str, Any]:
    state: dict[str, Any] = {"model": model.sharded_state_dict()}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(dict(state), is_loading=loading, metadata=_OPTIMIZER_FORMAT)
    return state


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
