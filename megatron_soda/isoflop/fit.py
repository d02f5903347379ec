"""All fits of a study side by side, as numbers and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import SodaError
from .parabola import Approach2, fit_parabolas
from .results import Result, Results, short
from .surface import DRAWS, FEWEST, Cost, Method, Surface, fit_cost, fit_surface

METHODS: dict[Method, str] = {"projection": "approach 3, projection", "huber": "approach 3, Huber"}
_POOR_COST = 0.05
_LOST = 0.05

Span = tuple[float, float]


@dataclass
class Fit:
    results: Results
    params: Approach2
    tokens: Approach2
    surfaces: dict[Method, Surface]  # empty with too few runs
    cost: Cost
    bias: tuple[float, float] | None  # of approach 2's exponents, see `_bias`
    notes: list[str]


def fit_study(results: Results, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Whatever fit the results allow; `notes` says what they do not. draws: of approach 3's bootstrap.
    Raises SodaError if no fit is possible."""
    budgets, notes = results.by_budget(), list(results.notes)
    params, tokens = fit_parabolas(budgets, "params", seed), fit_parabolas(budgets, "tokens", seed)
    cost = fit_cost(results.rows)
    surfaces: dict[Method, Surface] = {}
    if len(results.rows) < FEWEST:
        notes.append(f"{len(results.rows)} runs: approach 3 needs {FEWEST}")
    else:
        surfaces = {method: fit_surface(results.rows, method, draws, seed) for method in METHODS}
    notes += _warnings(params, tokens, surfaces, cost)
    if params.line is None and tokens.line is None and all(s.problem for s in surfaces.values()):
        raise SodaError(f"{results.path}: no fit is possible.\n" + "\n".join(notes))
    bias = _bias(results.rows, surfaces["projection"]) if surfaces else None
    return Fit(results, params, tokens, surfaces, cost, bias, notes)


def _bias(rows: Sequence[Result], surface: Surface) -> tuple[float, float] | None:
    """What approach 2 finds on these very runs if their losses lie on the surface, without any noise, minus the
    surface's own exponents."""
    if surface.problem:
        return None
    exact = [replace(row, loss=float(surface.loss(row.params, row.tokens))) for row in rows]
    budgets = Results("", "", exact, []).by_budget()
    lines = [fit_parabolas(budgets, of).line for of in ("params", "tokens")]
    if lines[0] is None or lines[1] is None:
        return None
    return lines[0].exponent - surface.exponents[0], lines[1].exponent - surface.exponents[1]


def _warnings(params: Approach2, tokens: Approach2, surfaces: dict[Method, Surface], cost: Cost) -> list[str]:
    notes = []
    for name, approach in (("parameters", params), ("tokens", tokens)):
        for curve in approach.curves:
            if curve.problem:
                notes.append(f"budget {curve.budget:g}, {name}: {curve.problem}; it is not part of the line")
            elif curve.x[curve.y.argmin()] in (curve.x.min(), curve.x.max()):
                notes.append(f"budget {curve.budget:g}, {name}: the run of lowest loss is at an end of the sizes")
        minima = sum(not curve.problem for curve in approach.curves)
        if approach.line is None:
            notes.append(f"approach 2, {name}: {minima} bracketed minima, and a line needs 2")
        elif minima == 2:
            notes.append(f"approach 2, {name}: 2 minima, so the line goes through both and shows no error of its own")
        if approach.lost > _LOST:
            notes.append(
                f"approach 2, {name}: {approach.lost:.0%} of the bootstrap's draws had no line; the interval is "
                "too narrow"
            )
    if params.sigma is None:
        notes.append("approach 2: no budget has more than three runs: the noise is unknown, and there are no intervals")
    notes += [f"{METHODS[method]}: no optimum: {s.problem}" for method, s in surfaces.items() if s.problem]
    if cost.worst > _POOR_COST:
        notes.append(
            f"approach 3: the FLOPs of the runs are up to {cost.worst:.0%} off a smooth function of N, along which the "
            "optimum is taken"
        )
    return notes


# ---- predictions


def predict(fit: Fit, flops: float) -> dict[str, Any]:
    """Optimal parameters, tokens and loss at a cost, with intervals, by each approach that has an optimum."""
    found: dict[str, Any] = {"flops": flops}
    if fit.params.line and fit.tokens.line:
        lines = (("params", fit.params.line), ("tokens", fit.tokens.line))
        found["approach 2"] = {name: (line.at(flops), line.interval_at(flops)) for name, line in lines}
        if (loss := fit.params.lowest_at(flops)) is not None:
            found["approach 2"]["loss"] = loss, None
    for method, surface in fit.surfaces.items():
        if not surface.problem:
            values = {
                "params": lambda s: s.optimum(flops)[0],
                "tokens": lambda s: s.optimum(flops)[1],
                "loss": lambda s: float(s.loss(*s.optimum(flops))),
            }
            found[METHODS[method]] = {name: (of(surface), surface.interval(of)) for name, of in values.items()}
    return found


def compare_model(fit: Fit, params: float, tokens: float) -> dict[str, Any]:
    """How far a model is from the optimum at its cost. `excess`: its loss minus that of the optimum."""
    flops = fit.cost.of(params, tokens)
    found: dict[str, Any] = {"params": params, "tokens": tokens, **predict(fit, flops)}
    for method, surface in fit.surfaces.items():
        if not surface.problem:

            def excess(s: Surface) -> float:
                return float(s.loss(params, tokens) - s.loss(*s.optimum(flops)))

            def loss(s: Surface) -> float:
                return float(s.loss(params, tokens))

            found[METHODS[method]]["loss of the model"] = loss(surface), surface.interval(loss)
            found[METHODS[method]]["excess"] = excess(surface), surface.interval(excess)
    return found


# ---- output


def to_dict(fit: Fit, budgets: Sequence[float] = (), models: Sequence[tuple[float, float]] = ()) -> dict[str, Any]:
    """For fit.json."""
    return {
        "results": fit.results.path,
        "measure": fit.results.measure,
        "runs": len(fit.results.rows),
        "cost": {"power": fit.cost.power(fit.cost.centre), "worst": fit.cost.worst},
        "approach 2": {"params": _approach2(fit.params), "tokens": _approach2(fit.tokens), "bias": fit.bias},
        **{METHODS[method]: _surface(surface) for method, surface in fit.surfaces.items()},
        "predictions": [predict(fit, flops) for flops in budgets],
        "models": [compare_model(fit, *model) for model in models],
        "notes": fit.notes,
    }


def _approach2(found: Approach2) -> dict[str, Any]:
    line = found.line
    return {
        "exponent": line and line.exponent,
        "interval": line and line.interval(),
        "factor": line and float(np.exp(line.intercept - line.exponent * line.centre)),
        "r2": line and line.r2,
        "sigma": found.sigma,
        "minima": [
            {
                "budget": curve.budget,
                "flops": curve.cost,
                "runs": len(curve.x),
                "optimum": None if curve.problem else curve.optimum,
                "loss": None if curve.problem else curve.lowest,
                "problem": curve.problem,
            }
            for curve in found.curves
        ],
    }


def _surface(s: Surface) -> dict[str, Any]:
    n, d = (None, None) if s.problem else s.exponents
    return {
        "floor": s.floor,
        "A": float(s.a * np.exp(s.alpha * s.mean_n)),
        "B": float(s.b * np.exp(s.beta * s.mean_d)),
        "alpha": s.alpha,
        "beta": s.beta,
        "params": {"exponent": n, "interval": s.interval(lambda one: one.exponents[0])},
        "tokens": {"exponent": d, "interval": s.interval(lambda one: one.exponents[1])},
        "sigma": s.sigma,
        "r2": s.r2,
        "problem": s.problem,
    }


def to_lines(fit: Fit, budgets: Sequence[float] = (), models: Sequence[tuple[float, float]] = ()) -> list[str]:
    """The table that `soda isoflop fit` prints. 95 % intervals are in brackets."""
    rows = fit.results.rows
    lines = [
        f"{len(rows)} runs of {len({row.budget for row in rows})} budgets, measure {fit.results.measure}; "
        f"FLOPs ~ N^{fit.cost.power(fit.cost.sizes[0]):.2f} D for the smallest, "
        f"N^{fit.cost.power(fit.cost.sizes[1]):.2f} D for the largest",
        "",
        f"{'budget':>9}{'runs':>6}{'N*':>12}{'D*':>12}{'loss':>9}",
    ]
    for n, d in zip(fit.params.curves, fit.tokens.curves, strict=True):
        best_n = "-" if n.problem else short(n.optimum)
        best_d = "-" if d.problem else short(d.optimum)
        lowest = "-" if n.problem else f"{n.lowest:.4f}"
        lines.append(f"{n.budget:>9g}{len(n.x):>6}{best_n:>12}{best_d:>12}{lowest:>9}")
    lines += ["", f"{'':<26}{'N* ~ C^':<26}{'D* ~ C^':<26}R2"]
    if fit.params.line and fit.tokens.line:
        n, d = fit.params.line, fit.tokens.line
        r2 = ", ".join("-" if line.r2 is None else f"{line.r2:.4f}" for line in (n, d))
        shown = [_exponent(line.exponent, line.interval()) for line in (n, d)]
        lines.append(f"{'approach 2 (parabolas)':<26}{shown[0]:<26}{shown[1]:<26}{r2}")
    for method, s in fit.surfaces.items():
        if not s.problem:
            shown = [_exponent(s.exponents[i], s.interval(lambda one, i=i: one.exponents[i])) for i in (0, 1)]
            lines.append(f"{METHODS[method]:<26}{shown[0]:<26}{shown[1]:<26}{s.r2:.4f}")
    for method, s in fit.surfaces.items():
        lines.append(
            f"{METHODS[method]}: loss = {s.floor:.4g} + {s.a * np.exp(s.alpha * s.mean_n):.4g} N^-{s.alpha:.3f} + "
            f"{s.b * np.exp(s.beta * s.mean_d):.4g} D^-{s.beta:.3f}, off by {s.sigma:.2g}"
        )
    if fit.bias:
        lines.append(
            f"bias of approach 2 on these runs, without noise: {fit.bias[0]:+.4f} and {fit.bias[1]:+.4f}, if the "
            "losses follow approach 3"
        )
    for flops in budgets:
        lines += ["", f"optimum at {flops:g} FLOPs", *_predicted(predict(fit, flops))]
    for params, tokens in models:
        found = compare_model(fit, params, tokens)
        lines += [
            "",
            f"{short(params)} parameters, {short(tokens)} tokens: {found['flops']:.3g} FLOPs; the optimum there",
        ]
        lines += _predicted(found)
    return lines + [""] * bool(fit.notes) + [f"warning: {note}" for note in fit.notes]


def _predicted(found: dict[str, Any]) -> list[str]:
    lines = []
    for name, values in found.items():
        if isinstance(values, dict):
            parts = [f"{what} {_number(what, value, interval)}" for what, (value, interval) in values.items()]
            lines.append(f"  {name:<24}{'; '.join(parts)}")
    return lines


def _number(what: str, value: float, interval: Span | None) -> str:
    show = short if what in ("params", "tokens") else "{:.4f}".format
    return show(value) + (f" [{show(interval[0])}, {show(interval[1])}]" if interval else "")


def _exponent(value: float, interval: Span | None) -> str:
    return f"{value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
