"""When a rank is gone, ends the job within a minute and names it, instead of after gloo's half hour.

A thread on every rank keeps writing to the rendezvous store that the rank is alive and where its main thread is. Rank 0
watches all the others, and they watch rank 0. There are two ways to be gone:

- No sign of life for `SILENCE` seconds (a stopped process, a dead host, a cut cable): the job ends.
- Signs of life, but no main thread has moved for `SILENCE` seconds (an unresponsive disk): a warning says where every
rank is, and after ten times as long the job ends.

A rank that is starting, validating or saving may take `PATIENCE`. Clocks of different hosts are never compared.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]

from ..errors import say, tell_torchrun
from ..log import log

SILENCE = float(os.environ.get("SODA_WATCH_SECONDS", "60"))
PATIENCE = 10 * SILENCE
_SLOW = ("starting", "validate", "save", "ending")
_COLLECTIVES = ("torch/distributed/", "megatron/core/")  # a main thread in one of these is waiting for others


class Place:
    """Where the main thread of this process is."""

    def __init__(self) -> None:
        self.step = 0  # the last thing this process did
        self.part, self.moved, self.longest = "starting", time.monotonic(), 0.0

    def move(self, part: str) -> None:
        now = time.monotonic()
        if not self.slow:
            self.longest = max(self.longest, now - self.moved)
        self.part, self.moved = part, now

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        outer = self.part
        self.move(part)
        try:
            yield
        finally:
            self.move(outer)

    @property
    def slow(self) -> bool:
        return self.step == 0 or self.part in _SLOW

    @property
    def patience(self) -> float:
        """Seconds that this part of the work may take, at least ten times the slowest part of a step so far."""
        return PATIENCE if self.slow else max(SILENCE, 10 * self.longest)


place = Place()  # one rank per process


class Watch:
    """A rank's watching thread, which ends the process if necessary. `store` is used for nothing else, because waiting
    blocks it."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.store, self.rank, self.world = PrefixStore("watch", store), rank, world
        self.host, self.main = socket.gethostname(), threading.main_thread().ident
        self.beats, self.warned = 0, -1.0
        self.ticked = self.awake = time.monotonic()  # the last tick, and the first one after a pause of the process
        self.reports: dict[int, dict[str, Any]] = {}  # the latest report of each watched rank
        self.heard: dict[int, float] = {}  # when it arrived, on our clock
        self.over = threading.Event()
        self.threads = [threading.Thread(target=run, daemon=True, name="watch") for run in (self._run, self._guard)]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """The work is done: nobody should wait for this rank any more."""
        self.over.set()
        self.threads[0].join(SILENCE)

    def _run(self) -> None:
        while not self.over.wait(SILENCE / 12):
            try:
                self.tick(time.monotonic())
            except RuntimeError:  # the store is gone, and all information with it
                return
        with contextlib.suppress(RuntimeError):
            self._publish(time.monotonic(), done=True)

    def _guard(self) -> None:
        """A store that does not answer blocks the other thread. The store is on node 0, so node 0 is gone. Training
        continues without the store (perhaps only torchrun was suspended) as long as the main thread makes progress."""
        last = awake = time.monotonic()
        while not self.over.wait(SILENCE / 12):
            now = time.monotonic()
            awake = now if now - last > SILENCE / 3 else awake
            last = now
            waited, still = now - max(self.ticked, awake), now - max(place.moved, awake)
            if waited > SILENCE and still > place.patience:
                text = (
                    f"node 0 ({os.environ.get('MASTER_ADDR', 'unknown')}) has not answered for {waited:.0f} s, and "
                    f"nothing is progressing here: it was suspended, or cannot be reached.{self._here()}"
                )
                self._end({"rank": self.rank, "host": self.host, "message": text})

    def tick(self, now: float) -> None:
        """Gives a sign of life and checks those of others."""
        if now - self.ticked > SILENCE / 3:  # this process itself was suspended, or the store was
            self.heard.clear()
            self.awake = now
        self.ticked = now
        self._publish(now)
        still = now - max(place.moved, self.awake)
        cause = self.cause()
        if cause:
            if still > SILENCE / 6:  # otherwise the main thread has noticed, and ends by itself
                self._end(cause)
            return
        self._listen(now)
        silent = [report for rank, report in self.reports.items() if self._is_silent(report, now - self.heard[rank])]
        if silent:
            self._end(self.fail(" ".join(self._about_silent(report, now) for report in silent) + self._here()))
        elif self.rank == 0 and still > place.patience:
            self._about_stuck(still)

    def _report(self) -> dict[str, Any]:
        here = {"rank": self.rank, "host": self.host, "pid": os.getpid()}
        return {**here, "step": place.step, "part": place.part, "at": _where(self.main)}

    def _publish(self, now: float, done: bool = False) -> None:
        self.beats += 1
        silence = PATIENCE if place.slow else SILENCE
        self.store.set(
            str(self.rank), json.dumps({**self._report(), "beat": self.beats, "silence": silence, "done": done})
        )

    def _listen(self, now: float) -> None:
        ranks = [r for r in (range(self.world) if self.rank == 0 else (0,)) if r != self.rank]
        known = [str(r) for r in ranks if r in self.reports or self.store.check([str(r)])]
        for text in self.store.multi_get(known) if known else []:
            report = json.loads(text)
            rank = report["rank"]
            if rank not in self.heard or report["beat"] != self.reports[rank]["beat"]:
                self.heard[rank] = now
            self.reports[rank] = report

    @staticmethod
    def _is_silent(report: dict[str, Any], seconds: float) -> bool:
        return not report["done"] and seconds > report["silence"]

    def _about_silent(self, report: dict[str, Any], now: float) -> str:
        return (
            f"rank {report['rank']} ({report['host']}, process {report['pid']}) has given no sign of life for "
            f"{now - self.heard[report['rank']]:.0f} s: it was suspended or killed, or its host cannot be reached. It "
            f"was last seen at {_describe(report)}."
        )

    def _here(self) -> str:
        return (
            f" Rank {self.rank} ({self.host}) is at {_describe(self._report())}. The same command resumes from the "
            "last checkpoint."
        )

    def _about_stuck(self, seconds: float) -> None:
        """The odd ones out come first: ranks in no collective, then the smallest groups."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for report in [self._report(), *self.reports.values()]:
            groups.setdefault(_describe(report), []).append(report)
        texts = []
        for text, reports in sorted(groups.items(), key=lambda group: ("waiting" in group[0], len(group[1]))):
            names = [f"{report['rank']} ({report['host']})" for report in sorted(reports, key=lambda r: r["rank"])]
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            texts.append(f"Rank{'s' if len(names) > 1 else ''} {', '.join(names[:4])}{more}: {text}.")
        message = f"nothing has progressed for {seconds:.0f} s. {' '.join(texts)}"
        if seconds > 10 * place.patience:
            self._end(self.fail(message))
        elif self.warned != place.moved:
            self.warned = place.moved
            log.warning(message)

    def fail(self, message: str) -> dict[str, Any]:
        """Tells all ranks why this one is ending. Returns the job's first failure, which may be another rank's."""
        mine = {"rank": self.rank, "host": self.host, "message": message}
        return json.loads(self.store.compare_set("end", "", json.dumps(mine)))

    def cause(self, seconds: float = 0) -> dict[str, Any] | None:
        """The job's first failure, if one is reported within the given seconds."""
        until = time.monotonic() + seconds
        while not self.store.check(["end"]):
            if time.monotonic() >= until:
                return None
            time.sleep(0.1)
        return json.loads(self.store.get("end"))

    def speaks(self, cause: dict[str, Any]) -> bool:
        """Whether this rank should print it. Once per host is enough."""
        return cause["rank"] == self.rank or (cause["host"] != self.host and os.environ.get("LOCAL_RANK", "0") == "0")

    def _end(self, cause: dict[str, Any]) -> None:
        """Ends this process from outside its hanging main thread."""
        text = f"error on rank {cause['rank']} ({cause['host']}): {cause['message']}"
        if self.speaks(cause):
            say(text)
        tell_torchrun(text)
        if cause["rank"] == self.rank:
            time.sleep(SILENCE / 6)  # the others also check the store
        os._exit(2)


current: Watch | None = None


def start(store: Any, rank: int, world: int) -> None:
    """Watches this job from now on, until `stop`."""
    global current
    current = Watch(store, rank, world)
    current.start()


def stop() -> None:
    global current
    if current is not None:
        current.stop()
        current = None


def _describe(report: dict[str, Any]) -> str:
    step = "" if report["part"] == "starting" else f"step {report['step'] + 1}, "
    return f"{step}{report['part']}, {report['at']}"


def _where(thread: int | None) -> str:
    """`waiting in all_reduce (trainer.py:190, any_rank)`: what this thread is doing, and the line of ours that led
    there."""
    frame = sys._current_frames().get(thread or 0)
    if frame is None:
        return "at its end"
    waiting = any(part in frame.f_code.co_filename for part in _COLLECTIVES)
    doing, ours = frame.f_code.co_name, ""
    named = not waiting
    while frame is not None and not ours:
        file, name = frame.f_code.co_filename, frame.f_code.co_name
        if not named and name != "wrapper" and name[0] != "_" and any(part in file for part in _COLLECTIVES):
            doing, named = name, True  # not the helper inside it
        if "megatron_soda" in file:
            ours = f" ({os.path.basename(file)}:{frame.f_lineno}, {name})"
        frame = frame.f_back
    return f"{'waiting in' if waiting else 'in'} {doing}{ours}"
