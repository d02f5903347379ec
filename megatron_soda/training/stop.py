"""Requests to stop a training process: SIGTERM, SIGINT, SIGHUP, and the end of the torchrun that started it.

During startup there is nothing to save: the process says so and ends. Later, all ranks together act on the request at
the end of a step and save the run. A thread listens, because Python runs handlers in the main thread, which may be
stuck inside a collective or waiting for hosts that never come.

Does not import torch, because it starts before torch is loaded.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator

from ..errors import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK = 1.0  # seconds between checks of the parent
_PARENT_ENDED = 1  # prctl's PR_SET_PDEATHSIG


class Stop:
    """A request to stop, which may arrive at any time."""

    def __init__(self) -> None:
        self.request = threading.Event()
        # stepping: a request saves; over: it changes nothing; starting and measuring: it ends the process
        self.phase = "starting"
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun

    def listen(self, pipe: int) -> None:
        poll = select.poll()  # select() refuses descriptors from 1024 on, and with many ranks a process has more
        poll.register(pipe, select.POLLIN)
        while True:
            if poll.poll(_LOOK * 1000):
                numbers = os.read(pipe, 64)
                if 0 in numbers:
                    return
                self.ask(signal.Signals(numbers[0]).name)
            elif self.parent and os.getppid() != self.parent:
                self.parent = 0
                self.ask("torchrun is gone")

    def ask(self, why: str) -> None:
        _leave_closed_outputs()
        if self.phase == "starting":
            self._say(f"{why}: stopped before the first step; nothing was changed.")
            os._exit(130)
        if self.phase == "measuring":
            self._say(f"{why}: stopped while the model was measured; that goes on where it was.")
            os._exit(130)
        if self.phase == "stepping" and not self.request.is_set():
            self._say(f"{why}: stopping after this step. Wait for the checkpoint.")
        self.request.set()

    @property
    def asked(self) -> bool:
        return self.request.is_set()

    def wait(self, seconds: float) -> None:
        self.request.wait(seconds)

    def _say(self, text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once per host
            say(text)


_current: Stop | None = None


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Turns signals into requests to stop; inside another `listening`, they go to the outer one.

    A signal that the caller ignores (nohup) stays ignored, unless torchrun forwards it, because torchrun kills
    survivors.
    """
    global _current
    if _current is not None:
        yield _current
        return
    stop = Stop()
    pipe, end = os.pipe()
    os.set_blocking(end, False)
    kept = {
        number: signal.signal(number, lambda *_: None)
        for number in SIGNALS
        if number != signal.SIGHUP or stop.parent or signal.getsignal(number) != signal.SIG_IGN
    }
    outer = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    thread = threading.Thread(target=stop.listen, args=(pipe,), daemon=True, name="stop")
    thread.start()
    _current = stop
    try:
        yield stop
    finally:
        _current = None
        signal.set_wakeup_fd(outer)
        for number, handler in kept.items():
            signal.signal(number, handler)
        os.write(end, b"\0")
        thread.join()
        os.close(end)
        os.close(pipe)


def end_with(parent: int) -> None:
    """Ends this process with the one that started it, or at once if that one is gone already."""
    ctypes.CDLL(None).prctl(_PARENT_ENDED, signal.SIGTERM)
    if os.getppid() != parent:
        sys.exit(1)


def _leave_closed_outputs() -> None:
    """Writing to a closed terminal or pipe would be an error before the checkpoint is saved."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
