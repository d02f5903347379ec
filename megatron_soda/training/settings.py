"""The settings a checkpoint was trained with: recorded in it, and compared when a run continues from it."""

import shlex
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..config import Recipe
from ..errors import SodaError
from . import checkpoint
from .origin import Branch, Origin
from .schedule import rate_at, stable_steps

KEYS = {  # checkpoint.json's name: the recipe's key
    "learning_rate": "optimizer.learning_rate",
    "schedule": "schedule.name",
    "steps": "training.steps",
    "warmup_share": "schedule.warmup_share",
    "decay_share": "schedule.decay_share",
    "final_share": "schedule.final_share",
    "weight_decay": "optimizer.weight_decay",
    "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2",
    "epsilon": "optimizer.epsilon",
    "clip_grad": "optimizer.clip_grad",
    "z_loss": "training.z_loss",
    "loss_weights": "training.loss_weights",
    "prompt_spans": "data.prompt_spans",
    "precision": "precision.dtype",
    "cautious_mask": "optimizer.cautious_mask",
}
_NEW = {"final_share": 0.0, "prompt_spans": 0}  # in checkpoints of versions that did not have them
_JUMP = 1.1  # times the previous rate


def settings_of(recipe: Recipe) -> dict[str, Any]:
    return {name: attrgetter(key)(recipe) for name, key in KEYS.items()}


def compare_settings(recipe: Recipe, origin: Origin) -> list[str]:
    """What has changed since the checkpoint, a line each. SodaError if the learning rate would jump up in the middle of
    a run: after a decay that undoes what it reached."""
    if origin.kind in ("fresh", "weights only"):
        return []
    was, now = origin.saved.get("training"), settings_of(recipe)
    if was is None:
        return [f"{origin.folder} does not record its training settings (an earlier version wrote it)."]
    was = {**_NEW, **was}
    changed = [name for name in KEYS if was.get(name) != now[name]]
    notes = [
        f"{KEYS[name]} was {was.get(name)} up to step {origin.step}, and is {now[name]} from now on."
        for name in changed
    ]
    if origin.kind == "branched" or not changed:
        return notes
    step, branched_at = origin.step, origin.branch.step
    old, new = rate_at(step - 1, was, branched_at), rate_at(step, now, branched_at)
    if new > _JUMP * max(old, rate_at(step, was, branched_at)):
        lines = "\n  ".join(notes)
        raise SodaError(
            f"the learning rate would jump from {old:.3g} to {new:.3g} at step {step + 1}, in the middle of the run:\n"
            f"  {lines}\nSet them back. {ways_on(recipe, origin.branch, was)}"
        )
    if new < old / _JUMP and new != rate_at(step, was, branched_at):
        notes.append(f"the learning rate falls from {old:.3g} to {new:.3g} at step {step + 1}.")
    return notes


def ways_on(recipe: Recipe, branch: Branch, was: dict[str, Any]) -> str:
    """How to train longer than `was`, the schedule used so far."""
    run, steps = Path(recipe.run), was["steps"]
    if was["schedule"] == "wsd" and not int(was["decay_share"] * (steps - branch.step)):
        return "To train longer, raise training.steps."
    saved = checkpoint.saved_steps(run)
    if was["schedule"] == "decay":
        start = f"redo the leg from where it began ({branch.origin})"
        settings = {"branch_from": branch.origin, "schedule": "decay", "steps": 2 * steps - branch.step}
    elif stable := [step for step in saved if step in stable_steps(was, branch.step)]:
        start = "branch off the last checkpoint before the decay, at the peak rate"
        settings = {"branch_from": checkpoint.folder_of(run, stable[-1]), "warmup_share": 0, "steps": 2 * steps}
    else:
        why = "a cosine has no stable phase" if was["schedule"] == "cosine" else "none from before the decay is left"
        start = f"branch off the last checkpoint with a new warm-up ({why})"
        settings = {"branch_from": checkpoint.folder_of(run, saved[-1]), "steps": 2 * steps}
    keys = [f"run={run}-longer", *(f"{KEYS.get(name, f'training.{name}')}={value}" for name, value in settings.items())]
    if not recipe.data.path:
        keys.append(f"data.path={recipe.data_folder}")
    return f"To train longer, {start}, in a new run folder, with these settings (docs/training.md): {shlex.join(keys)}"
