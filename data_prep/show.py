"""What the user sees while data are prepared: progress and rejects."""

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from megatron_soda.console import console

from .utterance import Reject


@dataclass
class Rejects:
    """Rejected inputs, listed in a file and counted. The file is `path` during the work and `kept` afterwards, even
    after an error; without `kept` (a dry run) it is not kept."""

    path: Path
    kept: Path | None = None
    count: int = 0
    reasons: Counter = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.path, "w", encoding="utf-8")  # noqa: SIM115  closed by close

    def add(self, reject: Reject) -> None:
        reject = Reject(*(part.encode("utf-8", "backslashreplace").decode() for part in (reject.where, reject.reason)))
        self.count += 1
        self.reasons[reject.reason.split(":")[0][:80]] += 1
        self._file.write(json.dumps(asdict(reject), ensure_ascii=False) + "\n")
        if self.count <= 5:
            console.note("rejected", f" {reject.where}: {reject.reason}")

    def close(self) -> None:
        self._file.close()

    def keep(self) -> str:
        """Closes the file and moves it to its final place. Returns a sentence about where that is, to end an error
        with."""
        self.close()
        if self.kept is None:
            return ""
        if self.path.is_file():
            os.replace(self.path, self.kept)
        return f" {self.kept} lists what could not be used, and why."

    def in_words(self) -> str:
        """The reasons with their counts, the most frequent first: "no transcript: 12, no file: 1"."""
        return ", ".join(f"{reason}: {count}" for reason, count in self.reasons.most_common(5))


@contextlib.contextmanager
def progress(name: str, total: int | None = None, done: int = 0) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=total == 0) as bar:
        task = bar.add_task(name, total=total, completed=done)
        yield lambda n: bar.advance(task, n)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:,.1f}/s")
