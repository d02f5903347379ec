"""One process that trains runs of a study, one after another, until none is left:

    python -m megatron_soda.studies.worker STUDY [key=value ...]

Several may work on a study at once, on any number of hosts that share its folder: each claims a run by a lock, which
the kernel releases however the process ends. Importing the engine takes seconds; later runs in the same process start
at once.
"""

import contextlib
import ctypes
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..config import Recipe
from ..errors import SodaError, user_message
from ..files import locked, read_json, write_json
from ..log import log
from ..training.stop import Stop, listening
from .base import Plan, Run
from .load import load_plan
from .records import CLAIMS, FAILED, RESULT, other_recipe, recipe_hash, result_of, state_of

_PARENT_ENDED = 1  # prctl's PR_SET_PDEATHSIG


def work(plan: Plan) -> int:
    """Exit status: 0 if nothing is left to do here, 130 if asked to stop, 2 if runs failed."""
    failed = 0
    with listening() as stop:
        for run in plan.runs:
            recipe = plan.recipe_of(run)
            with _claim(plan, run) as mine:
                if not mine or state_of(plan, run, recipe).kind == "done":
                    continue
                log.info(f"run {run.id}")
                done = _train(plan, run, recipe, stop)
            if done is None:
                failed += 1
            elif not done or stop.asked:
                return 130
    return 2 if failed else 0


@contextlib.contextmanager
def _claim(plan: Plan, run: Run) -> Iterator[bool]:
    """Yields False if another process has the run."""
    folder = Path(plan.study.folder) / CLAIMS / run.id
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(folder))
        except SodaError:
            yield False
            return
        yield True
        (folder / ".lock").write_text("")  # nobody is at it any more


def _train(plan: Plan, run: Run, recipe: Recipe, stop: Stop) -> bool | None:
    """Whether the run is done; None: it failed, and FAILED says why."""
    from ..training.trainer import train

    folder = Path(recipe.run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILED).unlink(missing_ok=True)
    try:
        if (folder / RESULT).is_file() and read_json(folder / RESULT, dict).get("recipe_hash") != recipe_hash(recipe):
            raise SodaError(other_recipe(folder))
        if not train(recipe):
            return False
        if plan.suites:
            if stop.asked:
                return False
            stop.phase = "measuring"
            _evaluate(plan, recipe)
        result = result_of(plan, run, recipe)
        if result is None:
            raise SodaError(f"{folder}: all steps are done, but metrics.jsonl has no validation of the last one")
        write_json(folder / RESULT, result)
    except Exception as error:
        message = user_message(error)  # raises what is no mistake of the user
        log.warning(f"run {run.id} failed: {message}")
        write_json(folder / FAILED, {"run": run.id, "error": message})
        return None
    return True


def _evaluate(plan: Plan, recipe: Recipe) -> None:
    from ..evaluation.run import evaluate
    from ..hf.export import export

    evaluate(replace(recipe, evaluate=replace(recipe.evaluate, suite=list(plan.suites))), export(recipe))


def main() -> None:
    ctypes.CDLL(None).prctl(_PARENT_ENDED, signal.SIGTERM)  # `soda isoflop run` was killed: save and stop
    try:
        status = work(load_plan(sys.argv[1], sys.argv[2:]))
    except SodaError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    if "megatron_soda.training.trainer" in sys.modules:
        from ..training.trainer import exit_quietly

        exit_quietly()
    sys.exit(status)


if __name__ == "__main__":
    main()
