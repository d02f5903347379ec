"""A warm pool of four gloo ranks: the engine is imported once, and every layout is a task of it.

pool.run(2, function, arg)  ->  [function(arg) on rank 0, function(arg) on rank 1]
"""

import multiprocessing as mp
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

RANKS = 4


def _serve(rank: int, connection: Connection) -> None:
    import os
    import warnings

    warnings.filterwarnings("ignore")
    import torch
    import torch.distributed as dist

    import megatron_soda.training.loop  # noqa: F401  the slow import, once
    from megatron_soda.parallel import ranks

    initialise = ranks.init

    def init_one_thread(recipe: Any) -> torch.device:
        device = initialise(recipe)
        torch.set_num_threads(1)
        return device

    ranks.init = init_one_thread
    while True:
        message = connection.recv()
        if message is None:
            return
        function, arguments, world, store = message
        try:
            os.environ.update(WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
            dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
            result = function(*arguments)
            dist.barrier()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        finally:
            if dist.is_initialized():
                from megatron.core import parallel_state

                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()


class Pool:
    def __init__(self) -> None:
        context = mp.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs))  # not daemons: saving starts processes
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        self.tasks = 0

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 240) -> list[Any]:
        """Results by rank. Raises with the trace of the first rank that failed or did not answer."""
        self.tasks += 1
        store = str(Path(self.folder.name) / f"store_{self.tasks}")
        for connection in self.connections[:world]:
            connection.send((function, arguments, world, store))
        results, errors = [], []
        for rank, connection in enumerate(self.connections[:world]):
            if not connection.poll(5 if errors else timeout):
                errors.append(f"rank {rank} did not answer")
                continue
            good, value = connection.recv()
            (results if good else errors).append(value if good else f"rank {rank}:\n{value}")
        if errors:
            raise RuntimeError("\n".join(errors))
        return results

    def close(self) -> None:
        for connection, process in zip(self.connections, self.processes, strict=True):
            if process.is_alive():
                connection.send(None)
            process.join(5)
            if process.is_alive():
                process.kill()
        self.folder.cleanup()
