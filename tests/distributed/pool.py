"""Warm pools of gloo ranks: the engine is imported once, and every layout is a task of theirs.

pool.run(2, function, arg)  ->  [function(arg) on rank 0, function(arg) on rank 1]

There is a pool for each number of ranks, started when it is first needed. Its ranks are forked from a server that has
imported the engine, which takes eight seconds. They keep their process groups: gloo leaves two threads behind for every
group that was, and hundreds of layouts would leave thousands.
"""

import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_soda.parallel.one_node import stay_on_loopback
from tests.forked import context


def _serve(rank: int, world: int, connection: Connection) -> None:
    import os
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    stay_on_loopback()
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from megatron_soda.parallel import ranks

    initialise = ranks.init

    def init_one_thread(recipe: Any) -> torch.device:
        device = initialise(recipe)
        torch.set_num_threads(1)
        return device

    ranks.init = init_one_thread
    groups: dict[tuple, Any] = {}
    new_group = dist.new_group

    def same_group(of_ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        key = (tuple(of_ranks) if of_ranks is not None else None, kwargs.get("backend"))
        if key not in groups:
            groups[key] = new_group(of_ranks, *args, **kwargs)
        return groups[key]

    dist.new_group = lambda ranks=None, *args, **kwargs: same_group(ranks, *args, **kwargs)
    while True:
        function, arguments, store = connection.recv()
        try:
            if store:  # at the start, and after a failure, which may have left ranks waiting at different places
                if dist.is_initialized():
                    dist.destroy_process_group()
                groups.clear()
                dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
            result = function(*arguments)
            dist.barrier()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            parallel_state.destroy_model_parallel()


class _Ranks:
    """The ranks of one world size."""

    def __init__(self, world: int, folder: Path) -> None:
        processes = context()
        self.folder, self.stores, self.in_step, self.lost = folder, 0, False, False
        self.connections, self.processes = [], []
        for rank in range(world):
            ours, theirs = processes.Pipe()
            process = processes.Process(target=_serve, args=(rank, world, theirs))
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], arguments: tuple, timeout: float) -> list[Any]:
        store = ""
        if not self.in_step:
            self.stores += 1
            store = str(self.folder / f"{len(self.processes)}_{self.stores}")
        self.in_step = False
        for connection in self.connections:
            connection.send((function, arguments, store))
        results, errors = [], []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(5 if errors else timeout):
                errors.append(f"rank {rank} did not answer")
                continue
            good, value = connection.recv()
            (results if good else errors).append(value if good else f"rank {rank}:\n{value}")
        if errors:
            self.lost = any(error.endswith("did not answer") for error in errors)  # its answer would come to the next
            raise RuntimeError("\n".join(errors))
        self.in_step = True
        return results

    def close(self) -> None:
        for process in self.processes:  # to end by themselves takes them seconds: each takes down all its groups
            process.kill()
            process.join()


class Pool:
    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.ranks: dict[int, _Ranks] = {}

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """Results by rank. Raises with the trace of the first rank that failed or did not answer."""
        if world in self.ranks and self.ranks[world].lost:
            self.ranks.pop(world).close()
        if world not in self.ranks:
            self.ranks[world] = _Ranks(world, Path(tempfile.mkdtemp(dir=self.folder.name)))
        return self.ranks[world].run(function, arguments, timeout)

    def close(self) -> None:
        for ranks in self.ranks.values():
            ranks.close()
        self.folder.cleanup()
