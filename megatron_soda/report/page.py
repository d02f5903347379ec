"""Builds a run's report page from whatever the run folder holds so far.

A missing or damaged piece never stops the page: the section says what is missing, and the top of the page lists what
could not be read. Only a folder that is not a run at all is an error.
"""

from pathlib import Path
from typing import Any

import jinja2

from ..errors import SodaError
from ..files import write_text
from ..registry import SUITES
from .advice import commands, prospects, quality, speaks
from .classes import class_colours, class_names
from .data import data_summary
from .evaluation import by_suite, likelihood
from .header import header, tiles, title, verdict
from .reading import as_dict, as_list, load, read_metrics, warn_of_stale
from .samples import samples
from .times import timings
from .training import charts
from .words import exact, fixed, flatten, groups, number, plain, public, span

PAGE = "report.html"
SIGNS_OF_A_RUN = ("recipe.yaml", "metrics.jsonl", "eval.json")
PAPER = {
    "title": "Scaling Open Discrete Audio Foundation Models with Interleaved Semantic, Acoustic, and Text Tokens",
    "id": "arXiv 2602.16687",
    "url": "https://arxiv.org/abs/2602.16687",
}
EVALUATION_KEYS = ("model", "step", "split", "documents", "export", "data")  # in addition to the suites' names


def build_report(run: Path) -> Path:
    """Writes `report.html` into the run folder and returns its path."""
    run = Path(run)
    if not run.is_dir():
        raise SodaError(f"{run}: no such folder. Give the folder of a run, the one that holds recipe.yaml.")
    if not any((run / name).exists() for name in SIGNS_OF_A_RUN):
        raise SodaError(f"{run}: not a run folder: it holds none of {', '.join(SIGNS_OF_A_RUN)}.")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "fixed": fixed, "exact": exact, "span": span, "plain": plain}
    target = run / PAGE
    write_text(target, environment.get_template("template.html").render(collect(run)))
    return target


def collect(run: Path) -> dict[str, Any]:
    """Everything the template shows."""
    warnings: list[str] = []
    train, valid, evaluated = read_metrics(run / "metrics.jsonl", warnings)
    evaluation = as_dict(load(run, "eval.json", warnings))
    facts = as_dict(load(run, "environment.json", warnings))
    data = as_dict(load(run, "data/prepare.json", warnings))
    stages = timings(as_dict(load(run, "timings.json", warnings)))
    suites = by_suite(run, evaluation, warnings)
    warn_of_stale(run, warnings)
    recipe_file = run / "recipe.yaml"
    recipe = recipe_file.read_text(encoding="utf-8", errors="replace") if recipe_file.is_file() else ""
    nll, grammar = likelihood(suites["nll"]), suites["grammar"]
    listed = as_list(load(run, "samples/samples.json", warnings))
    known = (*EVALUATION_KEYS, *SUITES.names())
    colours = class_colours(class_names(train, valid, nll))
    return {
        "title": title(evaluation, recipe, run),
        "verdict": verdict(nll, bool(train)),
        "header": header(evaluation, facts, data, train),
        "quality": quality(nll, grammar, listed),
        "prospects": prospects(train, valid, data),
        "commands": commands(train, speaks(listed), bool(train)),
        "tiles": tiles(train, valid, nll, grammar, data),
        "warnings": warnings,
        "colours": colours,
        "charts": charts(train, valid, evaluated, colours, nll),
        "has_metrics": bool(train or valid),
        "suites": list(suites.values()),
        "evaluation": {
            "split": evaluation.get("split"),
            "documents": evaluation.get("documents"),
            "step": evaluation.get("step"),
            "more": flatten(public({k: v for k, v in evaluation.items() if k not in known})),
        },
        "tasks": samples(run, listed, warnings),
        "data": data_summary(data),
        "recipe": recipe,
        "environment": groups(public(facts)),
        "stages": stages,
        "attribution": data.get("attribution"),
        "paper": PAPER,
    }
