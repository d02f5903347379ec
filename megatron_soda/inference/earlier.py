"""Loads earlier checkpoints of a run as models, to hear its progress."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Model, Recipe
from ..console import console
from ..errors import SodaError
from ..hf.load import LoadedModel
from ..hf.qwen3 import parts

MOST = 2


def earlier_models(recipe: Recipe, model: LoadedModel) -> Iterator[tuple[int, Any]]:
    """(step, Qwen3ForCausalLM) of at most MOST checkpoints of the run before the model's own, evenly spread. One that
    is damaged is passed over and named."""
    from ..parallel import ranks  # noqa: F401  before anything of megatron-core
    from ..training import checkpoint
    from ..training.checkpoint_stream import TensorReader

    run = Path(recipe.run)
    steps = [step for step in checkpoint.saved_steps(run) if step < model.step]
    chosen = sorted({steps[round((i + 1) * len(steps) / (MOST + 1) - 0.5)] for i in range(MOST)} if steps else set())
    if not chosen:
        return
    theirs = copy.deepcopy(model.model)
    for step in chosen:
        folder = checkpoint.folder_of(run, step)
        try:
            if wrong := checkpoint.damage(folder):
                raise SodaError(f"{folder}: damaged ({wrong[0]})")
            checkpoint.read_description(folder, recipe.model, model.space)
            _fill(theirs.state_dict(), TensorReader(folder), recipe.model, model.space.size)
        except SodaError as error:
            console.note(f"no sample of step {step}", f": {error}")
            continue
        yield step, theirs


def _fill(state: dict[str, Any], reader: Any, m: Model, rows: int) -> None:
    """Copies a checkpoint's tensors over those of a Qwen3."""
    for part in parts(m):
        tensors = part.split(reader.read(part.name, part.layer), m, rows)
        for name, tensor in zip(part.theirs, tensors, strict=True):
            state[name].copy_(tensor)
