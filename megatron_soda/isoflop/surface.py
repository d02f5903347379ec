"""Approach 3 of Hoffmann et al. (arXiv 2203.15556): one formula for all runs,

    loss = floor + A N^-alpha + B D^-beta        N parameters, D tokens

fitted in two ways. Variable projection solves for the three coefficients, none negative, at every (alpha, beta), so
only these two are searched for (arXiv 2603.22339). The other is Hoffmann's: Huber's loss on the log of the loss, by
L-BFGS from a grid of starts.

log N and log D are centred: otherwise the coefficients and the exponents are so correlated that L-BFGS stops near
wherever it starts, and a bootstrap gives intervals that are far too narrow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from .results import Result

Array = NDArray[np.float64]
Method = Literal["projection", "huber"]
DRAWS = 200
HUBER = 1e-3  # in log loss, as in Hoffmann et al.
EXPONENTS = (0.01, 3.0)  # searched
_GRID = np.geomspace(0.05, 1.6, 9)
FEWEST = 6  # runs: one more than parameters


@dataclass
class Cost:
    """FLOPs of a run = factor x N^power x D, fitted to the runs. (6ND would be factor 6, power 1; with large tables and
    attention, costs grow by another power of N.)"""

    power: float
    log_factor: float
    worst: float  # largest relative error over the runs

    def of(self, params: float, tokens: float) -> float:
        return float(np.exp(self.log_factor + self.power * np.log(params)) * tokens)


def fit_cost(rows: Sequence[Result]) -> Cost:
    n = np.log([row.params for row in rows])
    per_token = np.log([row.flops / row.tokens for row in rows])
    if np.ptp(n) < 1e-9:
        return Cost(1.0, float(per_token.mean() - n.mean()), 0.0)
    power, log_factor = np.polyfit(n, per_token, 1)
    error = np.exp(power * n + log_factor - per_token) - 1
    return Cost(float(power), float(log_factor), float(np.abs(error).max()))


@dataclass
class Surface:
    """loss = floor + a exp(-alpha (log N - mean_n)) + b exp(-beta (log D - mean_d))"""

    method: Method
    floor: float
    a: float
    b: float
    alpha: float
    beta: float
    mean_n: float
    mean_d: float
    cost: Cost
    sigma: float = 0.0  # standard deviation of a run around it
    r2: float = 0.0
    draws: list["Surface"] = field(default_factory=list, repr=False)  # bootstrap

    @property
    def problem(self) -> str:
        """Why there is no optimum; empty: there is one."""
        if not (self.a > 0 and self.b > 0):
            name = "parameters" if self.a <= 0 else "tokens"
            return f"the loss does not fall with the number of {name}"
        ends = [
            f"{name} is at the end of its range ({value:.3g})"
            for name, value in (("alpha", self.alpha), ("beta", self.beta))
            if not EXPONENTS[0] * 1.01 < value < EXPONENTS[1] * 0.99
        ]
        return " and ".join(ends)

    @property
    def exponents(self) -> tuple[float, float]:
        """Of the optimal N and D with the cost: the loss at fixed cost is lowest where the derivatives of its two terms
        along the curve of equal cost cancel."""
        total = self.alpha + self.cost.power * self.beta
        return self.beta / total, self.alpha / total

    def loss(self, params: float | Array, tokens: float | Array) -> Array:
        n, d = np.log(params) - self.mean_n, np.log(tokens) - self.mean_d
        return self.floor + self.a * np.exp(-self.alpha * n) + self.b * np.exp(-self.beta * d)

    def optimum(self, flops: float) -> tuple[float, float]:
        """The N and D of lowest loss at a cost."""
        k = self.cost.power
        rest = np.log(flops) - self.cost.log_factor  # k log N + log D
        ratio = np.log(self.alpha * self.a / (k * self.beta * self.b))
        n = (ratio + self.alpha * self.mean_n + self.beta * (rest - self.mean_d)) / (self.alpha + k * self.beta)
        return float(np.exp(n)), float(np.exp(rest - k * n))

    def interval(self, value: Callable[["Surface"], float]) -> tuple[float, float] | None:
        """95 % of a value over the bootstrap; None without one, or if most of its draws have no optimum."""
        found = [value(draw) for draw in self.draws if not draw.problem]
        if not found or len(found) < len(self.draws) / 2:
            return None
        low, high = np.percentile(found, (2.5, 97.5))
        return float(low), float(high)


def fit_surface(rows: Sequence[Result], method: Method, draws: int = DRAWS, seed: int = 0) -> Surface:
    """Needs FEWEST runs. Residual bootstrap: the residuals, of the log loss for `huber`, are drawn anew for all runs,
    scaled up for the five fitted numbers."""
    n, d = (np.log([getattr(row, of) for row in rows]) for of in ("params", "tokens"))
    y = np.array([row.loss for row in rows])
    cost, centre = fit_cost(rows), (float(n.mean()), float(d.mean()))
    n, d = n - centre[0], d - centre[1]
    starts = [(alpha, beta) for alpha in _GRID for beta in _GRID]
    surface = Surface(method, *_fit(n, d, y, method, starts), *centre, cost)
    fitted = surface.loss(np.exp(n + centre[0]), np.exp(d + centre[1]))
    freedom = len(y) - 5
    surface.sigma = float(np.sqrt(np.sum((y - fitted) ** 2) / freedom))
    surface.r2 = 1 - float(np.sum((y - fitted) ** 2) / np.sum((y - y.mean()) ** 2))
    error = np.log(y / fitted) if method == "huber" else y - fitted
    error = (error - error.mean()) * (len(y) / freedom) ** 0.5
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        drawn = rng.choice(error, len(y))
        again = fitted * np.exp(drawn) if method == "huber" else fitted + drawn
        found = _fit(n, d, again, method, [(surface.alpha, surface.beta)])
        surface.draws.append(Surface(method, *found, *centre, cost))
    return surface


Found = tuple[float, float, float, float, float]  # floor, a, b, alpha, beta


def _fit(n: Array, d: Array, y: Array, method: Method, starts: list[tuple[float, float]]) -> Found:
    """Variable projection from the best of the starts; with `huber`, L-BFGS from that and, if there are several, from
    the other starts."""
    best = min(starts, key=lambda start: _project(n, d, y, *start)[1])
    found = minimize(
        lambda logs: _project(n, d, y, *np.exp(logs))[1],
        np.log(best),
        method="Nelder-Mead",
        bounds=[tuple(np.log(EXPONENTS))] * 2,
        options={"xatol": 1e-4, "fatol": 1e-12, "maxiter": 400},
    )
    alpha, beta = np.exp(found.x)
    (floor, a, b), _ = _project(n, d, y, alpha, beta)
    if method == "projection":
        return float(floor), float(a), float(b), float(alpha), float(beta)
    others = starts[:: max(1, len(starts) // 12)] if len(starts) > 1 else []
    tried = [_huber(n, d, y, *start) for start in [(alpha, beta), *others]]
    return min(tried, key=lambda one: one[1])[0]


def _project(n: Array, d: Array, y: Array, alpha: float, beta: float) -> tuple[Array, float]:
    """The best floor, a and b, none negative, and the residuals' norm."""
    return nnls(np.stack([np.ones_like(y), np.exp(-alpha * n), np.exp(-beta * d)], 1), y)


def _huber(n: Array, d: Array, y: Array, alpha: float, beta: float) -> tuple[Found, float]:
    """L-BFGS over the logs of floor, a and b, and over alpha and beta, from the projection at a start."""
    coefficients, _ = _project(n, d, y, alpha, beta)
    start = [*np.log(np.maximum(coefficients, 1e-3 * y.mean())), alpha, beta]
    target = np.log(y)

    def objective(values: Array) -> tuple[float, Array]:
        floor, a, b, alpha, beta = values
        terms = np.exp(np.stack([np.full_like(n, floor), a - alpha * n, b - beta * d]))
        total = terms.sum(0)
        error = np.log(total) - target
        small = np.abs(error) <= HUBER
        # Divided by HUBER^2: at its own scale L-BFGS would take the first step for the last one.
        value = np.where(small, 0.5 * error**2, HUBER * (np.abs(error) - 0.5 * HUBER)).sum() / HUBER**2
        slope = np.clip(error, -HUBER, HUBER) / HUBER**2
        shares = terms / total
        of_floor, of_a, of_b = (shares * slope).sum(1)
        return value, np.array([of_floor, of_a, of_b, -(shares[1] * slope * n).sum(), -(shares[2] * slope * d).sum()])

    bounds = [(None, None)] * 3 + [EXPONENTS] * 2
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 1000})
    floor, a, b, alpha, beta = map(float, found.x)
    return (float(np.exp(floor)), float(np.exp(a)), float(np.exp(b)), alpha, beta), float(found.fun)
