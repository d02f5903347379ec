"""Evaluation while training: starts the process that measures a checkpoint (evaluation/during.py), and ends it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO

import torch

from ..config import Recipe, save_recipe
from ..errors import SodaError, user_message
from ..evaluation.during import EXPORT, recipe_in
from ..evaluation.suite import figures_of
from ..files import read_json
from ..log import log
from ..parallel import preflight, ranks
from ..registry import SUITES
from ..run_folder import metrics_of
from . import checkpoint
from .stop import SIGNALS

FOLDER, LOG, CHECK_LOG = "evaluations", "log.txt", "check.txt"
_LOOK = 1.0  # seconds between looks at the other ranks
_OF_THE_JOB = {  # torchrun's variables; it has more that begin with TORCHELASTIC_
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_WORLD_SIZE", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
}
# Finds the package where this process found it, and not in a folder of that name in the working directory.
_MAIN = """
import sys
sys.path[:] = {path!r}
from megatron_soda.training.stop import end_with
end_with({parent})
from megatron_soda.evaluation.during import main
sys.exit(main())
"""


def check_suites(recipe: Recipe, device: torch.device) -> None:
    """Raises SodaError if a suite of evaluate.during_training lacks what it needs, before the first step. All ranks
    call this."""
    if not recipe.evaluate.every:
        return
    log_file = Path(recipe.run) / FOLDER / CHECK_LOG
    with preflight.together(device), ExitStack() as stack:
        process = None
        try:
            if ranks.is_first():
                process = _start_check(recipe, log_file, stack)
        finally:  # others wait in short collectives: one as long as a check could time out
            while not preflight.any_rank(ranks.is_first() and (process is None or _ended(process)), device):
                pass
        if process is not None and process.returncode:
            raise SodaError(_why(log_file, process.returncode))


def _start_check(recipe: Recipe, log_file: Path, stack: ExitStack) -> subprocess.Popen:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    save_recipe(recipe, Path(folder) / "recipe.yaml")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    return _start([folder], stack.enter_context(log_file.open("w")))


def _ended(process: subprocess.Popen) -> bool:
    """Waits up to a second."""
    try:
        process.wait(_LOOK)
    except subprocess.TimeoutExpired:
        return False
    return True


def owed(recipe: Recipe, step: int, device: torch.device) -> bool:
    """Whether the checkpoint of a step is to be evaluated and has not been. All ranks call this."""
    every = recipe.evaluate.every
    if not every or not (step % every == 0 or step == recipe.training.steps):
        return False
    lines = metrics_of(Path(recipe.run)) if ranks.is_first() else []
    done = any("evaluation" in line for line in lines if line["step"] == step)
    return not json.loads(preflight.gather(json.dumps(done), device)[0])


class Evaluation:
    """Measures the checkpoint of a step in a process of its own, into RUN/evaluations/step_…, until it is `done` or the
    `with` ends. Without `starts` (on all ranks but the first), there is no process, and it is never done."""

    def __init__(self, recipe: Recipe, step: int, starts: bool) -> None:
        self.recipe, self.step, self.starts = recipe, step, starts
        self.folder = Path(recipe.run) / FOLDER / f"step_{step:08d}"
        self._process: subprocess.Popen | None = None
        self._problem = ""

    def __enter__(self) -> "Evaluation":
        if self.starts:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # of this process: memory that it does not need while it waits
            try:
                self._begin()
            except (SodaError, OSError) as error:  # a run goes on without it
                self._problem = str(error)
        return self

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "eval.json").unlink(missing_ok=True)
        self._remove_exports()
        save_recipe(recipe_in(self.folder, self.recipe), self.folder / "recipe.yaml")
        weights = checkpoint.folder_of(Path(self.recipe.run), self.step)
        with (self.folder / LOG).open("w") as output:
            self._process = _start([str(self.folder), str(weights)], output)

    def done(self) -> bool:
        """Waits up to a second."""
        if not self.starts or self._process is None:
            return self.starts
        return _ended(self._process)

    def was_signalled(self) -> bool:
        """Whether a signal to stop ended it."""
        return self._process is not None and -(self._process.returncode or 0) in SIGNALS

    def _remove_exports(self) -> None:
        for left in self.folder.glob(f"{EXPORT}*"):
            shutil.rmtree(left, ignore_errors=True)

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self.starts:
            self._remove_exports()

    def figures(self) -> dict[str, float]:
        """By row of the suites (suite.figures_of). If it failed, warns and returns none: training goes on."""
        status = self._process.returncode if self._process is not None else 1
        if status or self._problem:
            why = self._problem or _why(self.folder / LOG, status)
            log.warning(f"step {self.step} could not be evaluated, training goes on: {why}")
            return {}
        try:
            result = read_json(self.folder / "eval.json", dict)
            names = dict.fromkeys(self.recipe.evaluate.during_training)
            return {key: value for name in names for key, value in figures_of(SUITES[name], result[name]).items()}
        except (SodaError, OSError) as error:
            log.warning(f"step {self.step}: {user_message(error)}")
            return {}


def _start(arguments: list[str], output: IO[str]) -> subprocess.Popen:
    """A process of one rank, on the first device of this host."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_THE_JOB}
    environment = {name: value for name, value in environment.items() if not name.startswith("TORCHELASTIC_")}
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN.format(path=sys.path, parent=os.getpid()), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # a signal to all processes of a terminal or a job is for the trainer to act on
    )


def _why(path: Path, status: int) -> str:
    """What the process said last."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    begin = max((i for i, line in enumerate(lines) if line.startswith("error: ")), default=None)
    if begin is not None:
        return " ".join(lines[begin:]).removeprefix("error: ")
    ended = f"a signal ({-status})" if status < 0 else f"status {status}"
    return f"the process ended with {ended}: {lines[-1] if lines else 'it said nothing'} (see {path})"
