"""The learning rate of a step (paper, section 4; decay legs: section 5.5)."""

import math


def learning_rate(
    step: int, *, schedule: str, steps: int, peak: float, warmup_share: float, decay_share: float, branched_at: int = 0
) -> float:
    """The rate of step `step` (0-based) of `steps`. The first step already moves; the step after the last has 0.

    wsd: linear warm-up, constant, linear decay to 0. cosine: linear warm-up, then half a cosine to 0. decay: from the
    peak to 0, linearly, over the steps since `branched_at`, where the run left the one it branched off.
    """
    if schedule == "decay":
        return peak * max(0, steps - step) / (steps - branched_at + 1)
    warmup = round(warmup_share * (steps - branched_at))
    if step - branched_at < warmup:
        return peak * (step - branched_at + 1) / warmup
    if schedule == "cosine":
        done = (step - branched_at - warmup) / max(1, steps - branched_at - warmup)
        return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    decay = round(decay_share * (steps - branched_at))
    if step >= steps - decay:
        return peak * max(0, steps - step) / (decay + 1)
    return peak
