"""Known scaling laws are recovered from made-up results; what cannot be fitted is said."""

import csv
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import linregress

from megatron_soda import cli
from megatron_soda.errors import SodaError
from megatron_soda.isoflop.fit import compare_model, fit_study, predict, to_lines
from megatron_soda.isoflop.parabola import fit_parabolas
from megatron_soda.isoflop.results import Result, Results, read_results
from megatron_soda.isoflop.surface import Method, fit_cost, fit_surface
from tests.isoflop.synthetic import BEST, POWER, A, D, losses, on_surface, paper_points, parabolic, result, searched

ALPHA, BETA = 0.34, 0.28
METHODS: tuple[Method, ...] = ("projection", "huber")


@pytest.fixture(scope="module")
def exact() -> list[Result]:
    """The paper's runs with the losses of a known surface."""
    return on_surface(paper_points(), ALPHA, BETA, POWER)


def noisy(rows: list[Result], sigma: float, seed: int = 0) -> list[Result]:
    rng = np.random.default_rng(seed)
    return [replace(row, loss=row.loss + sigma * rng.standard_normal()) for row in rows]


def results(rows: list[Result]) -> Results:
    return Results("made up", "loss", rows, [])


# ---- approach 2


def test_parabolas_recover_the_papers_exponents():
    rows = parabolic(np.random.default_rng(0), 0.0)
    for of, exponent, best in (("params", A, BEST[0]), ("tokens", D, BEST[1])):
        found = fit_parabolas(rows, of)
        assert found.line is not None
        assert found.line.exponent == pytest.approx(exponent, abs=1e-9)
        assert found.line.at(BEST[2]) == pytest.approx(best, rel=1e-9)
        assert found.line.r2 == pytest.approx(1)
        assert [curve.optimum for curve in found.curves] == pytest.approx(
            [best * (curve.budget / BEST[2]) ** exponent for curve in found.curves]
        )
        assert found.curves[0].lowest == pytest.approx(3.0 * (3e18 / BEST[2]) ** -0.03)


def test_intervals_cover_the_truth():
    """95 % intervals over 200 studies of 7 budgets x 8 sizes. Between 180 and 196 of 200 is 90 to 98 %."""
    hits = {"params": 0, "tokens": 0}
    at_best = 0
    for seed in range(200):
        rows = parabolic(np.random.default_rng(seed), 0.005)
        for of, truth in (("params", A), ("tokens", D)):
            line = fit_parabolas(rows, of).line
            assert line is not None
            low, high = line.interval() or (0, 0)
            hits[of] += low <= truth <= high
            low, high = line.interval_at(BEST[2]) or (0, 0)
            at_best += of == "params" and low <= BEST[0] <= high
    assert 180 <= hits["params"] <= 196
    assert 180 <= hits["tokens"] <= 196
    assert 180 <= at_best <= 196


def test_approach_2_is_biased_without_noise():
    """On the paper's runs, the exponents of an exact surface are missed, and the fit says by how much."""
    exact = on_surface(paper_points(), 0.5, 0.2, POWER)
    fit = fit_study(results(exact), draws=0)
    low, high = (searched(losses(0.5, 0.2, POWER), flops) for flops in (3e18, 3e20))
    truth = np.log(np.divide(high, low)) / np.log(100)
    assert fit.params.line is not None
    assert fit.tokens.line is not None
    assert fit.bias is not None
    assert fit.surfaces["projection"].exponents == pytest.approx(truth, abs=1e-4)
    found = fit.params.line.exponent - truth[0], fit.tokens.line.exponent - truth[1]
    assert found[0] > 0.01
    assert found[1] < -0.005
    assert fit.bias == pytest.approx(found, abs=1e-3)
    assert any(f"{fit.bias[0]:+.4f} and {fit.bias[1]:+.4f}" in line for line in to_lines(fit))


def test_minima_that_are_not_there_are_not_used():
    rows = parabolic(np.random.default_rng(0), 0.0)
    rows[3e18] = rows[3e18][4:]  # right of the minimum
    rows[9e18] = rows[9e18][:4]  # left of it
    rows[1.8e19] = [replace(row, loss=6 - row.loss) for row in rows[1.8e19]]  # upside down: its top is no optimum
    rows[3e19] = rows[3e19][3:5]
    found = fit_parabolas(rows, "params")
    problems = [curve.problem for curve in found.curves]
    assert "beyond the smallest model" in problems[0]
    assert "beyond the largest model" in problems[1]
    assert "no minimum" in problems[2]
    assert "2 sizes, and a parabola needs 3" in problems[3]
    assert problems[4:] == ["", "", ""]
    assert found.line is not None
    assert found.line.exponent == pytest.approx(A, abs=1e-9)
    fit = fit_study(results([row for of in rows.values() for row in of]), draws=0)
    for budget in ("3e+18", "9e+18", "1.8e+19", "3e+19"):
        assert any(note.startswith(f"budget {budget}, parameters: ") for note in fit.notes)
        (line,) = (line for line in to_lines(fit) if line.split()[:1] == [budget])
        assert line.split()[2:] == ["-", "-", "-"]


def test_noise_that_only_shows_where_there_is_no_minimum():
    """Two budgets whose parabolas go through all three runs, and one of four runs whose minimum is not bracketed."""
    size = {1e18: 1e8, 1e19: 3e8}
    rows = {
        budget: [result(budget, best * times, 1e10 / times, 3 + np.log(times) ** 2) for times in (0.5, 1, 2.1)]
        for budget, best in size.items()
    }
    rows[1e20] = [result(1e20, 1e9 * x, 1e11 / x, 2 + x / 10 + e) for x, e in ((1, 0), (2, 0.01), (3, -0.01), (4, 0))]
    found = fit_parabolas(rows, "params")
    assert [bool(curve.problem) for curve in found.curves] == [False, False, True]
    assert found.line is not None
    assert found.sigma is not None
    low, high = found.line.interval() or (0, 0)
    assert low < found.line.exponent < high


# ---- approach 3


@pytest.mark.parametrize("method", METHODS)
def test_a_surface_is_recovered(exact, method):
    found = fit_surface(exact, method, draws=0)
    assert (found.alpha, found.beta) == pytest.approx((ALPHA, BETA), abs=1e-3)
    assert found.floor == pytest.approx(1.7, abs=2e-3)
    assert float(found.a * np.exp(found.alpha * found.mean_n)) == pytest.approx(400, rel=0.02)
    assert found.sigma < 1e-4
    for flops in (3e18, 9e19, 3e20):
        assert found.optimum(flops) == pytest.approx(searched(losses(ALPHA, BETA, POWER), flops), rel=2e-3)


def test_exponents_where_costs_are_a_power_of_size():
    """Then they are those of the formula."""
    points = [
        (row.flops, row.params, row.tokens) for of in parabolic(np.random.default_rng(0), 0).values() for row in of
    ]
    found = fit_surface(on_surface(points, ALPHA, BETA, POWER), "projection", draws=0)
    total = ALPHA + POWER * BETA
    assert found.exponents == pytest.approx((BETA / total, ALPHA / total), abs=1e-6)
    assert found.optimum(BEST[2]) == pytest.approx(BEST[:2], rel=1e-5)
    assert found.cost.power(np.log(1e12)) == pytest.approx(POWER)


def test_the_optimum_is_the_lowest_point_at_its_cost(exact):
    """Against a search, also far beyond the runs."""
    found = fit_surface(exact, "projection", draws=0)
    for flops in (1e17, 1e20, 1.3e22):

        def loss(log_n: float, flops: float = flops) -> float:
            tokens = flops / found.cost.of(np.exp(log_n), 1.0)
            return float(found.loss(np.exp(log_n), tokens))

        lowest = minimize_scalar(loss, bounds=(np.log(1e6), np.log(1e12)), method="bounded", options={"xatol": 1e-9})
        params, tokens = found.optimum(flops)
        assert params == pytest.approx(np.exp(lowest.x), rel=1e-3)
        assert found.cost.of(params, tokens) == pytest.approx(flops)


@pytest.mark.parametrize("method", METHODS)
def test_a_surface_from_noisy_runs(exact, method):
    truth = fit_surface(exact, "projection", draws=0).exponents[0]
    found = fit_surface(noisy(exact, 0.005), method, draws=40)
    low, high = found.interval(lambda one: one.exponents[0]) or (0, 0)
    assert low < truth < high
    assert high - low < 0.1
    assert found.sigma == pytest.approx(0.005, rel=0.25)


def test_huber_ignores_an_outlier(exact):
    spoiled = [replace(row, loss=row.loss * 1.2) if i == 6 else row for i, row in enumerate(exact)]
    found = {method: fit_surface(spoiled, method, draws=0).exponents[0] for method in METHODS}
    truth = fit_surface(exact, "projection", draws=0).exponents[0]
    assert found["huber"] == pytest.approx(truth, abs=0.002)
    assert abs(found["projection"] - truth) > 0.01


def test_a_loss_that_does_not_fall_with_size_has_no_optimum(exact):
    flat = [replace(row, loss=2 + 400 * row.tokens**-0.28) for row in exact]
    found = fit_surface(flat, "projection", draws=0)
    assert found.problem == "the loss does not fall with the number of parameters"


def test_an_optimum_at_absurd_sizes_is_none(exact):
    """Of a draw of the bootstrap: with small exponents it may lie beyond any number."""
    found = fit_surface(exact, "projection", draws=0)
    absurd = replace(found, a=found.b * 1e4, alpha=0.05, beta=0.05)
    assert absurd.problem == "its optimum is at absurd sizes"
    assert replace(found, draws=[absurd, *[found] * 9]).interval(lambda one: one.exponents[0]) is not None
    assert found.problem == ""


def test_an_optimum_far_beyond_the_runs(exact):
    """At any cost: where the two terms' slopes along the curve of equal cost cancel."""
    found = fit_surface(exact, "projection", draws=0)
    params, tokens = found.optimum(1e90)
    a, b = (found.loss(params * by, tokens * by ** -found.cost.power(np.log(params))) for by in (0.999, 1.001))
    assert min(a, b) >= found.loss(params, tokens)
    assert params > np.exp(found.cost.sizes[1] + 31)


def test_costs_are_those_of_the_runs():
    rows = [row for of in parabolic(np.random.default_rng(0), 0.0).values() for row in of]
    cost = fit_cost(rows)
    assert cost.power(np.log(BEST[0])) == pytest.approx(POWER)
    assert cost.worst < 1e-9
    assert cost.of(BEST[0], BEST[1]) == pytest.approx(BEST[2])


# ---- predictions


def test_predictions_and_models(exact):
    fit = fit_study(results(exact), draws=5)
    assert fit.params.line is not None
    surface = fit.surfaces["projection"]
    found = predict(fit, 1.3e22)
    assert found["approach 2"]["params"][0] == fit.params.line.at(1.3e22)
    lowest = [(curve.cost, curve.lowest) for curve in fit.params.curves if not curve.problem]
    slope, start = linregress(np.log([c for c, _ in lowest]), np.log([loss for _, loss in lowest]))[:2]
    assert found["approach 2"]["loss"] == (pytest.approx(np.exp(start + slope * np.log(1.3e22))), None)
    params, tokens = (found["approach 3, projection"][name][0] for name in ("params", "tokens"))
    at_best = compare_model(fit, params, tokens)
    assert at_best["flops"] == pytest.approx(1.3e22)
    assert at_best["approach 3, projection"]["excess"][0] == pytest.approx(0, abs=1e-9)
    away = compare_model(fit, 4.374e9, 500e9)
    expected = surface.loss(4.374e9, 500e9) - surface.loss(*surface.optimum(away["flops"]))
    assert away["approach 3, projection"]["excess"][0] == pytest.approx(float(expected))
    assert expected > 0


# ---- input


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def table(count: int = 3) -> list[dict]:
    """Rows of `count` budgets, as a CSV holds them."""
    budgets = list(parabolic(np.random.default_rng(1), 0.001, 5).values())[:count]
    return [
        {"run": f"{row.budget:g}-{i}", "study": "one", "flops": row.flops, "params_total": row.params,
         "tokens": row.tokens, "seed": 1, "loss": row.loss, "nll_text": 2 * row.loss, "nll_acoustic_1": row.loss,
         "nll_acoustic_2": row.loss + 2}
        for rows in budgets for i, row in enumerate(rows)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("measure", "factor", "offset"),
    [
        ("loss", 1, 0),
        ("text", 2, 0),
        ("acoustic", 1, 1),
        ("acoustic_2", 1, 2),
        ("text:1,acoustic:3", 1.25, 0.75),
        ("nll_text", 2, 0),
    ],
)
def test_measures(tmp_path, measure, factor, offset):
    path = write(tmp_path / "r.csv", table())
    plain, found = read_results(path), read_results(path, measure)
    assert [row.loss for row in found.rows] == pytest.approx([row.loss * factor + offset for row in plain.rows])


def test_csv_and_json_lines_are_alike(tmp_path):
    rows = table()
    path = tmp_path / "r.jsonl"
    nested = [{**{k: v for k, v in row.items() if k != "nll_text"}, "nll": {"text": row["nll_text"]}} for row in rows]
    path.write_text("\n".join(json.dumps(row) for row in nested))
    assert read_results(path, "text").rows == read_results(write(tmp_path / "r.csv", rows), "text").rows


@pytest.mark.parametrize(
    ("change", "left", "note"),
    [
        (lambda rows: rows[2].update(loss="nan"), 14, "line 4 (3e+18-2): loss is 'nan'"),
        (lambda rows: rows[2].update(loss=""), 14, "line 4 (3e+18-2): loss is ''"),
        (lambda rows: rows[2].update(tokens=-5), 14, "line 4 (3e+18-2): tokens is '-5'"),
        (lambda rows: rows[2].update(budget="big"), 14, "line 4 (3e+18-2): budget is 'big'"),
        (lambda rows: rows.append(dict(rows[0])), 15, "line 17 (3e+18-0): a second row of 3e+18-0; left out"),
        (lambda rows: rows.append({**rows[0], "loss": 9}), 15, "with another loss (9, not"),
        (lambda rows: rows[2].update(study="two"), 14, "rows of other studies are left out: 1 of two"),
        (lambda rows: rows.__delitem__(slice(2, 5)), 12, "budget 3e+18, parameters: 2 sizes"),
    ],
)
def test_bad_rows_are_named_and_the_rest_is_fitted(tmp_path, change, left, note):
    rows = table()
    change(rows)
    fit = fit_study(read_results(write(tmp_path / "r.csv", rows)), draws=0)
    assert len(fit.results.rows) == left
    assert any(note in one for one in fit.notes)
    assert fit.params.line is not None


def test_missing_runs_and_other_studies(tmp_path):
    rows = table()
    path = write(tmp_path / "r.csv", rows[1:])
    found = read_results(path, planned=[row["run"] for row in rows], study="one")
    assert found.notes == ["run 3e+18-0: no usable result; the fit goes without it"]
    with pytest.raises(SodaError, match="rows of other studies are left out: 14 of one"):
        read_results(path, study="two")


def test_seeds_are_no_duplicates(tmp_path):
    rows = [{**row, "seed": seed, "loss": row["loss"] + seed / 1000} for row in table() for seed in (1, 2, 3)]
    found = read_results(write(tmp_path / "r.csv", rows))
    assert len(found.rows) == 45
    assert not found.notes
    without = [{key: value for key, value in row.items() if key != "seed"} for row in rows]
    assert len(read_results(write(tmp_path / "s.csv", without)).rows) == 45


@pytest.mark.parametrize(
    ("text", "measure", "message"),
    [
        ("a,b\n1,2\n", "loss", "no column flops, params_total, tokens. It has: a, b. A"),
        ("a,b\n1,2,3\n", "loss", "It has: a, b. A"),
        ("", "loss", "holds no results"),
        ("flops,params_total,tokens,loss\n1,1,1,nan\n", "loss", "no usable result"),
        ("flops,params_total,tokens,nll_text\n1,1,1,1\n", "txt", "Did you mean text?"),
        ("flops,params_total,tokens,loss\n1,1,1,1\n", "loss:x", "'x' is not a weight"),
        ("flops,params_total,tokens,loss\n1,1,1,1\n", "loss", "no fit is possible"),
    ],
)
def test_what_cannot_be_fitted(tmp_path, text, measure, message):
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(SodaError) as error:
        fit_study(read_results(tmp_path / "r.csv", measure))
    assert message in str(error.value)


def test_the_command(monkeypatch, capsys, tmp_path):
    path = write(tmp_path / "r.csv", table(2))
    out = tmp_path / "fit.json"

    def soda(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["soda", "isoflop", "fit", *arguments])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    monkeypatch.setattr("megatron_soda.isoflop.fit.fit_study", partial(fit_study, draws=5))
    assert soda(str(path), "--budget", "1e21", "--model", "1e9:1e10", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "optimum at 1e+21 FLOPs" in said
    assert "warning: approach 2, parameters: 2 minima" in said
    assert json.loads(out.read_text())["approach 2"]["params"]["exponent"] == pytest.approx(A, abs=0.05)
    for arguments, message in (
        ((str(path), "--budget", "big"), "--budget big: write it as 1e21"),
        ((str(path), "--model", "1e9"), "--model 1e9: write it as 4.374e9:500e9"),
        ((str(tmp_path / "no.csv"),), "no.csv: no such file"),
        ((str(tmp_path / "no.txt"),), "results are a .csv or .jsonl file"),
    ):
        assert soda(*arguments) == 2
        assert message in capsys.readouterr().err
