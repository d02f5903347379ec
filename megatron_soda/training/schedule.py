"""Warm-up, stable, decay (paper, section 4): linear up, constant, linear down to 0."""


def learning_rate(step: int, *, steps: int, peak: float, warmup_share: float, decay_share: float) -> float:
    """The rate of step `step` (0-based) of `steps`. The first step already moves; the step after the last has 0."""
    warmup, decay = round(warmup_share * steps), round(decay_share * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if step >= steps - decay:
        return peak * max(0, steps - step) / (decay + 1)
    return peak
