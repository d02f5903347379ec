"""One thread with the model, and requests that wait for it in order."""

import asyncio
import threading
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from ..errors import SodaError
from ..log import log

WAITING = 64  # requests, with the one that is being answered
LOOK_EVERY = 0.25  # seconds, for a client that has hung up


class Busy(Exception):  # noqa: N818
    """Too many requests wait already."""


class Gone(Exception):  # noqa: N818  (no failure)
    """Nobody waits for the answer any more."""


class Job:
    """A request's work in the thread. What it emits is read in the event loop, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()  # (whether it is the last, what)
        self._gone = threading.Event()
        self.future: Future[None] | None = None

    # in the thread

    def emit(self, event: Any) -> None:
        self._put(False, event)

    def check(self) -> None:
        """Raises Gone if the client has hung up."""
        if self._gone.is_set():
            raise Gone

    def run(self, work: Callable[["Job"], None]) -> None:
        try:
            self.check()
            work(self)
            self._put(True, None)
        except Gone:
            self._put(True, None)
        except SodaError as error:
            self._put(True, error)
        except Exception as error:
            log.error("".join(traceback.format_exception(error)).rstrip())
            self._put(True, error)

    def _put(self, last: bool, event: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, (last, event))

    # in the event loop

    def leave(self) -> None:
        """Nobody waits for it any more."""
        self._gone.set()
        if self.future:
            self.future.cancel()

    async def events(self, hung_up: Callable[[], Awaitable[bool]]) -> AsyncIterator[Any]:
        """What the work emits. Raises what it raises, and Gone once the client has hung up."""
        try:
            while True:
                try:
                    last, event = await asyncio.wait_for(self._events.get(), LOOK_EVERY)
                except TimeoutError:
                    if await hung_up():
                        raise Gone from None
                    continue
                if last:
                    if event is not None:
                        raise event
                    return
                yield event
        finally:
            self.leave()


class Worker:
    """Runs jobs one at a time."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "soda")
        self._jobs: set[Job] = set()

    def start(self, work: Callable[[Job], None]) -> Job:
        """Raises Busy if WAITING jobs are not done."""
        if len(self._jobs) >= WAITING:
            raise Busy
        job = Job()
        self._jobs.add(job)
        job.future = self._pool.submit(job.run, work)
        job.future.add_done_callback(lambda future: self._done(job, future))
        return job

    def _done(self, job: Job, future: Future[None]) -> None:
        self._jobs.discard(job)
        with suppress(CancelledError):  # never started
            future.result()

    def close(self) -> None:
        for job in list(self._jobs):
            job.leave()
        self._pool.shutdown()
