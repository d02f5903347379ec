"""From a study to its runs: sizes, batches, rates and steps (paper, section 6)."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Model, Recipe, load_recipe, save_recipe
from ..config.model import SIZES
from ..errors import SodaError
from ..files import write_text
from ..model.size import size_of, space_of, study_flops, training_tokens
from ..vocab import TokenSpace
from .results import short
from .study import Accounting, Budget, Rules, Study

COLUMNS = (
    *("flops", "hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "batch_size", "steps"),
    *("learning_rate", "adam_beta2", "params_total", "tokens"),
)
_RATE_TOKENS = 4096  # the rate's rule counts the batch in the paper's sequences


@dataclass(frozen=True)
class Run:
    budget: float  # FLOPs asked for, forward and backward
    hidden_size: int
    num_layers: int
    num_attention_heads: int
    ffn_hidden_size: int
    head_dim: int
    batch_size: int  # sequences a step
    steps: int
    learning_rate: float
    adam_beta2: float
    params_total: int  # both tables included
    flops_per_token: int  # forward and backward
    tokens: int
    seed: int
    is_target: bool

    @property
    def id(self) -> str:
        return f"{self.budget:g}-d{self.hidden_size}-s{self.seed}".replace("+", "")

    @property
    def cost(self) -> float:
        return self.flops("total")

    def flops(self, accounting: Accounting) -> float:
        """What the run costs, by its own tokens."""
        if accounting == "6nd":
            return 6.0 * self.params_total * self.tokens
        total = float(self.flops_per_token * self.tokens)
        return total / 3 if accounting == "forward" else total

    def label(self, accounting: Accounting) -> float:
        """The column `flops` of the plan: the budget, or 6ND, which differs from run to run."""
        if accounting == "6nd":
            return self.flops("6nd")
        return self.budget / 3 if accounting == "forward" else self.budget


@dataclass(frozen=True)
class Dropped:
    budget: float
    hidden_size: int
    why: str


@dataclass
class Plan:
    study: Study
    recipe: Recipe  # what the runs have in common
    space: TokenSpace
    runs: list[Run]
    dropped: list[Dropped]
    overrides: list[str]
    suites: tuple[str, ...] = ()

    def columns(self, run: Run) -> dict[str, Any]:
        data = training_tokens(self.recipe)
        names = ("hidden_size", "num_layers", "num_attention_heads", "ffn_hidden_size", "batch_size", "steps")
        names += ("learning_rate", "adam_beta2", "params_total", "tokens", "seed")
        return {
            "budget": run.budget,
            "flops": run.flops("total"),
            "flops_6nd": run.flops("6nd"),
            **{name: getattr(run, name) for name in names},
            "target": run.is_target,
            "passes": run.tokens / data if data else None,
        }

    def recipe_of(self, run: Run) -> Recipe:
        """The recipe of one run: the study's recipe with the run's sizes, batch, rate and steps."""
        largest = min(self.recipe.training.micro_batch_size, run.batch_size)
        micro = next(size for size in range(largest, 0, -1) if run.batch_size % size == 0)
        settings = {
            "name": f"{self.study.name}-{run.id}",
            "run": Path(self.study.folder) / "runs" / run.id,
            "seed": run.seed,
            "model.num_layers": run.num_layers,
            "model.hidden_size": run.hidden_size,
            "model.ffn_hidden_size": run.ffn_hidden_size,
            "model.num_attention_heads": run.num_attention_heads,
            "model.num_query_groups": run.num_attention_heads,
            "model.head_dim": run.head_dim,
            "training.steps": run.steps,
            "training.global_batch_size": run.batch_size,
            "training.micro_batch_size": micro,
            "optimizer.learning_rate": repr(run.learning_rate),
            "optimizer.beta2": repr(run.adam_beta2),
        }
        if not self.recipe.data.path:  # the runs share the stores of the study's recipe
            settings["data.path"] = self.recipe.data_folder
        return load_recipe(self.study.recipe_path, [*self.overrides, *(f"{k}={v}" for k, v in settings.items())])

    def gpu_hours(self, run: Run) -> float:
        return run.flops("total") / (self.study.mfu * self.study.device_tflops * 1e12 * 3600)


def make_plan(study: Study, overrides: list[str] | None = None) -> Plan:
    """The study's runs in its order: budgets, then targets. `overrides` are recipe settings for all runs.

    Raises SodaError for a recipe that cannot be read, a run that is listed twice, and a study without any run.
    """
    recipe = load_recipe(study.recipe_path, overrides or [])
    plan = Plan(study, recipe, space_of(recipe), [], [], overrides or [])
    for is_target, budgets in ((False, study.budgets), (True, study.targets)):
        for budget in budgets:
            for found in _runs_of(budget, is_target, plan):
                plan.runs.append(found) if isinstance(found, Run) else plan.dropped.append(found)
    seen: set[str] = set()
    for run in plan.runs:
        if run.id in seen:
            raise SodaError(
                f"{study.source}: budget {run.budget:g}, width {run.hidden_size}, seed {run.seed} is listed twice"
            )
        seen.add(run.id)
    if not plan.runs:
        reasons = "; ".join(f"{d.budget:g} x {d.hidden_size}: {d.why}" for d in plan.dropped) or "no width is listed"
        raise SodaError(f"{study.source}: the rules leave no run ({reasons})")
    return plan


def _runs_of(budget: Budget, is_target: bool, plan: Plan) -> Iterator[Run | Dropped]:
    for width in budget.widths:
        for seed in budget.seeds or [plan.recipe.seed]:
            found = _run(budget.flops, width, seed, is_target, plan)
            yield Dropped(budget.flops, width, found) if isinstance(found, str) else found
            if isinstance(found, str):
                break


def _run(flops: float, width: int, seed: int, is_target: bool, plan: Plan) -> Run | str:
    """The run of a width at a budget, or why there is none."""
    rules, length = plan.study.rules, plan.recipe.data.sequence_length
    sizes = layers, _, ffn, heads, _, head_dim = model_sizes(width, rules)
    if not layers:
        return "0 layers by the rule for the depth"
    named = dict(zip(SIZES, sizes, strict=True))
    model = Model(**named, tie_embeddings=plan.recipe.model.tie_embeddings)
    cost = study_flops(model, plan.space, length, plan.study.head_rows)
    size = size_of(model, plan.space, length)
    if not is_target and (why := _pruned(flops, size.total, plan.study)):
        return why
    fewest = flops / (cost * rules.most_steps * length)
    batch = max(1, math.ceil(fewest) if rules.any_batch else 2 ** math.ceil(math.log2(fewest)))
    while rules.rate_limit and batch > 1 and learning_rate(batch, width, length, rules) > rules.rate_limit:
        batch //= 2
    steps = round(flops / (cost * batch * length))
    tokens = steps * batch * length
    rate = learning_rate(batch, width, length, rules)
    if batch < rules.smallest_batch:
        return f"a batch of {batch}, below {rules.smallest_batch}"
    if rules.rate_limit and rate > rules.rate_limit:
        return f"a rate of {rate:.3g}, above {rules.rate_limit:g}"
    if rules.steps_limit and steps >= rules.steps_limit:
        return f"{steps:,} steps, and {rules.steps_limit:,} are too many"
    if abs(cost * tokens / flops - 1) > rules.tolerance:
        return f"{cost * tokens:.3g} FLOPs, which misses the budget by more than {rules.tolerance:.0%}"
    beta2 = rules.beta2 ** (batch * length / rules.beta2_tokens) if rules.beta2_tokens else rules.beta2
    return Run(
        budget=flops,
        hidden_size=width,
        num_layers=layers,
        num_attention_heads=heads,
        ffn_hidden_size=ffn,
        head_dim=head_dim,
        batch_size=batch,
        steps=steps,
        learning_rate=rate,
        adam_beta2=beta2,
        params_total=size.total,
        flops_per_token=cost,
        tokens=tokens,
        seed=seed,
        is_target=is_target,
    )


def model_sizes(width: int, rules: Rules) -> tuple[int, int, int, int, int, int]:
    """In the order of config.model.SIZES."""
    heads = max(1, width // rules.head_dim)
    if rules.width_per_layer:
        layers = max(1, round(width / rules.width_per_layer))
    else:
        layers = round(width / (64 + 4 * math.log2(width) - 7))
    return layers, width, rules.ffn_factor * width, heads, heads, rules.head_dim


def learning_rate(batch: int, width: int, length: int, rules: Rules) -> float:
    """Peak rate at `batch` sequences of `length` tokens."""
    if rules.learning_rate:
        return rules.learning_rate
    return rules.rate_constant * math.sqrt(batch * length / _RATE_TOKENS) / width


def _pruned(flops: float, params: int, study: Study) -> str:
    if study.prune is None:
        return ""
    best = study.prune.params * (flops / study.prune.flops) ** study.prune.exponent
    away = params / best
    if 1 / study.prune.factor <= away <= study.prune.factor:
        return ""
    return f"pruned: {params / 1e6:,.1f}M parameters, {away:.2g} x the optimum expected there ({best / 1e6:,.1f}M)"


# ---- output


def to_csv(plan: Plan) -> str:
    """One line per run; COLUMNS are the columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in plan.runs:
        label = run.label(plan.study.accounting)
        writer.writerow([label, *(getattr(run, name) for name in COLUMNS[1:])])
    return text.getvalue()


def to_lines(plan: Plan) -> list[str]:
    """The plan as a table, with what every run costs by each way of counting, and what was left out."""
    data = training_tokens(plan.recipe)
    head = f"{'budget':>9}{'width':>7}{'layers':>7}{'batch':>7}{'steps':>9}{'rate':>10}{'beta2':>9}{'params':>10}"
    head += f"{'tokens':>10}{'forward':>10}{'total':>10}{'6ND':>10}{'GPU hours':>11}{'passes' if data else '':>8}"
    lines = [head]
    for run in plan.runs:
        lines.append(
            f"{run.budget:>9g}{run.hidden_size:>7}{run.num_layers:>7}{run.batch_size:>7}{run.steps:>9}"
            f"{run.learning_rate:>10.3g}{run.adam_beta2:>9.5f}{short(run.params_total):>10}{short(run.tokens):>10}"
            f"{run.flops('forward'):>10.2e}{run.flops('total'):>10.2e}{run.flops('6nd'):>10.2e}"
            f"{plan.gpu_hours(run):>11.3g}{f'{run.tokens / data:.2f}' if data else '':>8}"
            f"{'  target' if run.is_target else ''}{f'  seed {run.seed}' if run.seed != plan.recipe.seed else ''}"
        )
    where = "the training store's" if data else "SODA's: the recipe's stores are not there, and theirs may differ"
    hours = sum(map(plan.gpu_hours, plan.runs))
    lines += [
        f"{len(plan.runs)} runs; {plan.space.size:,} ids ({where}); windows of {plan.recipe.data.sequence_length}",
        f"{hours:,.3g} GPU-hours at {plan.study.mfu:.0%} of {plan.study.device_tflops:g} TFLOP/s",
    ]
    return lines + [f"left out: {d.budget:g}, width {d.hidden_size}: {d.why}" for d in plan.dropped]


def write_recipes(plan: Plan, folder: Path) -> None:
    """FOLDER/ID.yaml for every run, and runs.txt, which lists these files in the plan's order (for a job array)."""
    paths = []
    for run in plan.runs:
        paths.append(folder / f"{run.id}.yaml")
        save_recipe(plan.recipe_of(run), paths[-1])
    write_text(folder / "runs.txt", "".join(f"{path}\n" for path in paths))
