"""Made-up results whose scaling laws are known."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_soda.isoflop.plan import make_plan
from megatron_soda.isoflop.results import Result
from megatron_soda.isoflop.study import load_study

PAPER = Path(__file__).resolve().parents[2] / "examples" / "isoflop" / "paper.yaml"
BUDGETS = (3e18, 9e18, 1.8e19, 3e19, 9e19, 1.8e20, 3e20)
BEST = 851e6, 18.5e9, 9e19  # a model that the authors name as near the optimum: N, D and their cost
A, D = 0.367, 0.579  # the paper's exponents. D is not C / (6 N): they sum to 0.946, so the cost is N^POWER D
POWER = (1 - D) / A


def result(flops: float, params: float, tokens: float, loss: float) -> Result:
    return Result("run", flops, flops, params, tokens, "", loss, {})


def parabolic(rng: np.random.Generator, sigma: float, sizes: int = 8, span: float = 16) -> dict[float, list[Result]]:
    """Every budget's losses lie on a parabola in log N, whose minimum follows the paper's exponents."""
    rows: dict[float, list[Result]] = {}
    for flops in BUDGETS:
        scale = flops / BEST[2]
        for away in np.linspace(-0.5, 0.5, sizes) * np.log(span):
            params, tokens = BEST[0] * scale**A * np.exp(away), BEST[1] * scale**D * np.exp(-POWER * away)
            loss = 3.0 * scale**-0.03 + 0.03 * away**2 + sigma * rng.standard_normal()
            rows.setdefault(flops, []).append(result(flops, params, tokens, loss))
    return rows


def losses(alpha: float, beta: float, power: float) -> Callable[[Any, Any], Any]:
    """1.7 + 400 N^-alpha + B D^-beta, with B such that BEST is optimal where costs are N^power D."""
    a = 400.0
    b = alpha * a * BEST[0] ** -alpha * BEST[1] ** beta / (power * beta)
    return lambda params, tokens: 1.7 + a * params**-alpha + b * tokens**-beta


def on_surface(points: Sequence[tuple[float, float, float]], alpha: float, beta: float, power: float) -> list[Result]:
    """(cost, N, D) with these losses, without noise."""
    surface = losses(alpha, beta, power)
    return [result(c, n, d, surface(n, d)) for c, n, d in points]


def flops_per_token(params: Any) -> Any:
    """A smooth function of N that the paper's models follow within 4 %: its slope falls from 1.29 to 1."""
    away = np.log(params) - 20.165
    return np.exp(21.85 + 1.15 * away - 0.034 * away**2)


def paper_points() -> list[tuple[float, float, float]]:
    """Budget, N and D of the paper's models, at these costs."""
    runs = make_plan(load_study(PAPER)).runs
    return [(run.budget, run.params_total, run.budget / flops_per_token(run.params_total)) for run in runs]


def searched(surface: Callable[[Any, Any], Any], flops: float) -> tuple[float, float]:
    """The N and D of lowest loss at a cost, on a fine grid."""
    params = np.geomspace(1e7, 1e11, 400_001)
    tokens = flops / flops_per_token(params)
    best = np.argmin(surface(params, tokens))
    return float(params[best]), float(tokens[best])
