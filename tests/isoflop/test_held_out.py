import numpy as np
import pytest

from megatron_soda.errors import SodaError
from megatron_soda.isoflop import held_out
from megatron_soda.isoflop.fit import fit_study
from megatron_soda.isoflop.results import Result, Results
from tests.isoflop.synthetic import on_surface, paper_points


@pytest.fixture(scope="module")
def study() -> Results:
    """On a surface without noise; with three seeds at one point, of known spread."""
    rows = on_surface(paper_points(), 0.35, 0.3, 1.1)
    one = rows[0]
    seeds = [
        Result(one.run, one.budget, one.flops, one.params, one.tokens, str(seed), one.loss + more, {})
        for seed, more in enumerate((-0.01, 0.01), 1)
    ]
    return Results("r.csv", "loss", [*rows, *seeds], [])


def test_what_lies_on_the_surface_is_predicted(study: Results) -> None:
    kept, above = held_out.split(study, 1e20)
    assert {row.budget for row in above} == {row.budget for row in study.rows if row.budget > 1e20}
    assert len(kept.rows) + len(above) == len(study.rows)
    found = held_out.compare(fit_study(kept, draws=5), above)
    assert [run["loss"] for run in found["runs"]] == [
        row.loss for row in sorted(above, key=lambda row: (row.budget, row.params))
    ]
    for run in found["runs"]:
        assert run["approach 3, projection"] == pytest.approx(run["loss"], abs=2e-3)
    # A run that is better than its surface shows by how much.
    worst = max(above, key=lambda row: row.loss)
    better = [row if row is not worst else Result(*_values(row, row.loss - 1), {}) for row in above]
    found = held_out.compare(fit_study(kept, draws=5), better)
    errors = [run["approach 3, projection"] - run["loss"] for run in found["runs"]]
    assert max(errors) == pytest.approx(1, abs=2e-3)
    deviation = found["seed_deviation"]
    assert deviation == pytest.approx(0.01)
    said = "\n".join(held_out.to_lines(found))
    assert f"at most, {max(errors) / deviation:.1f} standard deviations" in said


def _values(row: Result, loss: float) -> tuple:
    return row.run, row.budget, row.flops, row.params, row.tokens, row.seed, loss


def test_the_deviation_between_seeds_is_pooled() -> None:
    rng = np.random.default_rng(0)
    losses = [rng.normal(size=3), rng.normal(size=2), rng.normal(size=1)]
    rows = [
        Result("r", 1e18, 1e18, 1e6 * (n + 1), 1e9, str(seed), float(loss), {})
        for n, some in enumerate(losses)
        for seed, loss in enumerate(some)
    ]
    expected = np.sqrt((2 * losses[0].var(ddof=1) + losses[1].var(ddof=1)) / 3)
    assert held_out.seed_deviation(rows) == pytest.approx(expected)
    assert held_out.seed_deviation(rows[-1:]) is None


@pytest.mark.parametrize("up_to", [1e15, 1e30])
def test_both_sides_must_have_results(study: Results, up_to: float) -> None:
    with pytest.raises(SodaError, match="on both sides of it"):
        held_out.split(study, up_to)
