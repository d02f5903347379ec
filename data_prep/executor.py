"""Runs the jobs of a stage in processes on this machine or on a Ray cluster.

A job is a frozen dataclass, the argument of the stage's function, which writes its own files and returns statistics
about them. Both are pickled on the way to a worker and back. What a job writes must not depend on which worker runs it,
in what order, or whether it ran before.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from megatron_soda.errors import SodaError

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 4  # jobs in flight per worker: a list of millions must not be copied to the workers

device = "cpu"  # for this worker process


def run_jobs(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    *,
    workers: int = 0,
    executor: str = "local",
    gpu: bool = False,
) -> Iterator[Result]:
    """Yields the results of the jobs as they finish. `workers`: number of processes; 0: one per core, or one per GPU if
    `gpu`. Raises what a job raises, and SodaError if a worker dies.
    """
    if executor == "ray":
        yield from _on_ray(function, jobs, workers, gpu)
        return
    gpus = _gpus() if gpu else 0
    workers = min(workers or gpus or len(os.sched_getaffinity(0)), len(jobs))
    if workers <= 1:
        if gpus:
            _set_device("cuda:0")
        for job in jobs:
            yield function(job)
        return
    yield from _in_processes(function, jobs, workers, gpus)


def _in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, gpus: int) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    numbers = context.Queue()  # starts multiprocessing's tracker, which by itself only ignores SIGINT and SIGTERM
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    for number in range(workers):
        numbers.put(number)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(numbers, gpus))
    waiting = iter(jobs)
    running: set[Future[Result]] = set()
    try:
        for job in islice(waiting, AHEAD * workers):
            running.add(pool.submit(function, job))
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(function, job) for job in islice(waiting, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise SodaError(
            "a worker process died (out of memory?). Finished work is kept: run the same command again, "
            "with a lower prepare.workers if it happens twice."
        ) from None
    finally:
        if running:  # it ends early: unfinished jobs are not waited for, and are redone next time
            for worker in multiprocessing.active_children():
                worker.kill()
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(numbers: Any, gpus: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they reach the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    if gpus:
        _set_device(f"cuda:{numbers.get() % gpus}")


def _end_with(parent: int) -> None:
    """A worker must not keep writing after its parent was killed: the next run may be using the same files."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _set_device(name: str) -> None:
    global device
    device = name


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _on_ray(function: Callable[[Job], Result], jobs: Sequence[Job], workers: int, gpu: bool) -> Iterator[Result]:
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SodaError("prepare.executor=ray: Ray is not installed. pip install 'megatron-soda[ray]'") from None
    if not jobs:
        return
    if not ray.is_initialized():  # RAY_ADDRESS names a cluster; without it Ray starts on this machine only
        here = {} if os.environ.get("RAY_ADDRESS") else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
        ray.init(log_to_driver=False, **here)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def task(row: dict[str, bytes]) -> dict[str, bytes]:
        import torch

        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        if gpu:
            _set_device("cuda:0")  # Ray hides the others from a task
        try:
            return {"result": pickle.dumps(function(pickle.loads(row["job"])))}
        except SodaError as error:  # Ray would wrap it in an exception of its own
            return {"result": pickle.dumps(_Failed(str(error)))}

    rows = ray.data.from_items([{"job": pickle.dumps(job)} for job in jobs], override_num_blocks=len(jobs))
    done = rows.map(task, num_cpus=1, num_gpus=1 if gpu else 0, concurrency=workers or None)
    for row in done.iter_rows():
        result = pickle.loads(row["result"])
        if isinstance(result, _Failed):
            raise SodaError(result.why)
        yield result


@dataclass(frozen=True)
class _Failed:
    why: str
