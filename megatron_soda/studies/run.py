"""`soda isoflop run` and `soda ablate run`: starts workers, shows how their runs are doing, and joins the results."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from rich.live import Live
from rich.table import Table

from ..config import Recipe
from ..console import console
from ..errors import SodaError
from ..isoflop.results import short
from ..log import log
from .base import Plan, Run
from .records import State, collect, state_of

_LOOK = 1.0  # seconds between looks at the runs
_LINES = 8  # of the terminal, for all but the runs


def run_study(plan: Plan, overrides: list[str], jobs: int, only_collect: bool = False) -> int:
    """Trains what is not done yet, `jobs` runs at a time. Returns 130 if it was interrupted, else 0.

    Raises SodaError that names the runs that failed, after all others are done.
    """
    recipes = [plan.recipe_of(run) for run in plan.runs]
    collect(plan, recipes)
    states = [state_of(plan, run, recipe) for run, recipe in zip(plan.runs, recipes, strict=True)]
    left = sum(state.kind != "done" for state in states)
    status = 0
    if left and not only_collect:
        status = _supervise(plan, recipes, overrides, min(jobs, left))
    found = collect(plan, recipes)
    states = [state_of(plan, run, recipe) for run, recipe in zip(plan.runs, recipes, strict=True)]
    log.info(f"{len(found)} of {len(plan.runs)} runs are done; results: {plan.study.folder}/results.jsonl and .csv")
    failed = [(run, state) for run, state in zip(plan.runs, states, strict=True) if state.kind == "failed"]
    if failed:
        lines = [f"run {run.id} failed: {state.told}" for run, state in failed]
        raise SodaError("\n".join([*lines, "The same command tries them again."]))
    elsewhere = sum(state.kind == "running" for state in states)
    if elsewhere:
        log.info(f"{elsewhere} are being trained by other processes.")
    return status


def _supervise(plan: Plan, recipes: list[Recipe], overrides: list[str], jobs: int) -> int:
    """Shows the runs until all workers have ended. Returns 130 if it was interrupted, else 0; SodaError for a worker
    that died."""
    folder = Path(plan.study.folder) / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    logs = [folder / f"worker-{number}-{os.getpid()}.log" for number in range(jobs)]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
    command = [sys.executable, "-m", "megatron_soda.studies.worker", plan.study.source, *overrides]
    workers: list[subprocess.Popen] = []
    interrupted = False
    try:
        for path in logs:
            with path.open("w") as file:
                workers.append(subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment))
        done: dict[str, State] = {}  # needs no second look, which would cost a tenth of a core with many runs

        def look() -> list[State]:
            states = [done.get(run.id) or state_of(plan, run, of) for run, of in zip(plan.runs, recipes, strict=True)]
            done.update({run.id: state for run, state in zip(plan.runs, states, strict=True) if state.kind == "done"})
            return states

        with _display(plan) as show:
            while any(worker.poll() is None for worker in workers):
                show(look())
                time.sleep(_LOOK)
            show(look())
    except KeyboardInterrupt:
        interrupted = True
        log.info("stopping: the workers save their runs")
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in workers:
            worker.wait()
    for worker, path in zip(workers, logs, strict=True):
        if worker.returncode not in (0, 2, 130) and not interrupted:
            tail = path.read_text(errors="replace").strip().splitlines()[-1:]
            told = f"was killed by signal {-worker.returncode}" if worker.returncode < 0 else f"ended ({''.join(tail)})"
            raise SodaError(f"a worker {told}; see {path}. The same command resumes.")
    return 130 if interrupted or any(worker.returncode == 130 for worker in workers) else 0


@contextlib.contextmanager
def _display(plan: Plan) -> Iterator:
    """On a terminal a live table; elsewhere a line whenever a run starts or ends."""
    if console.is_terminal:
        with Live(console=console, refresh_per_second=2) as live:
            yield lambda states: live.update(_table(plan, states))
        return
    before: dict[str, str] = {}

    def show(states: list[State]) -> None:
        done = sum(state.kind == "done" for state in states)
        for run, state in zip(plan.runs, states, strict=True):
            if before.get(run.id, "waiting") != state.kind and (before or state.kind == "running"):
                log.info(f"{run.id}: {_told(run, state)}  ({done} of {len(states)} done)")
            before[run.id] = state.kind

    yield show


def _table(plan: Plan, states: list[State]) -> Table:
    """The runs that are not waiting; if there are too many for the terminal, the last ones."""
    done = sum(run.cost for run, state in zip(plan.runs, states, strict=True) if state.kind == "done")
    share = done / sum(run.cost for run in plan.runs)
    finished = sum(state.kind == "done" for state in states)
    table = Table(title=f"{plan.study.name}: {finished} of {len(states)} runs, {share:.0%} of the FLOPs", box=None)
    for name in ("run", "parameters", "tokens", "steps", "loss", "seconds", ""):
        table.add_column(name, justify="left" if name in ("run", "") else "right")
    active = [(run, state) for run, state in zip(plan.runs, states, strict=True) if state.kind != "waiting"]
    order = {"done": 0, "stopped": 1, "failed": 2, "running": 3}
    active.sort(key=lambda one: order[one[1].kind])
    for run, state in active[-max(1, console.height - _LINES) :]:
        result = state.result or {}
        loss, seconds = result.get("loss"), result.get("wall_seconds")
        table.add_row(
            run.id,
            short(run.params_total),
            short(run.tokens),
            f"{state.step}/{run.steps}",
            "" if loss is None else f"{loss:.4f}",
            "" if seconds is None else f"{seconds:.0f}",
            f"{state.kind} {state.told}",
        )
    return table


def _told(run: Run, state: State) -> str:
    if state.result:
        return f"done: loss {state.result['loss']:.4f}, {state.result['wall_seconds'] or 0:.0f} s"
    if state.kind == "running":
        return (
            f"{short(run.params_total)} parameters, {short(run.tokens)} tokens, {run.steps} steps {state.told}".strip()
        )
    return f"{state.kind} {state.told}".strip()
