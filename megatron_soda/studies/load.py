"""Which kind of study a file describes."""

from pathlib import Path

from ..ablations.plan import make_plan as plan_ablation
from ..ablations.study import load_ablation
from ..config.yaml_files import read_yaml
from ..errors import SodaError
from ..isoflop.plan import make_plan as plan_isoflop
from ..isoflop.study import load_study
from .base import Plan


def load_plan(path: str | Path, overrides: list[str]) -> Plan:
    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        raise SodaError(f"{path}: a study is a mapping of keys")
    return (
        plan_ablation(load_ablation(path), overrides)
        if "values" in values
        else plan_isoflop(load_study(path), overrides)
    )
