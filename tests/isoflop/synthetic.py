"""Made-up results whose scaling laws are known."""

from collections.abc import Sequence
from pathlib import Path

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


def on_surface(points: Sequence[tuple[float, float, float]], alpha: float, beta: float, power: float) -> list[Result]:
    """(cost, N, D) with the losses of 1.7 + 400 N^-alpha + B D^-beta, without noise. B is such that BEST is optimal if
    costs are N^power D."""
    a = 400.0
    b = alpha * a * BEST[0] ** -alpha * BEST[1] ** beta / (power * beta)
    return [result(c, n, d, 1.7 + a * n**-alpha + b * d**-beta) for c, n, d in points]


def paper_points() -> list[tuple[float, float, float]]:
    """Budget, N and D of the paper's runs."""
    plan = make_plan(load_study(PAPER))
    return [(run.budget, run.params_total, run.tokens) for run in plan.runs]
