"""Figures and the page of a study: what they hold, and that they need nothing else."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.errors import SodaError
from megatron_soda.isoflop.fit import Fit, fit_study
from megatron_soda.isoflop.plot import plot_study, rank_correlation, read_scores
from megatron_soda.isoflop.results import Results
from tests.isoflop.synthetic import parabolic
from tests.report.test_report import Page


@pytest.fixture(scope="module")
def fit() -> Fit:
    budgets = parabolic(np.random.default_rng(0), 0.002, 7)
    budgets[3e18] = budgets[3e18][:2]  # no parabola
    budgets[9e18] = budgets[9e18][4:]  # one without a minimum
    rows = [row for of in budgets.values() for row in of]
    named = [replace(row, run=f"run-{i}") for i, row in enumerate(rows)]
    return fit_study(Results("runs/my study.csv", "loss", named, ["line 9: was left out"]), draws=10)


def test_figures_and_page(fit, tmp_path):
    lines = [f"run-{i},{(i * 7) % 11},{-i}" for i in range(8)]
    (tmp_path / "scores.csv").write_text("\n".join(["run,wer,sim", *lines, "other,5,5"]))
    made = plot_study(fit, tmp_path / "plots", read_scores(tmp_path / "scores.csv", fit))
    names = ("curves", "optima", "residuals", "scores")
    assert {path.name for path in made} == {*(f"{n}.{s}" for n in names for s in ("pdf", "png")), "isoflop.html"}
    for path in made:
        start = {".pdf": b"%PDF", ".png": b"\x89PNG", ".html": b"<!doctype html>"}[path.suffix]
        assert path.read_bytes().startswith(start)
    html = (tmp_path / "plots" / "isoflop.html").read_text()
    page = Page(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert page.tags.count("svg") == 4
    assert [ref for ref in page.references if not ref[2].startswith(("data:", "#"))] == []
    assert not re.findall(r"(?:https?:|file:|//)[\w/.-]+", html)
    assert fit.params.line is not None
    low, high = fit.params.line.interval() or (0, 0)
    for shown in (
        f"{fit.params.line.exponent:.3f} [{low:.3f}, {high:.3f}]",
        "line 9: was left out",
        "run-7",
        "my study",
        "budget 3e+18, parameters: 2 sizes, and a parabola needs 3",
        "budget 9e+18, parameters: the minimum is not bracketed: it lies beyond the smallest model",
    ):
        assert shown in page.text
    assert "#010101" not in html  # the figures' ink is the page's


def test_rank_correlation(fit, tmp_path):
    """Against the formula for ranks without ties."""
    scores = {f"run-{i}": float((i * 7) % 11) for i in range(8)}
    loss = {row.run: row.loss for row in fit.results.rows}
    ranks = [np.argsort(np.argsort(values)) for values in ([loss[run] for run in scores], list(scores.values()))]
    expected = 1 - 6 * float(np.sum((ranks[0] - ranks[1]) ** 2)) / (8 * 63)
    assert rank_correlation(fit, scores) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "the column run"),
        ("run,wer\nrun-1,5\nrun-2,x\nrun-3,1\n", "no column has a score for 3 runs"),
        ("run,wer\nx,5\ny,5\nz,1\n", "whose runs are called run-0, run-1"),
    ],
)
def test_scores_that_cannot_be_used(fit, tmp_path: Path, text, message):
    (tmp_path / "scores.csv").write_text(text)
    with pytest.raises(SodaError, match=message):
        read_scores(tmp_path / "scores.csv", fit)
