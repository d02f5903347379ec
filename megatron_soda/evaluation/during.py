"""Evaluation while training: a checkpoint is exported and measured as `soda evaluate` would, in a process of its own.

Its arguments are FOLDER [CHECKPOINT]. FOLDER (RUN/evaluations/step_…) has the recipe, and gets the results. Without a
checkpoint, only checks that what the suites need is there. The trainer (training/evaluations.py) starts this process,
so nothing here can change its random numbers, its threads or what it patches in torch, and a signal can end it at once.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe
from ..data.store import Store
from ..errors import SodaError, say, user_message
from ..registry import SUITES
from ..tokenizer import data_tokenizer

EXPORT = "export_"  # and the process, in FOLDER, as long as it is measured


def recipe_in(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with which a checkpoint of this run is measured in `folder`."""
    data = replace(recipe.data, path=str(recipe.data_folder))
    suites = list(dict.fromkeys(recipe.evaluate.during_training))
    return replace(recipe, run=str(folder), data=data, evaluate=replace(recipe.evaluate, suite=suites))


def check(recipe: Recipe) -> None:
    """Raises SodaError if a suite of evaluate.during_training lacks what it needs to measure this recipe's model, which
    need not exist yet."""
    from .bench import Bench

    names = recipe.evaluate.during_training
    try:
        bench = Bench(recipe, recipe.data_folder, _untrained(recipe), Path(recipe.run))
        for name in names:
            SUITES[name].check(bench)
    except SodaError as error:
        raise SodaError(f"evaluate.during_training=[{','.join(names)}]: {error}") from None


def _untrained(recipe: Recipe) -> Any:
    """The model that will be exported: of its sizes and its data, without weights. SodaError without what an export
    takes from the data."""
    import torch
    from transformers import Qwen3ForCausalLM

    from ..hf.load import IMPORTED, LoadedModel, quiet_transformers
    from ..hf.qwen3 import hf_config

    quiet_transformers()
    folder = recipe.data_folder
    imported = Path(recipe.run) / IMPORTED
    described = (folder / "test.json").is_file() or not imported.is_dir()
    store = Store(folder / ("test" if described else "train"))
    text = data_tokenizer(folder if described else imported)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(hf_config(recipe.model, store.space, recipe.data.sequence_length)).eval()
    return LoadedModel(folder, recipe.name, 0, "", model, store.space, store.made_by, text, torch.device("cpu"))


def measure(folder: Path, checkpoint: Path) -> None:
    """Results go to `folder`/eval.json; the export is removed."""
    from ..hf.export import export
    from ..hf.load import IMPORTED
    from .run import evaluate

    recipe, run = load_recipe(folder / "recipe.yaml"), folder.parent.parent
    place = folder / f"{EXPORT}{os.getpid()}"  # or what is left of a killed trainer could remove the next one's
    try:
        evaluate(recipe, export(recipe, checkpoint, place / "hf", run / IMPORTED), run)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def main() -> int:
    folder, *checkpoint = map(Path, sys.argv[1:])
    try:
        if checkpoint:
            measure(folder, checkpoint[0])
        else:
            check(load_recipe(folder / "recipe.yaml"))
    except Exception as error:
        say(f"error: {user_message(error)}")  # raises what is no mistake of the user
        return 2
    return 0
