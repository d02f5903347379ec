"""Evaluation while training: a checkpoint is exported and measured as `soda evaluate` would, in a process of its own.

    python -m megatron_soda.evaluation.during FOLDER [CHECKPOINT]

FOLDER (RUN/evaluations/step_…) has the recipe, and gets the results. Without a checkpoint, only checks that the suites
can be measured. The trainer (training/evaluations.py) starts this process, so nothing here can change its random
numbers, its threads or what it patches in torch, and a signal can end it at once.
"""

import ctypes
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import Recipe, load_recipe
from ..data.store import Store
from ..errors import SodaError, say, user_message
from ..registry import SUITES
from ..tokenizer import data_tokenizer

EXPORT = "export"  # in FOLDER, as long as it is measured
_PARENT_ENDED = 1  # prctl's PR_SET_PDEATHSIG


def recipe_in(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with which a checkpoint of this run is measured in `folder`."""
    data = replace(recipe.data, path=str(recipe.data_folder))
    suites = list(dict.fromkeys(recipe.evaluate.during_training))
    return replace(recipe, run=str(folder), data=data, evaluate=replace(recipe.evaluate, suite=suites))


def check(recipe: Recipe) -> None:
    """Raises SodaError if a suite of evaluate.during_training cannot be measured on this recipe's model, which need
    not exist yet."""
    from .bench import Bench

    names = recipe.evaluate.during_training
    try:
        bench = Bench(recipe, recipe.data_folder, _untrained(recipe))
        for name in names:
            SUITES[name].check(bench)
    except SodaError as error:
        raise SodaError(f"evaluate.during_training=[{','.join(names)}]: {error}") from None


def _untrained(recipe: Recipe) -> Any:
    """The model that will be exported: of its sizes and its data, without weights. SodaError without what an export
    takes from the data."""
    import torch
    from transformers import Qwen3ForCausalLM

    from ..hf.load import LoadedModel, quiet_transformers
    from ..hf.qwen3 import hf_config

    quiet_transformers()
    folder = recipe.data_folder
    store, text = Store(folder / "test"), data_tokenizer(folder)
    with torch.device("meta"):
        model = Qwen3ForCausalLM(hf_config(recipe.model, store.space, recipe.data.sequence_length)).eval()
    return LoadedModel(folder, recipe.name, 0, "", model, store.space, store.made_by, text, torch.device("cpu"))


def measure(folder: Path, checkpoint: Path) -> None:
    """Results go to `folder`/eval.json; the export is removed."""
    from ..hf.export import export
    from .run import evaluate

    recipe = load_recipe(folder / "recipe.yaml")
    try:
        evaluate(recipe, export(recipe, checkpoint, folder / EXPORT / "hf"))
    finally:
        shutil.rmtree(folder / EXPORT, ignore_errors=True)


def main() -> int:
    ctypes.CDLL(None).prctl(_PARENT_ENDED, signal.SIGTERM)  # the trainer was killed
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


if __name__ == "__main__":
    sys.exit(main())
