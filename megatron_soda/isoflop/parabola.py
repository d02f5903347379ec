"""Approach 2 of Hoffmann et al. (arXiv 2203.15556): a parabola in log size for every budget, and a line through their
minima. The paper's fits are of this kind.

A parabola is linear in its coefficients, so a bootstrap is a product of matrices.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .results import Result

Array = NDArray[np.float64]
DRAWS = 2000
_FEWEST = 2  # minima that a line needs


@dataclass
class Curve:
    """The runs of one budget, and the parabola through them."""

    budget: float
    cost: float  # mean of the runs' own FLOPs
    x: Array  # log of parameters, or of tokens
    y: Array  # loss
    coefficients: Array  # of (x - mean)^2, x - mean, 1; empty if there are fewer than three sizes
    problem: str  # why there is no minimum; empty: there is one

    @property
    def optimum(self) -> float:
        """Parameters, or tokens, at the minimum; call it only without a `problem`."""
        return float(np.exp(self.x.mean() + _vertex(self.coefficients)))

    @property
    def lowest(self) -> float:
        """The loss at the minimum."""
        a, b, c = self.coefficients
        return float(c - b * b / (4 * a))

    def at(self, x: Array) -> Array:
        """The parabola at log sizes."""
        return np.polyval(self.coefficients, x - self.x.mean())


@dataclass
class Line:
    """log optimum = intercept + exponent x (log cost - centre)."""

    exponent: float
    intercept: float
    centre: float
    r2: float | None  # None with two minima, through which every line goes
    draws: Array  # (draws, 2): exponent, intercept of the bootstrap; empty without any measure of the noise

    def at(self, cost: float) -> float:
        return float(np.exp(self.intercept + self.exponent * (np.log(cost) - self.centre)))

    def interval(self) -> tuple[float, float] | None:
        """Of the exponent, 95 %."""
        return _middle(self.draws[:, 0])

    def interval_at(self, cost: float) -> tuple[float, float] | None:
        """Of the optimum at a cost, 95 %."""
        return _middle(np.exp(self.draws @ (np.log(cost) - self.centre, 1.0)))


@dataclass
class Approach2:
    curves: list[Curve]
    line: Line | None  # None with fewer than two minima
    sigma: float | None  # standard deviation of a run, pooled over budgets; None without degrees of freedom
    lost: float  # share of the bootstrap's draws without a line

    def lowest_at(self, cost: float) -> float | None:
        """The lowest loss at a cost, by a power of the cost through the minima's losses (no floor: with a few budgets
        within a factor of ten none can be told). None with fewer than two minima."""
        minima = [curve for curve in self.curves if not curve.problem and curve.lowest > 0]
        if len(minima) < _FEWEST:
            return None
        x, y = (np.log([getattr(curve, name) for curve in minima]) for name in ("cost", "lowest"))
        return float(np.exp(np.polyval(np.polyfit(x - x.mean(), y, 1), np.log(cost) - x.mean())))


def fit_parabolas(budgets: dict[float, list[Result]], of: str, seed: int = 0) -> Approach2:
    """of: `params` or `tokens`."""
    curves = [fit_curve(budget, rows, of) for budget, rows in budgets.items()]
    good = [curve for curve in curves if not curve.problem]
    fitted = [curve for curve in curves if len(curve.coefficients)]
    sigma = _sigma(fitted)
    if len(good) < _FEWEST:
        return Approach2(curves, None, sigma, 0.0)
    costs = np.log([curve.cost for curve in good])
    centre = float(costs.mean())
    optima = np.log([[curve.optimum for curve in good]])
    ((exponent, intercept),) = _lines(costs - centre, optima, np.ones((1, len(good))))
    error = optima[0] - (intercept + exponent * (costs - centre))
    r2 = 1 - float(error @ error / np.sum((optima[0] - optima[0].mean()) ** 2)) if len(good) > _FEWEST else None
    draws = np.zeros((0, 2))
    lost = 0.0
    if sigma is not None:
        draws = _bootstrap(good, _residuals(fitted, sigma), costs - centre, np.random.default_rng(seed))
        lost = 1 - len(draws) / DRAWS
    return Approach2(curves, Line(float(exponent), float(intercept), centre, r2, draws), sigma, lost)


def fit_curve(budget: float, rows: Sequence[Result], of: str) -> Curve:
    x = np.log([getattr(row, of) for row in rows])
    y = np.array([row.loss for row in rows])
    cost = float(np.exp(np.mean(np.log([row.flops for row in rows]))))
    sizes = len({row.params for row in rows})
    if sizes < 3:
        problem = f"{sizes} size{'s' if sizes > 1 else ''}, and a parabola needs 3"
        return Curve(budget, cost, x, y, np.zeros(0), problem)
    coefficients = _solver(x) @ y
    problem = ""
    if not coefficients[0] > 0:
        problem = "the parabola has no minimum: its middle is not lower than its ends"
    else:
        at = x.mean() + _vertex(coefficients)
        if not x.min() < at < x.max():
            side = "smallest" if at <= x.min() else "largest"
            kind = "model" if of == "params" else "number of tokens"
            problem = f"the minimum is not bracketed: it lies beyond the {side} {kind}"
    return Curve(budget, cost, x, y, coefficients, problem)


def _solver(x: Array) -> Array:
    """(3, runs): losses to the coefficients of the parabola."""
    return np.linalg.pinv(np.vander(x - x.mean(), 3))


def _vertex(coefficients: Array) -> Array:
    """The place of the minimum, relative to the mean; coefficients (3, ..)."""
    return -coefficients[1] / (2 * coefficients[0])


def _sigma(curves: list[Curve]) -> float | None:
    """Standard deviation of a run around its parabola, pooled over budgets."""
    degrees = sum(len(curve.x) - 3 for curve in curves)
    errors = sum(float(np.sum((curve.y - curve.at(curve.x)) ** 2)) for curve in curves)
    return (errors / degrees) ** 0.5 if degrees > 0 else None


def _residuals(curves: list[Curve], sigma: float) -> Array:
    """Those of all budgets, each divided by its own standard deviation (a fit pulls runs at the ends closest), then
    scaled to `sigma`."""
    pooled: list[float] = []
    for curve in curves:
        left = 1 - np.diag(np.vander(curve.x - curve.x.mean(), 3) @ _solver(curve.x))
        error = curve.y - curve.at(curve.x)
        pooled += [e / s**0.5 for e, s in zip(error, left, strict=True) if s > 1e-6]
    scaled = np.array(pooled)
    scaled -= scaled.mean()
    spread = float(scaled.std())
    return scaled * (sigma / spread) if spread > 0 else scaled


def _bootstrap(curves: list[Curve], errors: Array, costs: Array, rng: np.random.Generator) -> Array:
    """(draws, 2) lines through the minima of resampled runs. A minimum that is not bracketed in a draw is not used."""
    optima, usable = np.zeros((DRAWS, len(curves))), np.zeros((DRAWS, len(curves)))
    for i, curve in enumerate(curves):
        drawn = curve.at(curve.x) + rng.choice(errors, (DRAWS, len(curve.x)))
        coefficients = _solver(curve.x) @ drawn.T
        with np.errstate(divide="ignore", invalid="ignore"):
            at = curve.x.mean() + _vertex(coefficients)
        ok = (coefficients[0] > 0) & (at > curve.x.min()) & (at < curve.x.max())
        optima[:, i], usable[:, i] = np.where(ok, at, 0.0), ok
    enough = usable.sum(1) >= _FEWEST
    return _lines(costs, optima[enough], usable[enough])


def _lines(x: Array, y: Array, weights: Array) -> Array:
    """Slope and value at x = 0 of the least-squares line of every row of y (rows, points)."""
    total = weights.sum(1)
    mean_x, mean_y = (weights * x).sum(1) / total, (weights * y).sum(1) / total
    away = weights * (x - mean_x[:, None])
    slope = (away * y).sum(1) / (away * x).sum(1)
    return np.stack([slope, mean_y - slope * mean_x], 1)


def _middle(values: Array) -> tuple[float, float] | None:
    if len(values) == 0:
        return None
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)
