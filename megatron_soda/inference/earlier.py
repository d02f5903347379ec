"""Loads earlier checkpoints of a run as models, to hear its progress."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..console import console
from ..errors import SodaError
from ..hf.load import LoadedModel

MOST = 2


def earlier_models(recipe: Recipe, model: LoadedModel) -> Iterator[tuple[int, Any]]:
    """(step, Qwen3ForCausalLM) for at most MOST evenly spread checkpoints of the run before the model's own. A damaged
    one is skipped and reported."""
    from ..hf.export import hf_weights
    from ..model.gpt import build_model
    from ..parallel import ranks
    from ..training import checkpoint

    run = Path(recipe.run)
    steps = [step for step in checkpoint.saved_steps(run) if step < model.step]
    chosen = sorted({steps[round((i + 1) * len(steps) / (MOST + 1) - 0.5)] for i in range(MOST)} if steps else set())
    if not chosen:
        return
    recipe = recipe.on_one_rank()
    ours = build_model(recipe, model.space, ranks.init(recipe))
    theirs = copy.deepcopy(model.model)
    for step in chosen:
        folder = checkpoint.folder_of(run, step)
        try:
            if wrong := checkpoint.damage(folder):
                raise SodaError(f"{folder}: damaged ({wrong[0]})")
            checkpoint.read_description(folder, recipe.model, model.space)
            checkpoint.load(folder, [ours], None)
        except SodaError as error:
            console.print(f"[yellow]no sample of step {step}[/]: {error}", markup=True, soft_wrap=True)
            continue
        weights = hf_weights(dict(ours.state_dict()), recipe.model, model.space)
        theirs.load_state_dict({name: weight.to(theirs.device) for name, weight in weights.items()}, strict=False)
        yield step, theirs
