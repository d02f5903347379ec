"""Which kind of study a file describes."""

from pathlib import Path

import yaml

from ..ablations.plan import make_plan as plan_ablation
from ..ablations.study import load_ablation
from ..errors import SodaError
from ..files import reading
from ..isoflop.plan import make_plan as plan_isoflop
from ..isoflop.study import load_study
from .base import Plan


def load_plan(path: str | Path, overrides: list[str]) -> Plan:
    with reading(Path(path), "not YAML"):
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise SodaError(f"{path}: a study is a mapping of keys")
    return (
        plan_ablation(load_ablation(path), overrides)
        if "values" in values
        else plan_isoflop(load_study(path), overrides)
    )
