"""From an ablation to its runs: every value with every seed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe
from ..config.loading import full_key
from ..errors import SodaError
from ..isoflop.results import short
from ..model.size import size_of, space_of, study_flops, training_tokens
from .study import Ablation, Parts

_STORE = re.compile(r"^store:([^/]+)")


@dataclass(frozen=True)
class Run:
    value: str
    seed: int
    steps: int
    params_total: int
    tokens: int  # that it trains on itself: a branch goes on from those of another run
    cost: float  # FLOPs, forward and backward (model/size.py: study_flops)

    @property
    def id(self) -> str:
        return f"{self.value.replace(' ', '_')}-s{self.seed}"


@dataclass
class Plan:
    study: Ablation
    overrides: list[str]
    runs: list[Run] = field(default_factory=list)

    @property
    def suites(self) -> list[str]:
        return self.study.evaluate

    def recipe_of(self, run: Run) -> Recipe:
        own = {
            "name": f"{self.study.name}-{run.id}",
            "run": str(Path(self.study.folder) / "runs" / run.id),
            "seed": run.seed,
        }
        return self._recipe(f"value {run.value}", self.study.values[run.value], own)

    def store_of(self, name: str) -> Recipe:
        """The recipe to prepare."""
        own = {"name": f"{self.study.name}-{name}", "run": str(Path(self.study.folder) / "stores" / name)}
        return self._recipe(f"store {name}", self.study.stores[name], own)

    def columns(self, run: Run) -> dict[str, Any]:
        data = training_tokens(self.recipe_of(run))
        named = {name: getattr(run, name) for name in ("value", "seed", "steps", "params_total", "tokens")}
        return {**named, "flops": run.cost, "passes": run.tokens / data if data else None}

    def _recipe(self, of: str, parts: Parts | None, own: dict[str, Any]) -> Recipe:
        try:
            fixed = [f"{key}={value}" for key, value in own.items()]
            return load_recipe(self.study.recipe_path, [*self.overrides, *fixed], self._resolved(parts or {}))
        except SodaError as error:
            raise SodaError(f"{self.study.source}: {of}: {error}") from None

    def _resolved(self, value: Any) -> Any:
        """`store:NAME/train` as a path."""
        if isinstance(value, Mapping):
            return {name: self._resolved(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._resolved(part) for part in value]
        if isinstance(value, str) and (found := _STORE.match(value)):
            if found[1] not in self.study.stores:
                raise SodaError(f"{value}: no store {found[1]}; there are {', '.join(self.study.stores) or 'none'}")
            return str(Path(self.study.folder) / "stores" / found[1] / "data") + value[found.end() :]
        return value


def make_plan(study: Ablation, overrides: list[str] | None = None) -> Plan:
    """The study's runs, by value, then seed. `overrides` are recipe settings for all runs.

    Raises SodaError for a recipe that cannot be read, and values or seeds that would share a folder.
    """
    plan = Plan(study, overrides or [])
    _check_overrides(study, overrides or [])
    for name in study.stores:
        plan.store_of(name)
    for value, parts in study.values.items():
        recipe = plan._recipe(f"value {value}", parts, {})
        for seed in study.seeds or [recipe.seed]:
            plan.runs.append(_run(value, seed, recipe))
    ids = [run.id for run in plan.runs]
    for run in plan.runs:
        if ids.count(run.id) > 1:
            raise SodaError(f"{study.source}: {run.id} is listed twice")
    return plan


def _check_overrides(study: Ablation, overrides: list[str]) -> None:
    """Settings win over the study's values: one that a value has, too, would make all runs alike."""
    for override in overrides:
        key = full_key(override)
        if any(_sets(parts or {}, key.split(".")) for parts in (*study.values.values(), *study.stores.values())):
            raise SodaError(f"{study.source}: {override}: {key} is what this study varies")
        if key in ("name", "run", "seed"):
            raise SodaError(f"{study.source}: {override}: every run of a study has its own {key}")


def _sets(parts: Parts, path: list[str]) -> bool:
    if path[0] not in parts:
        return False
    inner = parts[path[0]]
    return len(path) == 1 or not isinstance(inner, dict) or _sets(inner, path[1:])


def _run(value: str, seed: int, recipe: Recipe) -> Run:
    space, length, t = space_of(recipe), recipe.data.sequence_length, recipe.training
    branched = re.fullmatch(r"step_(\d+)", Path(t.branch_from).name)  # steps that another run has taken
    tokens = (t.steps - int(branched[1] if branched else 0)) * t.global_batch_size * length
    return Run(
        value=value,
        seed=seed,
        steps=t.steps,
        params_total=size_of(recipe.model, space, length).total,
        tokens=tokens,
        cost=float(study_flops(recipe.model, space, length) * tokens),
    )


def to_lines(plan: Plan) -> list[str]:
    """The plan as a table."""
    width = max(len(run.value) for run in plan.runs)
    lines = [f"{'value':<{width}}{'seed':>7}{'steps':>9}{'params':>10}{'tokens':>10}{'FLOPs':>10}{'passes':>8}"]
    for run in plan.runs:
        passes = plan.columns(run)["passes"]
        lines.append(
            f"{run.value:<{width}}{run.seed:>7}{run.steps:>9}{short(run.params_total):>10}{short(run.tokens):>10}"
            f"{run.cost:>10.2e}{'' if passes is None else f'{passes:.2f}':>8}"
        )
    total = sum(run.cost for run in plan.runs)
    return [
        *lines,
        f"{len(plan.runs)} runs, {total:.2e} FLOPs; stores to prepare: {', '.join(plan.study.stores) or 'none'}",
    ]
