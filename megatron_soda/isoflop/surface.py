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
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import bisect, minimize, nnls

from .results import Result

Array = NDArray[np.float64]
Method = Literal["projection", "huber"]
DRAWS = 200
HUBER = 1e-3  # in log loss, as in Hoffmann et al.
EXPONENTS = (0.01, 3.0)  # searched
_GRID = np.geomspace(0.05, 1.6, 9)
_NOTHING = 1e-9  # of the floor: a term this small is a rounding error
FEWEST = 6  # runs: one more than parameters
_FAR = 30.0  # in log N beyond the runs' sizes: a factor of 1e13


@dataclass
class Cost:
    """FLOPs of a token by the number of parameters N, as the runs have it: the log is a parabola in log N, and goes on
    straight beyond the runs' sizes. (6ND would be a line of slope 1. In the paper's grid the slope falls from 1.3 to 1:
    attention over the whole window adds much to small models, and little to large ones.)"""

    coefficients: Array  # of (log N - centre)^2, log N - centre, 1
    centre: float
    sizes: tuple[float, float]  # log N of the smallest and the largest run
    budgets: tuple[float, float]  # FLOPs of the cheapest and the dearest run
    worst: float  # largest relative error over the runs

    def log_per_token(self, n: float) -> float:
        """n: log N."""
        inside = min(max(n, self.sizes[0]), self.sizes[1])
        return float(np.polyval(self.coefficients, inside - self.centre)) + self.power(n) * (n - inside)

    def power(self, n: float) -> float:
        """The slope of log FLOPs in log N."""
        a, b, _ = self.coefficients
        inside = min(max(n, self.sizes[0]), self.sizes[1])
        return float(2 * a * (inside - self.centre) + b)

    def of(self, params: float, tokens: float) -> float:
        return float(np.exp(self.log_per_token(float(np.log(params)))) * tokens)


def fit_cost(rows: Sequence[Result]) -> Cost:
    n = np.log([row.params for row in rows])
    per_token = np.log([row.flops / row.tokens for row in rows])
    centre, different = float(n.mean()), len(set(n.round(6)))
    degree = min(2, different - 1)
    coefficients = np.polyfit(n - centre, per_token, degree) if degree else np.array([1.0, per_token.mean()])
    coefficients = np.concatenate([np.zeros(3 - len(coefficients)), coefficients])
    error = np.exp(np.polyval(coefficients, n - centre) - per_token) - 1
    flops = [row.flops for row in rows]
    sizes = (float(n.min()), float(n.max()))
    return Cost(coefficients, centre, sizes, (min(flops), max(flops)), float(np.abs(error).max()))


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
        if min(self.cost.power(end) for end in self.cost.sizes) <= 0:
            return "larger models cost no more per token"
        for name, term in (("parameters", self.a), ("tokens", self.b)):
            if term < _NOTHING * self.floor or term == 0:
                return f"the loss does not fall with the number of {name}"
        ends = [
            f"{name} is at the end of its range ({value:.3g})"
            for name, value in (("alpha", self.alpha), ("beta", self.beta))
            if not EXPONENTS[0] * 1.01 < value < EXPONENTS[1] * 0.99
        ]
        if ends:
            return " and ".join(ends)
        far = any(
            self._difference(flops, n) * sign < 0 for flops in self.cost.budgets for n, sign in self._bounds(_FAR)
        )
        return "its optimum is at absurd sizes" if far else ""

    @property
    def exponents(self) -> tuple[float, float]:
        """Of the optimal N and D with the cost, over the budgets of the runs. With costs N^k D they are beta / (alpha +
        k beta) and alpha / (alpha + k beta) everywhere."""
        low, high = self.cost.budgets
        if high < 2 * low:  # one budget
            low, high = low / 2, high * 2
        slopes = np.log(self.optimum(high)) - np.log(self.optimum(low))
        n, d = slopes / np.log(high / low)
        return float(n), float(d)

    def loss(self, params: float | Array, tokens: float | Array) -> Array:
        n, d = np.log(params) - self.mean_n, np.log(tokens) - self.mean_d
        return self.floor + self.a * np.exp(-self.alpha * n) + self.b * np.exp(-self.beta * d)

    def optimum(self, flops: float) -> tuple[float, float]:
        """The N and D of lowest loss at a cost: where the derivatives of the two terms along the curve of equal cost
        cancel, alpha a exp(..) = k beta b exp(..). Found by bisection: the difference of their logs falls with N."""
        far = _FAR
        while any(self._difference(flops, n) * sign < 0 for n, sign in self._bounds(far)):
            far *= 2
        (low, _), (high, _) = self._bounds(far)
        found: Any = bisect(lambda n: self._difference(flops, n), low, high, xtol=1e-10)
        n = float(found)
        return float(np.exp(n)), float(np.exp(np.log(flops) - self.cost.log_per_token(n)))

    def _difference(self, flops: float, n: float) -> float:
        d = float(np.log(flops)) - self.cost.log_per_token(n)
        fixed = float(np.log(self.alpha * self.a / (self.beta * self.b))) - float(np.log(self.cost.power(n)))
        return fixed - self.alpha * (n - self.mean_n) + self.beta * (d - self.mean_d)

    def _bounds(self, far: float) -> tuple[tuple[float, int], tuple[float, int]]:
        """log N that far from the runs' sizes, with the sign of the difference there if the optimum lies between."""
        return (self.cost.sizes[0] - far, 1), (self.cost.sizes[1] + far, -1)

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
