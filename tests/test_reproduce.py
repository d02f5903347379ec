"""The paper's numbers: what the recipes say is what the paper says, every command exists, and the page is current."""

import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from megatron_soda import reproduce
from megatron_soda.cli import app
from megatron_soda.commands.reproduce import to_lines, to_markdown
from megatron_soda.config import load_recipe
from megatron_soda.config.model import PRESETS
from megatron_soda.errors import SodaError
from megatron_soda.reproduce import Ours, Row, load_paper, rows, trained

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def every() -> list[Row]:
    return [row for section in load_paper().sections for row in rows(section)]


def test_what_follows_from_the_recipes_is_what_the_paper_says(every):
    computed = [row for row in every if row.ours and "(" not in row.ours]
    assert len(computed) > 80
    for row in computed:
        if "~" not in row.paper:
            assert row.ours == row.paper, row.what
        for ours, paper in zip(row.ours.split(" to "), row.paper.split(" to "), strict=True):
            assert float(ours.replace(",", "")) == pytest.approx(float(paper.strip("~").replace(",", "")), rel=0.02)


def test_gpu_hours_are_those_of_the_measured_speeds():
    """Tokens over the tokens a second of docs/gpu_results.md."""
    for name, speed in {"soda-135m": 358_877, "soda-600m": 95_672, "soda-1.7b": 44_756}.items():
        assert trained(name).hours == pytest.approx(500e9 / speed / 3600, rel=5e-3)
    study = trained("isoflop")
    budgets = {3e18: 7, 9e18: 12, 1.8e19: 14, 3e19: 7, 9e19: 8, 1.8e20: 8, 3e20: 10}
    assert study.hours == pytest.approx(sum(b * n for b, n in budgets.items()) / (0.4 * 989e12 * 3600), rel=2e-3)


def test_hashes_are_of_what_is_trained():
    assert trained("sweep-298m").hash != trained("later-298m").hash
    recipe = load_recipe(ROOT / "examples/pretrain/135m.yaml", ["run=elsewhere"])
    assert trained("soda-135m").hash == reproduce.recipe_hash(recipe)
    assert len({trained(name).hash for name in load_paper().runs}) == len(load_paper().runs)


def test_every_number_has_a_command_or_a_reason(every):
    paper = load_paper()
    for row in every:
        assert row.paper, row.what
        assert row.command or row.not_supported, row.what
        assert "{" not in re.sub(r'"[^"]*"', "", row.command), row.command
        assert set(row.data) <= set(paper.data)
    used = {row.run for row in every}
    assert used - {""} == set(paper.runs)
    for name in paper.runs:
        assert set(trained(name).data) <= set(paper.data)


def test_every_command_is_one(every):
    given = {row.command for row in every if not row.not_supported}
    for command in given | {trained(name).command for name in load_paper().runs}:
        for part in command.split(" && "):
            parse(shlex.split(part))
    for row in every:
        assert not row.not_supported.startswith("this version has no suite"), row.command


def parse(words: list[str]) -> None:
    """By the commands' own parsers and the recipes' own checks. Fails for anything that they would refuse."""
    if words[0] == "bash":
        assert words[1] == "examples/pretrain/launch.sh"
        check_recipe(words[2], words[3:])
    elif words[0] == "soda":
        try:
            overrides = parse_soda(words[1:])
        except Exception as error:
            if getattr(error, "exit_code", 0) == 2:  # the parser refuses it
                raise AssertionError(f"{words}: {error}") from None
            raise
        if words[1] == "isoflop":
            assert (ROOT / words[3]).is_file()
        else:
            check_recipe(words[2], overrides)
    else:
        assert words[:2] == ["lm_eval", "run"]


@cache
def commands() -> Any:
    return typer.main.get_command(app)


def parse_soda(arguments: list[str]) -> list[str]:
    context: Any = commands().make_context("soda", arguments)
    while hasattr(context.command, "resolve_command"):
        name, command, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
    return context.params.get("overrides") or []


def check_recipe(target: str, overrides: list[str]) -> None:
    is_ours = target.startswith("examples/")
    assert is_ours or target.startswith(("runs/", "recipes/")) or target in PRESETS
    load(target if is_ours else "", tuple(overrides))


@cache
def load(recipe: str, overrides: tuple[str, ...]) -> None:
    load_recipe(ROOT / recipe if recipe else None, overrides)


@pytest.mark.parametrize(
    "command",
    [
        "soda evaluat runs/a",
        "soda isoflop plan",
        "soda isoflop fit examples/isoflop/none.yaml",
        "soda evaluate runs/a suite=[nil]",
        "soda params examples/pretrain/1.8b.yaml",
        "bash examples/pretrain/launch.sh examples/pretrain/4b.yaml training.stepz=1",
        "python train.py",
    ],
)
def test_a_wrong_command_is_found(command):
    with pytest.raises((AssertionError, SodaError)):
        parse(shlex.split(command))


def test_the_page_is_current():
    """To write it anew: soda reproduce paper --markdown > docs/reproduce.md"""
    assert (ROOT / "docs" / "reproduce.md").read_text() == to_markdown()


def test_the_terminal_shows_every_number(every):
    lines = "\n".join(to_lines()).splitlines()
    for row in every:
        assert any(line.startswith(row.what) and row.paper in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith(" ")) < 200


def test_a_measured_value_says_how():
    number = next(n for section in load_paper().sections for n in section.numbers if "soda-4b" in n.of)
    measured = Ours(value="5.1", date="2027-01-02", commit="0123abc", how="one seed")
    changed = reproduce.Number(**{**number.__dict__, "computed": "", "ours": {"soda-4b": measured}})
    found = {row.run: row.ours for row in rows(reproduce.Section("any", [changed]))}
    assert found["soda-4b"] == "5.1 (2027-01-02, 0123abc: one seed)"
    assert found["soda-135m"] == ""
    with pytest.raises(ValueError, match="commit"):
        Ours(value="5.1", date="2027-01-02", commit="unknown", how="one seed")


def test_outside_a_checkout(monkeypatch, tmp_path):
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    with pytest.raises(SodaError, match="from a checkout"):
        load_paper.__wrapped__()
