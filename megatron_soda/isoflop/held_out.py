"""How well a fit of a study's smaller budgets predicts its larger ones."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..errors import SodaError
from .fit import METHODS, Fit, predict
from .parabola import fit_parabolas
from .results import Result, Results, short


def split(results: Results, up_to: float) -> tuple[Results, list[Result]]:
    """The results of budgets of at most `up_to` FLOPs, and the other rows. Raises SodaError if either has none."""
    kept = [row for row in results.rows if row.budget <= up_to]
    above = [row for row in results.rows if row.budget > up_to]
    if not kept or not above:
        budgets = ", ".join(f"{budget:g}" for budget in results.by_budget())
        raise SodaError(
            f"--up-to {up_to:g}: there must be results on both sides of it; {results.path} has budgets of {budgets}"
        )
    return replace(results, rows=kept), above


def seed_deviation(rows: Sequence[Result]) -> float | None:
    """The standard deviation of the loss between seeds, pooled over all sizes and budgets with several; None if there
    is only one seed of each."""
    alike: dict[tuple[float, float], list[float]] = {}
    for row in rows:
        alike.setdefault((row.budget, row.params), []).append(row.loss)
    groups = [np.array(losses) for losses in alike.values() if len(losses) > 1]
    degrees = sum(len(losses) - 1 for losses in groups)
    return math.sqrt(sum(((x - x.mean()) ** 2).sum() for x in groups) / degrees) if groups else None


def compare(fit: Fit, above: Sequence[Result]) -> dict[str, Any]:
    """The losses of runs that the fit has not seen, and the optima of their budgets, as measured and as predicted."""
    runs = []
    for row in sorted(above, key=lambda row: (row.budget, row.params, row.seed)):
        found: dict[str, Any] = {"run": row.run, "flops": row.flops, "params": row.params, "tokens": row.tokens}
        found["loss"] = row.loss
        for method, surface in fit.surfaces.items():
            if not surface.problem:
                found[METHODS[method]] = float(surface.loss(row.params, row.tokens))
        runs.append(found)
    curves = fit_parabolas(Results("", "", list(above), []).by_budget(), "params").curves
    optima = [
        {
            "params": None if curve.problem else curve.optimum,
            "loss": None if curve.problem else curve.lowest,
            "problem": curve.problem,
            "predicted": predict(fit, curve.cost),
        }
        for curve in curves
    ]
    return {"seed_deviation": seed_deviation([*fit.results.rows, *above]), "runs": runs, "optima": optima}


def to_lines(found: dict[str, Any]) -> list[str]:
    methods = [name for name in METHODS.values() if name in found["runs"][0]]
    deviation = found["seed_deviation"]
    heads = "".join(f"{name.removeprefix('approach 3, '):>12}{'error':>9}" for name in methods)
    lines = ["", "runs that the fit has not seen, and what approach 3 predicts", f"{'run':<24}{'loss':>9}{heads}"]
    for run in found["runs"]:
        parts = "".join(f"{run[name]:>12.4f}{run[name] - run['loss']:>+9.4f}" for name in methods)
        lines.append(f"{run['run']:<24}{run['loss']:>9.4f}{parts}")
    for name in methods:
        errors = np.array([run[name] - run["loss"] for run in found["runs"]])
        worst = np.abs(errors).max()
        seeds = f", {worst / deviation:.1f} standard deviations between seeds ({deviation:.4f})" if deviation else ""
        lines.append(f"{name}: off by {errors.mean():+.4f} on average, by {worst:.4f} at most{seeds}")
    for optimum in found["optima"]:
        predicted = optimum["predicted"]
        lines += ["", f"optimum at {predicted['flops']:g} FLOPs: parameters, loss"]
        measured = optimum["problem"] or f"{short(optimum['params'])}, {optimum['loss']:.4f}"
        lines.append(f"  {'measured (parabola)':<24}{measured}")
        for name, values in predicted.items():
            if isinstance(values, dict):
                params, span = values["params"]
                loss = f", {values['loss'][0]:.4f}" if "loss" in values else ""
                spread = f" [{short(span[0])}, {short(span[1])}]" if span else ""
                lines.append(f"  {name:<24}{short(params)}{spread}{loss}")
    return lines
