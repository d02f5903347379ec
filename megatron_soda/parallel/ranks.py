"""Process groups: torch.distributed and megatron-core's, on NCCL or gloo. Import this before `megatron`."""

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from . import cpu

warnings.filterwarnings("ignore", module=r"megatron\.")  # about settings that are not ours to change
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # caused by megatron-core
cpu.install()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from torch.distributed import HashStore, PrefixStore  # noqa: E402 # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.distributed_c10d import default_pg_timeout  # noqa: E402
from torch.distributed.rendezvous import rendezvous  # noqa: E402

from .. import files  # noqa: E402
from ..config import Recipe  # noqa: E402
from ..errors import SodaError  # noqa: E402
from . import megatron, preflight, watch  # noqa: E402
from .layout import check_layout  # noqa: E402
from .one_node import stay_on_loopback  # noqa: E402
from .speed import Speed, choose_speed  # noqa: E402

facts: list[dict[str, Any]] = []  # of every rank, as found by `init`
_laid_out: list[tuple[Any, ...]] = []  # the process group and layout of megatron-core's groups
megatron.adapt()


def init(recipe: Recipe) -> torch.device:
    """Starts the process group (torchrun's, or a single process) and lays out the ranks. Returns the device.

    Raises SodaError if the layout does not divide the model or the processes, if a setting asks for what is not there,
    and if the ranks were not started alike.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    check_layout(recipe, world_size)
    choose_speed(recipe)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise SodaError(
                f"process {local_rank} of this host has no device: there are {torch.cuda.device_count()}. Start one "
                "process per device (torchrun --nproc-per-node, or NPROC_PER_NODE for launch.sh)."
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # torch would use all cores of the machine, even those not ours
            cores = len(os.sched_getaffinity(0))
            torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        rank = 0 if world_size == 1 else int(os.environ["RANK"])
        if world_size == 1:
            stay_on_loopback()
        store = rendezvous_store(world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        if world_size > 1:
            watch.start(store.clone(), rank, world_size)
    # Before creating groups: ranks that expect different groups would wait forever.
    facts[:] = preflight.compare_ranks(recipe, device)
    layout(recipe)
    return device


def rendezvous_store(world_size: int) -> Any:
    """The store through which the ranks of this attempt find each other.

    torchrun keeps one store for all attempts (`--max-restarts`), in which a second attempt would find the addresses of
    dead processes, so each attempt gets its own part of the store.
    """
    if world_size == 1:
        return HashStore()
    store, _, _ = next(rendezvous("env://", timeout=default_pg_timeout))
    return PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


@contextlib.contextmanager
def locked(folder: Path, device: torch.device) -> Iterator[None]:
    """Locks the folder, created if needed, for this job; the first rank holds the lock. Raises SodaError on all ranks
    if another process has it."""
    with contextlib.ExitStack() as held:
        refused = ""
        if is_first():
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(files.locked(folder))
            except (SodaError, OSError) as error:
                refused = str(error)
        refused = json.loads(preflight.gather(json.dumps(refused), device)[0])
        if refused:
            raise SodaError(refused)
        yield


def layout(recipe: Recipe) -> None:
    """Creates megatron-core's groups for the recipe's layout on the running process group, unless they are there from
    the run before: gloo never ends the threads of a group."""
    p = recipe.parallel
    wanted = (dist.group.WORLD, p.tensor, p.pipeline, p.virtual_pipeline, p.context)
    if parallel_state.model_parallel_is_initialized():
        if _laid_out == [wanted] and p.virtual_pipeline == 1:
            tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed, force_reset_rng=True)
            return
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline if p.virtual_pipeline > 1 else None,
        context_parallel_size=p.context,
    )
    _laid_out[:] = [wanted]
    tensor_parallel.model_parallel_cuda_manual_seed(recipe.seed, force_reset_rng=True)


def is_first() -> bool:
    return dist.get_rank() == 0


def layout_line(recipe: Recipe) -> str:
    p = recipe.parallel
    parts = [f"tensor {p.tensor}{' (sequence)' if p.sequence else ''}", f"pipeline {p.pipeline}"]
    if p.virtual_pipeline > 1:
        parts[-1] += f" ({p.virtual_pipeline} turns)"
    if p.context > 1:
        parts.append(f"context {p.context}")
    parts.append(f"data {parallel_state.get_data_parallel_world_size()}")
    notes = ["distributed optimizer"] * p.distributed_optimizer
    return ", ".join([" x ".join(parts), *notes])


def speed(recipe: Recipe) -> Speed:
    """See choose_speed; after `layout`."""
    return choose_speed(recipe, parallel_state.get_data_parallel_world_size(with_context_parallel=True))
