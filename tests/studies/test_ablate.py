"""Ablations: from a file to runs, from runs to a table and a figure."""

import csv
import json
import math
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy.stats import ttest_ind

from data_prep import interleave
from megatron_soda.ablations.plan import Plan, make_plan, to_lines
from megatron_soda.ablations.plot import plot_table
from megatron_soda.ablations.study import load_ablation
from megatron_soda.ablations.table import read_table, to_csv
from megatron_soda.ablations.table import to_lines as table_lines
from megatron_soda.config import save_recipe
from megatron_soda.data.store import write_store
from megatron_soda.errors import SodaError
from megatron_soda.studies.load import load_plan
from megatron_soda.studies.records import recipe_hash, result_of, state_of
from megatron_soda.tokenizer import TextTokenizer
from tests.exported import MADE_BY, write_exported
from tests.forked import forked
from tests.helpers import small_recipe, write_data

ROOT = Path(__file__).resolve().parents[2]


def ablation(folder: Path, **changes: Any) -> Path:
    """Two weights of the semantic tokens, two seeds each."""
    write_data(folder / "data")
    save_recipe(small_recipe(folder / "x", folder / "data", "training.steps=3"), folder / "recipe.yaml")
    values: dict[str, Any] = {
        "recipe": "recipe.yaml",
        "name": "weights",
        "folder": str(folder / "study"),
        "seeds": [0, 1],
        "values": {"alike": None, "semantic 2": {"training": {"loss_weights": {"semantic": 2}}}},
        **changes,
    }
    path = folder / "ablation.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value != "gone"}, sort_keys=False))
    return path


def plan_of(path: Path) -> Plan:
    return make_plan(load_ablation(path))


def test_every_value_with_every_seed(tmp_path):
    plan = plan_of(ablation(tmp_path))
    assert [run.id for run in plan.runs] == ["alike-s0", "alike-s1", "semantic_2-s0", "semantic_2-s1"]
    recipes = [plan.recipe_of(run) for run in plan.runs]
    assert [recipe.seed for recipe in recipes] == [0, 1, 0, 1]
    assert [recipe.training.loss_weights for recipe in recipes] == [{}, {}, {"semantic": 2}, {"semantic": 2}]
    assert recipes[2].run == str(tmp_path / "study/runs/semantic_2-s0")
    run = plan.runs[0]
    assert run.tokens == 3 * recipes[0].training.global_batch_size * recipes[0].data.sequence_length
    assert to_lines(plan)[-1].startswith("4 runs")


def test_stores_are_named_by_their_folder(tmp_path):
    stores = {"speech": {}, "text": {"prepare": {"tokenizer": "store:speech/a.model", "text": ["store:speech/t.txt"]}}}
    values = {
        "5": {"data": {"path": "store:speech", "corpora": {"a": "store:speech/train", "b": "store:text/train"},
                       "mix": [{"shares": {"a": 0.95, "b": 0.05}}]}}
    }  # fmt: skip
    plan = plan_of(ablation(tmp_path, stores=stores, values=values))
    folder = str(tmp_path / "study" / "stores")
    recipe = plan.recipe_of(plan.runs[0])
    assert recipe.data.path == f"{folder}/speech/data"
    assert recipe.data.corpora == {"a": f"{folder}/speech/data/train", "b": f"{folder}/text/data/train"}
    assert recipe.data.mix[0].shares == {"a": 0.95, "b": 0.05}
    text = plan.store_of("text")
    assert (text.prepare.tokenizer, text.prepare.text) == (
        f"{folder}/speech/data/a.model",
        [f"{folder}/speech/data/t.txt"],
    )
    assert text.run == f"{folder}/text"


def test_a_branch_counts_its_own_tokens(tmp_path):
    legs = {"leg": {"training": {"steps": 10, "branch_from": "runs/a/checkpoints/step_00000004"}}}
    run = plan_of(ablation(tmp_path, values=legs)).runs[0]
    recipe = small_recipe(tmp_path, tmp_path)
    assert run.tokens == 6 * recipe.training.global_batch_size * recipe.data.sequence_length


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"vales": {}}, "unknown key vales. Did you mean values?"),
        ({"recipe": "gone"}, "a mapping with the keys recipe and values"),
        ({"values": {}}, "values"),
        ({"values": {"a": {"training": {"step": 3}}}}, "value a: .*unknown key training.step"),
        ({"values": {"a/b": {}}}, "values.a/b"),
        ({"values": {"a": {"data": {"path": "store:speech"}}}}, "no store speech; there are none"),
        ({"values": {"a b": {}, "a_b": {}}}, "a_b-s0 is listed twice"),
        ({"seeds": [1, 1]}, "alike-s1 is listed twice"),
        ({"evaluate": ["gian"]}, "no suite gian. Did you mean gain?"),
        ({"recipe": "other.yaml"}, "other.yaml"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, said):
    with pytest.raises(SodaError, match=said):
        plan_of(ablation(tmp_path, **changes))


def test_a_value_listed_twice_is_refused(tmp_path):
    path = ablation(tmp_path)
    path.write_text(path.read_text() + "  alike: {seed: 3}\n")
    line = len(path.read_text().splitlines())
    for load in (load_ablation, lambda path: load_plan(path, [])):
        with pytest.raises(SodaError, match=rf"ablation\.yaml: not YAML \(line {line}: alike is duplicated"):
            load(path)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.loss_weights={semantic: 3}", "training.loss_weights is what this study varies"),
        ("training.loss_weights.semantic=3", "training.loss_weights.semantic is what this study varies"),
        ("loss_weights={}", "training.loss_weights is what this study varies"),
        ("seed=7", "every run of a study has its own seed"),
        ("run=x", "every run of a study has its own run"),
    ],
)
def test_settings_do_not_undo_the_study(tmp_path, override, said):
    with pytest.raises(SodaError, match=said):
        make_plan(load_ablation(ablation(tmp_path)), [override])


def test_settings_apply_to_all_runs(tmp_path):
    plan = make_plan(load_ablation(ablation(tmp_path)), ["training.steps=7", "training.loss_weights.text=2"])
    recipes = [plan.recipe_of(run) for run in plan.runs]
    assert {recipe.training.steps for recipe in recipes} == {7}
    assert [recipe.seed for recipe in recipes] == [0, 1, 0, 1]
    assert len({recipe_hash(recipe) for recipe in recipes}) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_examples_are_planned(path):
    if path.stem.endswith("recipe"):
        pytest.skip("a recipe, not a study")
    plan = load_plan(path, [])
    assert plan.runs
    for run in plan.runs:
        plan.recipe_of(run)


# ---- results


def with_results(plan: Plan, rows: list[dict[str, Any]]) -> None:
    folder = Path(plan.study.folder)
    folder.mkdir(parents=True)
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(run: str, loss: float, **more: Any) -> dict[str, Any]:
    return {"run": run, "loss": loss, "nll": {"text": loss + 1, "acoustic_1": loss, "acoustic_2": loss + 2}, **more}


def test_the_table(tmp_path):
    plan = plan_of(ablation(tmp_path, seeds=[0, 1, 2]))
    alike, doubled = [3.0, 3.1, 3.3], [2.5, 2.7, 2.6]
    rows = [row(f"alike-s{i}", loss, gain_text=0.5) for i, loss in enumerate(alike)]
    rows += [row(f"semantic_2-s{i}", loss) for i, loss in enumerate(doubled)]
    with_results(plan, [*rows, row("another", 9.0)])
    table = read_table(plan)
    assert table.cells["loss"] == {"alike": alike, "semantic 2": doubled}
    assert table.mean("acoustic", "alike") == pytest.approx(statistics.fmean(alike) + 1)
    assert table.cells["gain_text"] == {"alike": [0.5, 0.5, 0.5]}
    assert table.deviation("loss", "alike") == pytest.approx(np.std(alike, ddof=1))
    lines = table_lines(table)
    line = next(line for line in lines if line.startswith("  semantic 2"))
    mean, deviation, seeds, difference, half = re.findall(r"[-+]?\d+\.?\d*", line.removeprefix("  semantic 2"))
    interval = ttest_ind(doubled, alike, equal_var=False).confidence_interval()
    assert (float(mean), int(seeds)) == (2.6, 3)
    assert float(deviation) == pytest.approx(0.1, abs=1e-4)
    assert float(difference) == pytest.approx(statistics.fmean(doubled) - statistics.fmean(alike), abs=1e-4)
    assert float(half) == pytest.approx((interval.high - interval.low) / 2, abs=1e-4)
    assert "loss,semantic 2,3,2.6,0.1" in to_csv(table)
    table.cells["WER corpus, authors"] = {"alike": [0.5]}
    assert list(csv.reader(to_csv(table).splitlines()))[-1] == ["WER corpus, authors", "alike", "1", "0.5", ""]
    assert [path.suffix for path in plot_table(table, tmp_path / "plots", "weights")] == [".pdf", ".png"]
    assert (tmp_path / "plots" / "ablation.pdf").read_bytes().startswith(b"%PDF")


def test_missing_results_are_named(tmp_path):
    plan = plan_of(ablation(tmp_path))
    with pytest.raises(SodaError, match="soda ablate run"):
        read_table(plan)
    with_results(plan, [row("alike-s0", 3.0)])
    table = read_table(plan)
    assert table.notes == [f"run {run.id}: no result" for run in plan.runs[1:]]
    assert math.isnan(table.deviation("loss", "alike"))
    assert "warning: run semantic_2-s0: no result" in table_lines(table)


def train_all(path: Path) -> list[dict[str, Any]]:
    from megatron_soda.studies import worker
    from megatron_soda.studies.records import collect

    plan = load_plan(path, [])
    status = worker.work(plan)
    return [{"status": status}, *collect(plan, [plan.recipe_of(run) for run in plan.runs])]


def test_runs_are_trained_and_evaluated(tmp_path):
    path = ablation(tmp_path, seeds=[3], evaluate=["nll"])
    shutil.rmtree(tmp_path / "data")
    made = write_exported(tmp_path / "exported")
    shutil.copytree(made.run / "data", tmp_path / "data")
    shutil.copy(made.folder / "text_tokenizer.model", tmp_path / "data")
    text = TextTokenizer(tmp_path / "data" / "text_tokenizer.model")
    spoken = [(text.encode(row["text"]), row["codes"]) for row in made.rows[:5]]
    for side in ("valid", "test"):
        write_store(tmp_path / "data" / side, [interleave.text_first(spoken, made.space)] * 3, made.space, **MADE_BY)
    status, *results = forked(train_all, path)
    assert status == {"status": 0}
    assert [(found["run"], found["value"]) for found in results] == [
        ("alike-s3", "alike"),
        ("semantic_2-s3", "semantic 2"),
    ]
    for found in results:
        nll = json.loads((tmp_path / "study/runs" / found["run"] / "eval.json").read_text())["nll"]
        assert nll, "the suite did not run"
        assert any(name.startswith("nll_") for name in found)
    assert results[0]["loss"] != results[1]["loss"]
    assert read_table(plan_of(path)).values == ["alike", "semantic 2"]

    # A suite that the study did not have before, and results of another step
    path.write_text(path.read_text().replace("- nll", "- nll\n- grammar"))
    plan = load_plan(path, [])
    recipes = [plan.recipe_of(run) for run in plan.runs]
    assert [state_of(plan, run, recipe).kind for run, recipe in zip(plan.runs, recipes, strict=True)] == ["stopped"] * 2
    assert result_of(plan, plan.runs[0], recipes[0]) is None
    path.write_text(path.read_text().replace("- grammar\n", ""))
    plan = load_plan(path, [])
    evaluation = tmp_path / "study/runs/alike-s3/eval.json"
    found = json.loads(evaluation.read_text())
    assert result_of(plan, plan.runs[0], recipes[0]) is not None
    evaluation.write_text(json.dumps({**found, "step": 2}))
    assert result_of(plan, plan.runs[0], recipes[0]) is None
