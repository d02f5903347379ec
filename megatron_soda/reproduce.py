"""The numbers of the paper (arXiv 2602.16687), each with what would give it. `soda reproduce paper` prints them.

paper.yaml holds the numbers, the runs they need and the data. Recipe hashes, GPU-hours, and what follows from the
recipes without training, are computed here.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from .config import Recipe, load_recipe
from .config.fields import SECTION, Above0, CountOrZero
from .errors import SodaError
from .isoflop.plan import Plan, Run, make_plan
from .isoflop.study import load_study
from .model.size import Size, size_of, train_flops
from .registry import SUITES
from .studies.records import recipe_hash
from .vocab import LLAMA3

ROOT = Path(__file__).resolve().parents[1]  # the checkout: its recipes are not part of the installed package
PEAK = 989e12  # FLOP/s, one H100, BF16
GRID = Path(__file__).parent / "isoflop" / "paper_grid.txt"
Source = Literal["paper", "code", "notes", "later", "derived"]


@dataclass(config=SECTION)
class Training:
    """What has to be trained: a recipe, or runs of a study."""

    recipe: str = ""
    study: str = ""
    select: str = "all"
    """Which of the study's runs: all, sweep, targets, a budget such as 3e18, or one run's id."""
    settings: list[str] = field(default_factory=list)
    data: list[str] = field(default_factory=list)
    """What it needs besides the corpora of its mix."""
    from_step: CountOrZero = 0
    """The steps before this one are another run's."""
    mfu: Above0 = 0.4
    basis: str = "assumed"
    """Where the MFU comes from."""


@dataclass(config=SECTION)
class Data:
    what: str
    size: str = ""
    licence: str = "not known"


@dataclass(config=SECTION)
class Ours:
    """A number that was measured, and how."""

    value: str
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]
    commit: Annotated[str, Field(pattern=r"^[0-9a-f]{7,40}$")]
    how: Annotated[str, Field(min_length=1)]


@dataclass(config=SECTION)
class Number:
    """One number, or with `of` one for each run."""

    what: str
    source: Source
    command: str = ""
    """{recipe}, {run}: the run's recipe and folder. {train}: the command that trains it. {data}: the first one."""
    paper: str = ""
    run: str = ""
    of: dict[str, str] = field(default_factory=dict)
    unit: str = ""
    data: list[str] = field(default_factory=list)
    computed: str = ""
    """A function of COMPUTED and its arguments, without the run, which is the first."""
    not_supported: str = ""
    """Why no command of ours gives it."""
    ours: dict[str, Ours] = field(default_factory=dict)
    """By run; the key is `value` for a number without one."""


@dataclass(config=SECTION)
class Section:
    title: str
    numbers: list[Number]
    each: dict[str, Any] = field(default_factory=dict)
    """Fields of its numbers that do not have their own."""
    note: str = ""


@dataclass(config=SECTION)
class Paper:
    runs: dict[str, Training]
    data: dict[str, Data]
    measures: dict[str, Any]
    """Fields that several numbers share."""
    sections: list[Section]


@cache
def load_paper() -> Paper:
    """paper.yaml. Raises SodaError outside a checkout."""
    if not (ROOT / "examples" / "pretrain").is_dir():
        raise SodaError(f"{ROOT}: no examples/ in it. `soda reproduce` reads the recipes there: run it from a checkout")
    text = (Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8")
    values = yaml.load(text, yaml.BaseLoader)  # scalars stay text, so that 0.500 keeps the paper's digits
    for section in values["sections"]:
        section["numbers"] = [_merged(number, section, values["measures"]) for number in section["numbers"]]
    return TypeAdapter(Paper).validate_python(values)


def _merged(number: dict[str, Any], section: dict[str, Any], measures: dict[str, Any]) -> dict[str, Any]:
    """A number with the fields that it takes from its section and its measure."""
    return section.get("each", {}) | measures.get(number.pop("measure", ""), {}) | number


# ---- runs


@dataclass
class Trained:
    """What is known of a run, or of a group of a study's runs, before it is trained."""

    recipe: Recipe
    runs: list[Run]  # of the study
    command: str
    folder: str
    hash: str  # of the recipe; of a group, also of the runs that the plan makes of it
    tokens: int
    flops: float  # forward and backward
    hours: float  # of one GPU
    basis: str
    data: list[str]


@cache
def trained(name: str) -> Trained:
    one = load_paper().runs[name]
    return _of_study(name, one) if one.study else _of_recipe(name, one)


def _of_recipe(name: str, one: Training) -> Trained:
    recipe = load_recipe(ROOT / one.recipe, one.settings)
    settings = [*one.settings, *([f"run=runs/{name}"] if one.settings else [])]
    t, length = recipe.training, recipe.data.sequence_length
    tokens = (t.steps - one.from_step) * t.global_batch_size * length
    flops = float(train_flops(recipe.model, LLAMA3, length) * tokens)
    return Trained(
        recipe=recipe,
        runs=[],
        command=_launch(one.recipe, settings),
        folder=f"runs/{name}" if one.settings else recipe.run,
        hash=recipe_hash(recipe),
        tokens=tokens,
        flops=flops,
        hours=flops / (one.mfu * PEAK * 3600),
        basis=f"{one.mfu:.1%}, {one.basis}",
        data=_data(recipe, one),
    )


def _of_study(name: str, one: Training) -> Trained:
    plan = _plan(one.study, tuple(one.settings))
    chosen = [run for run in plan.runs if one.select in _selections(run)]
    is_one = one.select == chosen[0].id
    recipe = plan.recipe_of(chosen[0]) if is_one else plan.recipe
    own_folder = is_one and bool(one.settings)
    folder = f"runs/{name}" if own_folder else plan.study.folder
    command = " ".join(["soda isoflop run", one.study, *map(_quoted, one.settings)])
    if is_one:
        made = " ".join(["soda isoflop plan", one.study, *map(_quoted, one.settings), "--recipes recipes"])
        command = f"{made} && {_launch(f'recipes/{one.select}.yaml', [f'run={folder}'] if own_folder else [])}"
        folder = folder if own_folder else f"{folder}/runs/{one.select}"
    return Trained(
        recipe=recipe,
        runs=chosen,
        command=command,
        folder=folder,
        hash=recipe_hash(recipe) if is_one else _group_hash(recipe, chosen),
        tokens=sum(run.tokens for run in chosen),
        flops=sum(run.flops("total") for run in chosen),
        hours=sum(plan.gpu_hours(run) for run in chosen),
        basis=f"{plan.study.mfu:.1%}, assumed",
        data=_data(plan.recipe, one),
    )


@cache
def _plan(study: str, settings: tuple[str, ...]) -> Plan:
    return make_plan(load_study(ROOT / study), list(settings))


def _group_hash(recipe: Recipe, runs: list[Run]) -> str:
    return hashlib.sha256(f"{recipe_hash(recipe)} {runs}".encode()).hexdigest()[:12]


def _selections(run: Run) -> tuple[str, ...]:
    return ("all", run.id, *(("targets",) if run.is_target else ("sweep", run.id.partition("-")[0])))


def _launch(recipe: str, settings: list[str]) -> str:
    return " ".join(["bash examples/pretrain/launch.sh", recipe, *map(_quoted, settings)])


def _quoted(setting: str) -> str:
    return f'"{setting}"' if " " in setting else setting


def _data(recipe: Recipe, one: Training) -> list[str]:
    corpora = [name for name, share in recipe.data.mix[-1].shares.items() if share > 0]
    return [*corpora, *(name for name in one.data if name not in corpora)]


# ---- what follows without training


def _setting(run: str, key: str) -> Any:
    """A recipe's value, such as data.mix.0.shares.nemotron."""
    value: Any = asdict(trained(run).recipe)
    for part in key.split("."):
        value = value[int(part)] if isinstance(value, list) else value[part]
    return value


def _size(run: str, *parts: str) -> int:
    recipe = trained(run).recipe
    size: Size = size_of(recipe.model, LLAMA3, recipe.data.sequence_length)
    return sum(getattr(size, part) for part in parts)


def _planned(run: str, column: str) -> float:
    return getattr(trained(run).runs[0], column)


def _same_rows(run: str) -> int:
    """How many of the rows are, in every column, those of the authors' generator."""
    known = {tuple(line.split("|")) for line in GRID.read_text().splitlines()}
    return sum(_grid_row(one) in known for one in trained(run).runs)


def _grid_row(run: Run) -> tuple[str, ...]:
    """In the columns of isoflop/paper_grid.txt (tests/isoflop/test_plan.py names them)."""
    d = run.hidden_size
    body = run.num_layers * (4 * d * d + 3 * d * run.ffn_hidden_size + 2 * d)  # two norms a layer, as they count
    whole = (d, run.num_layers, run.num_attention_heads, run.ffn_hidden_size, run.batch_size, run.steps)
    sizes = f"{body / 1e6:.1f}", f"{run.params_total / 1e6:.1f}", f"{run.tokens / 1e9:.2f}"
    rates = f"{run.learning_rate:.5f}", f"{run.adam_beta2:.5f}"
    cost = f"{6 * body * run.tokens:.2e}"
    return (f"{run.budget:.0e}", *map(str, whole), *rates, *sizes, cost, "target" if run.is_target else "sweep")


def _optima(_run: str, column: str, exponent: str, flops: str, *near_optimal: str) -> list[float]:
    """The optimum at `flops`, from each of the near-optimal runs by the paper's exponent."""
    runs = [trained(name).runs[0] for name in near_optimal]
    return sorted(getattr(one, column) * (float(flops) / one.budget) ** float(exponent) for one in runs)


COMPUTED: dict[str, Callable[..., Any]] = {
    "vocabulary": lambda _run: LLAMA3.size,
    "text_ids": lambda _run: LLAMA3.text_size,
    "codes": lambda _run: LLAMA3.codebooks * LLAMA3.entries,
    "setting": _setting,
    "ratio": lambda _run, one, other: float(one) / float(other),
    "size": _size,
    "tokens": lambda run: trained(run).tokens,
    "step_tokens": lambda run: _setting(run, "training.global_batch_size") * _setting(run, "data.sequence_length"),
    "steps": lambda run: _setting(run, "training.steps") - load_paper().runs[run].from_step,
    "six_nd": lambda run: 6 * _size(run, "total") * trained(run).tokens,
    "planned": _planned,
    "rows": lambda run: len(trained(run).runs),
    "same_rows": _same_rows,
    "budgets": lambda run: len({one.budget for one in trained(run).runs}),
    "optima": _optima,
}
SCALES = {"M": 1e6, "B": 1e9}  # of the units that begin so


def _computed(text: str, run: str, unit: str, paper: str) -> str:
    """A result with the digits that the paper gives."""
    name, *arguments = text.split()
    found = COMPUTED[name](run, *arguments)
    scale = SCALES.get(unit.partition(" ")[0], 1)
    values = found if isinstance(found, list) else [found]
    return " to ".join(_like(one, value / scale) for one, value in zip(paper.split(" to "), values, strict=True))


def _like(text: str, value: float) -> str:
    """`value` written as `text` is: 0.500, 2.683e-3, 144,644."""
    mantissa, _, power = text.strip("~").partition("e")
    decimals = len(mantissa.partition(".")[2])
    if not power:
        return f"{value:,.{decimals}f}"
    written, _, exponent = f"{value:.{decimals}e}".partition("e")
    return f"{written}e{int(exponent)}"


# ---- rows


@dataclass
class Row:
    """One number, as it is shown."""

    what: str
    paper: str
    ours: str
    source: Source
    run: str
    hash: str
    hours: float | None  # of GPUs, to train the run
    data: list[str]
    command: str
    pattern: str  # the command with RUN, TRAIN and RECIPE, alike for all runs
    not_supported: str  # why no command of this version gives it


def rows(section: Section) -> Iterator[Row]:
    for number in section.numbers:
        for run, paper in (number.of or {number.run: number.paper}).items():
            yield _row(number, run, paper)


def _row(number: Number, run: str, paper: str) -> Row:
    known = trained(run) if run else None
    pattern = "" if number.not_supported else number.command
    pattern = pattern.replace("{data}", number.data[0] if number.data else "")
    values = {"run": known.folder, "train": known.command, "recipe": load_paper().runs[run].recipe} if known else {}
    why = number.not_supported or _missing_suite(pattern)
    measured = number.ours.get(run or "value")
    ours = f"{measured.value} ({measured.date}, {measured.commit}: {measured.how})" if measured else ""
    if number.computed:
        ours = _computed(number.computed, run, number.unit, paper)
    return Row(
        what=f"{number.what}, {number.unit}" if number.unit else number.what,
        paper=paper,
        ours=ours,
        source=number.source,
        run=run,
        hash=known.hash if known else "",
        hours=0.0 if number.computed else known.hours if known and not number.not_supported else None,
        data=number.data,
        command=_filled(pattern, values),
        pattern=_filled(pattern, {name: name.upper() for name in values}),
        not_supported=why,
    )


def _filled(pattern: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        pattern = pattern.replace(f"{{{name}}}", value)
    return pattern


def _missing_suite(command: str) -> str:
    found = re.search(r"suite=\[([^\]]*)\]", command)
    missing = [name for name in found[1].split(",") if name not in SUITES] if found else []
    return f"this version has no suite {', '.join(missing)}" if missing else ""
