"""What is known of a study's runs: which are done, and their results. Reads files only.

STUDY/runs/ID is an ordinary run folder; ID/result.json is written once the run is done. STUDY/results.jsonl and
results.csv join them.
"""

import csv
import hashlib
import io
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ..codecs.description import DESCRIPTION, read_description
from ..config import Recipe, load_recipe
from ..errors import SodaError
from ..evaluation.suite import figures_of
from ..files import read_json, to_json, write_json, write_text
from ..isoflop.results import RESULTS
from ..registry import SUITES
from ..run_folder import metrics_of
from .base import Plan, Run

RESULT, FAILED, CLAIMS = "result.json", "failed.json", "claims"
_DECISIVE = ("seed", "model", "data", "parallel", "training", "optimizer", "schedule", "precision")


def recipe_hash(recipe: Recipe) -> str:
    """Of everything that determines what a run learns, as far as it differs from the defaults: a key that a later
    version adds changes no hash."""
    defaults = asdict(Recipe())
    values: dict[str, Any] = {}
    for name, value in asdict(recipe).items():
        if name in _DECISIVE:
            of = defaults[name]
            values[name] = {k: v for k, v in value.items() if v != of[k]} if isinstance(value, dict) else value
    return hashlib.sha256(to_json(values, sort_keys=True).encode()).hexdigest()[:12]


def result_of(plan: Plan, run: Run, recipe: Recipe) -> dict[str, Any] | None:
    """The result of a run whose last step was taken and validated, and that was evaluated; None before."""
    folder = Path(recipe.run)
    lines = metrics_of(folder)
    last = next((line for line in reversed(lines) if line["step"] == run.steps and "valid_nll" in line), None)
    measured = _measured(plan, folder, run.steps)
    if last is None or measured is None:
        return None
    nll: dict[str, float] = last["valid_nll"]
    return {
        "run": run.id,
        "study": plan.study.name,
        **plan.columns(run),
        "recipe_hash": recipe_hash(recipe),
        "loss": last["valid_loss"],
        "nll": nll,
        "bits_per_audio_second": _bits_per_second(nll, recipe),
        **measured,
        "suites": list(plan.suites),
        "wall_seconds": _facts(folder / "timings.json").get("train", {}).get("seconds"),
        "device_seconds": _device_seconds(lines),
        "device": _facts(folder / "environment.json").get("device"),
    }


def _measured(plan: Plan, folder: Path, step: int) -> dict[str, float] | None:
    """The figures of the plan's suites (suite.figures_of). None if a suite is missing, or was measured at another
    step."""
    found = _facts(folder / "eval.json")
    if plan.suites and (found.get("step") != step or any(name not in found for name in plan.suites)):
        return None
    return {key: value for name in plan.suites for key, value in figures_of(SUITES[name], found[name]).items()}


def _facts(path: Path) -> dict[str, Any]:
    """Empty if the run was killed before it wrote them."""
    return read_json(path, dict) if path.is_file() else {}


def _device_seconds(lines: list[dict[str, Any]]) -> float:
    """Time spent on the forward and backward passes and in the optimizer."""
    seconds, before = 0.0, 0
    for line in lines:
        if parts := line.get("step_seconds"):
            steps, before = line["step"] - before, line["step"]
            seconds += steps * (parts.get("forward_backward", 0.0) + parts.get("optimizer", 0.0))
    return round(seconds, 3)


def _bits_per_second(nll: dict[str, float], recipe: Recipe) -> float | None:
    """All codes of a frame, times frames per second; None without a codec beside the data."""
    folder = recipe.data_folder
    if not (folder / DESCRIPTION).is_file():
        return None
    codec = read_description(folder)
    codes = [value for name, value in nll.items() if name == "semantic" or name.startswith("acoustic_")]
    return sum(codes) / math.log(2) * codec.sample_rate / codec.samples_per_frame


# ---- the state of a run


@dataclass
class State:
    kind: Literal["waiting", "running", "done", "failed", "stopped"]
    step: int = 0
    told: str = ""  # why it failed, or where it runs
    result: dict[str, Any] | None = None


def state_of(plan: Plan, run: Run, recipe: Recipe) -> State:
    folder = Path(recipe.run)
    if (folder / RESULT).is_file():
        result = read_json(folder / RESULT, dict)
        if result.get("recipe_hash") != recipe_hash(recipe):
            return State("failed", 0, other_recipe(folder))
        if set(plan.suites) <= set(result.get("suites", [])):
            return State("done", run.steps, "", result)
    if (why := _why_failed(folder / FAILED)) is not None:
        return State("failed", 0, why)
    where = _claimed_by(Path(plan.study.folder) / CLAIMS / run.id)
    lines = metrics_of(folder)
    step = lines[-1]["step"] if lines else 0
    if where is not None:
        return State("running", step, where)
    return State("stopped" if lines else "waiting", step)


def _why_failed(path: Path) -> str | None:
    try:
        return str(read_json(path, dict).get("error")) if path.is_file() else None
    except SodaError:
        if path.is_file():
            raise
        return None  # a worker has just deleted it, to try the run again


def other_recipe(folder: Path) -> str:
    return f"{folder} holds a run of another recipe. Restore the study, give it another `folder`, or remove that run"


def _claimed_by(folder: Path) -> str | None:
    """Who holds the claim of a run, as far as can be seen from here. (Locking it to find out would make the workers
    pass it over.)"""
    try:
        words = (folder / ".lock").read_text().split()
    except OSError:
        return None
    if len(words) != 4 or not words[1].isdigit():  # "process 12 on host"
        return None
    here = words[3] == os.uname().nodename
    if here and not Path(f"/proc/{words[1]}").exists():
        return None
    return "" if here else f"on {words[3]}"


# ---- results


def collect(plan: Plan, recipes: list[Recipe]) -> list[dict[str, Any]]:
    """Writes results.jsonl and results.csv of all runs that are done, also of those that were trained by other means
    (launch.sh). Returns the results in the plan's order."""
    found: list[dict[str, Any]] = []
    for run, recipe in zip(plan.runs, recipes, strict=True):
        folder, state = Path(recipe.run), state_of(plan, run, recipe)
        if state.kind == "stopped" and (folder / "recipe.yaml").is_file():
            trained = load_recipe(folder / "recipe.yaml")
            result = result_of(plan, run, recipe) if learns_alike(trained, recipe) else None
            if result:
                write_json(folder / RESULT, result)
                state.result = result
        if state.result:
            found.append(state.result)
    if found:
        target = Path(plan.study.folder)
        write_text(target / RESULTS, "".join(to_json(result) + "\n" for result in found))
        write_text(target / "results.csv", _csv(found))
    return found


def learns_alike(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes are of the same run, whatever their layouts and micro-batches."""
    values = []
    for recipe in (one, other):
        chosen = {name: value for name, value in asdict(recipe).items() if name in _DECISIVE and name != "parallel"}
        chosen["training"] = {k: v for k, v in chosen["training"].items() if k not in ("micro_batch_size", "recompute")}
        values.append(chosen)
    return values[0] == values[1]


def _csv(found: list[dict[str, Any]]) -> str:
    rows = []
    for result in found:
        row = {name: value for name, value in result.items() if name != "nll"}
        rows.append(row | {f"nll_{name}": value for name, value in result["nll"].items()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
