"""The paper's grid is planned row by row, and a study's mistakes are messages."""

import csv
import io
from pathlib import Path

import pytest
import yaml

from megatron_soda.errors import SodaError
from megatron_soda.isoflop.plan import COLUMNS, Plan, make_plan, to_csv, to_lines, write_recipes
from megatron_soda.isoflop.study import load_study
from megatron_soda.model.size import parameter_count

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "examples" / "isoflop" / "paper.yaml"
# The authors' generator, run apart from this project. FLOPs (3 x the code's, one digit), width, layers, heads, ffn,
# batch, steps, rate, beta2, millions of parameters without tables and with both, billions of tokens, 6 x the former x
# tokens, and where a row is from.
GRID = [line.split("|") for line in (ROOT / "megatron_soda" / "isoflop" / "paper_grid.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def paper() -> Plan:
    return make_plan(load_study(PAPER))


def study(folder: Path, **changes: object) -> Path:
    """A small study on a recipe of its own."""
    (folder / "recipe.yaml").write_text("run: runs/x\ndata: {sequence_length: 256}\ntraining: {micro_batch_size: 8}\n")
    rules = {"head_dim": 16, "width_per_layer": 32, "most_steps": 1024, "rate_limit": 0, "smallest_batch": 1}
    values = {"recipe": "recipe.yaml", "budgets": [{"flops": 1e12, "widths": [16, 32]}], "rules": rules, **changes}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_the_papers_grid(paper):
    rows = list(csv.DictReader(io.StringIO(to_csv(paper))))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(GRID) == 66
    assert sum(run.is_target for run in paper.runs) == 7
    whole = ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "batch_size", "steps")
    for row, run, expected in zip(rows, paper.runs, GRID, strict=True):
        numbers = {name: int(row[name]) for name in whole}
        d, n, tokens = numbers["hidden_size"], numbers["num_layers"], int(row["tokens"])
        body = n * (4 * d * d + 3 * d * numbers["ffn_hidden_size"] + 2 * d)  # two norms a layer, as they count
        assert [
            f"{float(row['flops']):.0e}",
            *map(str, numbers.values()),
            f"{float(row['learning_rate']):.5f}",
            f"{float(row['adam_beta2']):.5f}",
            f"{body / 1e6:.1f}",
            f"{int(row['params_total']) / 1e6:.1f}",
            f"{tokens / 1e9:.2f}",
            f"{6 * body * tokens:.2e}",
            "target" if run.is_target else "sweep",
        ] == expected
        assert tokens == numbers["batch_size"] * 4096 * numbers["steps"]


def test_budgets_of_the_paper(paper):
    assert sorted({run.budget for run in paper.runs}) == [3e18, 9e18, 1.8e19, 3e19, 9e19, 1.8e20, 3e20]
    for run in paper.runs:
        assert run.flops("total") == pytest.approx(run.budget, rel=1e-2)
        assert run.flops("forward") * 3 == run.flops("total")
        assert run.flops("6nd") == 6 * run.params_total * run.tokens


@pytest.mark.parametrize("accounting", ["forward", "total", "6nd"])
def test_accounting_changes_only_the_label(paper, tmp_path, accounting):
    values = {**yaml.safe_load(PAPER.read_text()), "recipe": str(PAPER.parent / "paper-recipe.yaml")}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**values, "accounting": accounting}))
    plan = make_plan(load_study(path))
    assert plan.runs == paper.runs
    first = next(csv.DictReader(io.StringIO(to_csv(plan))))
    labels = {"forward": 1e18, "total": 3e18, "6nd": 6.0 * int(first["params_total"]) * int(first["tokens"])}
    assert float(first["flops"]) == labels[accounting]


def test_the_recipes_of_the_runs(paper, tmp_path):
    run = next(run for run in paper.runs if run.hidden_size == 1024)
    recipe = paper.recipe_of(run)
    m, t, o = recipe.model, recipe.training, recipe.optimizer
    assert (m.num_layers, m.hidden_size, m.head_dim, m.num_query_groups, m.init) == (11, 1024, 128, 8, "levanter")
    assert (t.steps, t.global_batch_size, t.z_loss) == (run.steps, run.batch_size, 0)
    assert (o.name, o.beta1, o.epsilon, o.weight_decay) == ("cautious", 0.95, 1e-15, 0.1)
    assert (o.learning_rate, o.beta2) == (run.learning_rate, run.adam_beta2)
    assert (recipe.schedule.warmup_share, recipe.schedule.decay_share) == (0.1, 0.2)
    assert parameter_count(m, paper.space) == run.params_total
    plan = make_plan(load_study(study(tmp_path)))
    write_recipes(plan, tmp_path / "recipes")
    listed = (tmp_path / "recipes" / "runs.txt").read_text().split()
    assert [Path(path).stem for path in listed] == [run.id for run in plan.runs]
    assert yaml.safe_load(Path(listed[1]).read_text())["model"]["hidden_size"] == 32


def test_the_table_says_what_it_costs_and_leaves_out(paper):
    lines = to_lines(paper)
    assert "66 runs" in "\n".join(lines)
    assert "GPU-hours at 40% of 989 TFLOP/s" in "\n".join(lines)
    total = sum(run.flops("total") for run in paper.runs) / (0.4 * 989e12 * 3600)
    assert any(line.startswith(f"{total:,.3g} GPU-hours") for line in lines)
    assert any(line.startswith("left out: 3e+18, width 128: ") for line in lines)


def test_pruning_is_named(tmp_path):
    prune = {"params": 10e6, "flops": 1e12, "exponent": 0.4, "factor": 1.5}
    plan = make_plan(load_study(study(tmp_path, budgets=[{"flops": 1e12, "widths": [16, 32, 64]}], prune=prune)))
    assert [run.hidden_size for run in plan.runs] == [32]
    assert [dropped.hidden_size for dropped in plan.dropped] == [16, 64]
    assert all("pruned" in dropped.why for dropped in plan.dropped)


def test_legal_rows_cost_less(tmp_path):
    """A run's FLOPs then hold 6 x width for each of the other rows less."""
    (every,) = make_plan(load_study(study(tmp_path, budgets=[{"flops": 1e12, "widths": [32]}]))).runs
    (legal,) = make_plan(load_study(study(tmp_path, budgets=[{"flops": 1e12, "widths": [32]}], head_rows=2048))).runs
    assert every.flops_per_token - legal.flops_per_token == 6 * 32 * (144_644 - 2048)
    assert legal.tokens > 10 * every.tokens


def test_one_rate_and_any_batch(tmp_path):
    rules = {"head_dim": 16, "width_per_layer": 32, "most_steps": 100, "rate_limit": 0, "smallest_batch": 1}
    budgets = [{"flops": 1e14, "widths": [16, 24, 32, 48]}]
    powers = make_plan(load_study(study(tmp_path, rules=rules, budgets=budgets))).runs
    rules |= {"any_batch": True, "learning_rate": 0.005}
    plan = make_plan(load_study(study(tmp_path, rules=rules, budgets=budgets)))
    assert len(plan.runs) == len(powers) == 4
    for run, power in zip(plan.runs, powers, strict=True):
        fewest = run.budget / (run.flops_per_token * 100 * 256)
        assert fewest <= run.batch_size < fewest + 1 <= power.batch_size + 1
        assert run.learning_rate == 0.005 != power.learning_rate
        micro = plan.recipe_of(run).training.micro_batch_size
        assert micro == max(size for size in range(1, 9) if run.batch_size % size == 0)
    assert any(run.batch_size != power.batch_size for run, power in zip(plan.runs, powers, strict=True))


def test_seeds(tmp_path):
    budgets = [{"flops": 1e12, "widths": [16, 32]}, {"flops": 1e12, "widths": [32], "seeds": [1, 2]}]
    plan = make_plan(load_study(study(tmp_path, budgets=budgets)))
    assert [run.id for run in plan.runs] == ["1e12-d16-s1234", "1e12-d32-s1234", "1e12-d32-s1", "1e12-d32-s2"]
    assert plan.recipe_of(plan.runs[2]).seed == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": []}, "unknown key budget. Did you mean budgets?"),
        ({"budgets": [{"flops": "many", "widths": [16]}]}, "budgets[0].flops='many'"),
        ({"budgets": [{"widths": [16]}]}, "the key budgets[0].flops is missing"),
        ({"budgets": [{"flops": 1e12, "widths": [16, 16]}]}, "budget 1e+12, width 16, seed 1234 is listed twice"),
        ({"budgets": []}, "the rules leave no run"),
        ({"budgets": [{"flops": 1e6, "widths": [16]}]}, "misses the budget by more than 1%"),
        ({"rules": {"beta2": 2}}, "rules.beta2=2"),
        ({"recipe": "none.yaml"}, "none.yaml: cannot read the recipe"),
        ({"prune": 3}, "prune: must be a mapping"),
    ],
)
def test_mistakes_in_a_study(tmp_path, changes, message):
    with pytest.raises(SodaError) as error:
        make_plan(load_study(study(tmp_path, **changes)))
    assert message in str(error.value)
    assert "study.yaml" in str(error.value) or "none.yaml" in str(error.value)


def test_what_is_no_study(tmp_path):
    for name, text in (("a.yaml", "- 1"), ("b.yaml", "a: ["), ("c.csv", "")):
        (tmp_path / name).write_text(text)
        with pytest.raises(SodaError, match=name):
            load_study(tmp_path / name)


def test_a_key_twice_in_a_study(tmp_path):
    (tmp_path / "d.yaml").write_text("name: a\nname: b\n")
    with pytest.raises(SodaError, match=r"d\.yaml.*line 2: name is duplicated"):
        load_study(tmp_path / "d.yaml")
