"""Reads the files of a run folder tolerantly: what is damaged becomes a warning on the page, never an error."""

import json
from pathlib import Path
from typing import Any

from ..errors import SodaError
from ..files import read_json
from .words import finite, plural


def load(run: Path, name: str, warnings: list[str]) -> Any:
    """The run's JSON file `name`, or None if it does not exist; a damaged one is reported on the page."""
    if not (run / name).exists():
        return None
    try:
        return read_json(run / name)
    except (SodaError, OSError) as error:
        reason = str(error).removeprefix(f"{run / name}: ")
        warnings.append(f"{name} could not be read and is left out: {reason}")
        return None


def read_metrics(path: Path, warnings: list[str]) -> tuple[list[dict], list[dict], list[dict]]:
    """Training, validation and evaluation points in step order. If a step was written twice (a resumed run), the last
    one counts."""
    if not path.is_file():
        return [], [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    train: dict[float, dict] = {}
    valid: dict[float, dict] = {}
    evaluated: dict[float, dict] = {}
    damaged: list[int] = []
    for index, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            point = json.loads(line)
        except (ValueError, RecursionError):
            damaged.append(index)
            continue
        step = finite(as_dict(point).get("step"))
        if step is None:
            damaged.append(index)
        elif "valid_nll" in point or "valid_loss" in point:
            valid[step] = point
        elif "evaluation" in point:
            evaluated[step] = point
        else:
            train[step] = point
    if damaged == [len(lines)]:
        warnings.append("The last line of metrics.jsonl is half written and is left out (is the run still going?).")
    elif damaged:
        warnings.append(f"metrics.jsonl: {plural(len(damaged), 'unreadable line')} left out, first line {damaged[0]}.")
    lost = [step for step, point in train.items() if "loss" in point and finite(point["loss"]) is None]
    if lost:
        warnings.append(f"The loss was not a finite number at {plural(len(lost), 'step')}, first at {lost[0]:,.0f}.")
    ordered = [[points[step] for step in sorted(points)] for points in (train, valid, evaluated)]
    return ordered[0], ordered[1], ordered[2]


def warn_of_stale(run: Path, warnings: list[str]) -> None:
    """Reports results from a different model than the one now in RUN/hf."""
    exported = as_dict(load(run, "hf/soda.json", [])).get("key")
    evaluated = as_dict(load(run, "eval.json", [])).get("export")
    spoken = {as_dict(sample).get("export") for sample in as_list(load(run, "samples/samples.json", []))} - {None}
    if exported and evaluated not in (None, exported):
        warnings.append("The evaluation is from an earlier export of this run: run soda evaluate again.")
    if exported and not spoken <= {exported}:
        warnings.append("Some samples are from an earlier export of this run: run soda generate again.")


def as_dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def last(points: list[dict], key: str) -> float | None:
    values = (finite(point.get(key)) for point in reversed(points))
    return next((value for value in values if value is not None), None)
