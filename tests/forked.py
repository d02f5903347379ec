"""Functions in processes of their own, forked from a server that has imported the engine. A new Python would need eight
seconds for that."""

import multiprocessing as mp
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

ENGINE = "megatron_soda.training.trainer"


def context() -> Any:
    import torch

    if torch.cuda.is_available():  # a fork of a process that has looked for CUDA cannot use it
        return mp.get_context("spawn")
    made = mp.get_context("forkserver")
    made.set_forkserver_preload([ENGINE])
    return made


def _run(connection: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    try:
        connection.send((True, function(*arguments)))
    except BaseException:
        connection.send((False, traceback.format_exc()))


def forked(function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> Any:
    """function(*arguments), called in such a process; RuntimeError with the trace of what it raised."""
    processes = context()
    ours, theirs = processes.Pipe()
    process = processes.Process(target=_run, args=(theirs, function, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(timeout):
            raise RuntimeError(f"{function.__name__} took more than {timeout} s")
        good, value = ours.recv()
    finally:
        process.kill()
        process.join()
    if not good:
        raise RuntimeError(value)
    return value
