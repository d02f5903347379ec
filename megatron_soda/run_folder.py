"""What a run records about itself: environment.json, timings.json; and what training/metrics.py wrote."""

import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from .errors import SodaError
from .files import read_json, write_json
from .log import log


def record_environment(run: Path, **facts: Any) -> None:
    """Writes software versions and `facts` (device, layout, ..) to RUN/environment.json."""
    packages = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy", "megatron-soda")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    environment = {"python": platform.python_version(), "platform": platform.platform(), "packages": versions}
    write_json(run / "environment.json", {**environment, **facts})


def record_timing(run: Path, stage: str, seconds: dict[str, float], *, add: bool = False) -> None:
    """Writes the seconds of a stage to RUN/timings.json. `add`: adds to the existing value, for a resumed stage."""
    path = run / "timings.json"
    timings: dict[str, Any] = {}
    if path.is_file():
        try:
            timings = read_json(path, dict)
        except SodaError as error:  # no reason to fail at the end of a stage
            log.warning(f"{error}; it is started over")
    before = timings.get(stage) if add else {}
    before = {name: value for name, value in before.items() if _is_time(value)} if isinstance(before, dict) else {}
    timings[stage] = {name: round(before.get(name, 0.0) + value, 3) for name, value in seconds.items()}
    try:
        write_json(path, timings)
    except (OSError, SodaError) as error:  # the stage itself is done
        log.warning(f"{path}: the time that it took could not be written ({error})")


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) < 1e12


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl that are whole."""
    path = run / "metrics.jsonl"
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                point = json.loads(line)
            except ValueError:  # the last line of a killed run, or of one that is being written
                continue
            if isinstance(point, dict) and isinstance(point.get("step"), int):
                lines.append(point)
    return lines
