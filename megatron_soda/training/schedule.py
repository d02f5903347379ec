"""The learning rate at each step (paper, section 4; decay legs: section 5.5), exactly as in Levanter."""

import math
from collections.abc import Mapping
from typing import Any


def learning_rate(
    step: int,
    *,
    schedule: str,
    steps: int,
    peak: float,
    warmup_share: float,
    decay_share: float,
    final_share: float = 0.0,
    branched_at: int = 0,
) -> float:
    """The rate at step `step` (0-based) of `steps`. With a warm-up, the first step has rate 0 and only fills Adam's
    moments. A decay begins with a step at the peak and would reach 0 one step after the last.

    wsd: linear warm-up, constant, linear decay to 0. cosine: linear warm-up, then half a cosine to `final_share` of
    the peak. decay: linear from the peak to 0 over the steps since `branched_at`, where the run branched off. Shares
    refer to the steps since then, rounded down to whole steps.
    """
    step, steps = max(0, step - branched_at), steps - branched_at
    warmup, decay = int(warmup_share * steps), int(decay_share * steps)
    if schedule == "decay":
        warmup, decay = 0, steps
    if step < warmup:
        return peak * step / warmup
    if schedule == "cosine":
        done = (step - warmup) / max(1, steps - warmup)
        height = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        return peak * (final_share + (1 - final_share) * height)
    if step < steps - decay:
        return peak
    return peak * max(0, steps - step) / max(1, decay)


def rate_at(step: int, settings: Mapping[str, Any], branched_at: int = 0) -> float:
    """`learning_rate` with a recipe's settings."""
    names = ("schedule", "steps", "warmup_share", "decay_share")
    shape = {name: settings[name] for name in names}
    final = settings.get("final_share", 0.0)  # not in checkpoints of earlier versions
    return learning_rate(step, peak=settings["learning_rate"], branched_at=branched_at, final_share=final, **shape)


def stable_steps(settings: Mapping[str, Any], branched_at: int = 0) -> range:
    """The steps after which a run is at its peak rate, where checkpoints can be continued from. Only wsd has any."""
    if settings["schedule"] != "wsd":
        return range(0)
    steps = settings["steps"] - branched_at
    warmup, decay = (int(settings[name] * steps) for name in ("warmup_share", "decay_share"))
    return range(branched_at + warmup + 1, settings["steps"] - max(0, decay - 1) + 1)
