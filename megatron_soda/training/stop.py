"""What asks a training process to stop: SIGTERM, SIGINT, SIGHUP, and the end of the torchrun that started it.

While a process starts there is nothing to save: it says so and ends. Once it takes steps the request is heard at the
end of a step, by all ranks together, and the run is saved. A thread listens, since Python runs handlers in the main
thread, and that may wait deep inside a collective, or for hosts that never come.

Imports no torch: it begins before that is loaded.
"""

import contextlib
import os
import select
import signal
import threading
from collections.abc import Iterator

from ..errors import say

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOK = 1.0  # seconds between two looks at the parent


class Stop:
    """A request to stop, which this process may get at any time."""

    def __init__(self) -> None:
        self.request = threading.Event()
        self.phase = "starting"  # "stepping": a request saves; "over": it changes nothing
        self.parent = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else 0  # torchrun

    def listen(self, pipe: int) -> None:
        poll = select.poll()  # select() refuses descriptors from 1024 on, and a process of many ranks has more
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
        if self.phase == "stepping" and not self.request.is_set():
            self._say(f"{why}: stopping after this step. Wait for the checkpoint.")
        self.request.set()

    @property
    def asked(self) -> bool:
        return self.request.is_set()

    def wait(self, seconds: float) -> None:
        self.request.wait(seconds)

    def _say(self, text: str) -> None:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once on each host
            say(text)


_current: Stop | None = None


@contextlib.contextmanager
def listening() -> Iterator[Stop]:
    """Signals are requests to stop while this is open; inside another `listening`, the requests are that one's.

    A signal that the caller had ignored (nohup) stays ignored, unless torchrun passes it on: it kills what lives on.
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


def _leave_closed_outputs() -> None:
    """To write to a terminal that was closed, or to a pipe that nobody reads, would be an error before the checkpoint
    is saved."""
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, descriptor)
            os.close(nowhere)
