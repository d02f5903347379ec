"""Training progress: a bar on a terminal, lines in a file."""

import sys
import time
from datetime import timedelta

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..log import log

_SECONDS_BETWEEN_LINES = 10.0


class TrainingProgress:
    """Use it as a context manager. Without `shown` (on all ranks but the first) it prints nothing."""

    def __init__(self, step: int, steps: int, shown: bool) -> None:
        self.steps, self.shown, self.terminal = steps, shown, sys.stdout.isatty()
        columns = TextColumn("train"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}")
        self.bar = Progress(*columns, TimeRemainingColumn(), disable=not (shown and self.terminal))
        self.task = self.bar.add_task("train", total=steps, completed=step, note="")
        self.began, self.first, self.said = time.monotonic(), step, 0.0

    def __enter__(self) -> "TrainingProgress":
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def advance(self, step: int) -> None:
        self.bar.update(self.task, completed=step)

    def log(self, step: int, loss: float | None, tokens_per_second: float) -> None:
        """The numbers of a logged step. In a file, each gets a line, but at most one every ten seconds; the last step
        always gets one."""
        note = f"loss {'none' if loss is None else f'{loss:.3f}'}  {tokens_per_second:,.0f} tokens/s"
        self.bar.update(self.task, note=note)
        now = time.monotonic()
        due = not self.said or now - self.said >= _SECONDS_BETWEEN_LINES or step == self.steps
        if self.shown and not self.terminal and due:
            left = timedelta(seconds=round((now - self.began) / max(1, step - self.first) * (self.steps - step)))
            log.info(f"step {step}/{self.steps}  {note}  {left} left")
            self.said = now
