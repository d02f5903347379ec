"""Train, valid and test, so that one prompt never stands on two sides, in any language."""

import hashlib
from collections.abc import Iterable


def split_prompts(prompts: Iterable[str], valid_share: float, test_share: float) -> dict[str, str]:
    """prompt -> "train" | "valid" | "test". Depends on the set of prompts alone, not on their order.

    A share above 0 gets at least one prompt if there are three.
    """
    ordered = sorted(set(prompts), key=lambda p: hashlib.sha256(p.encode()).digest())
    least = 1 if len(ordered) >= 3 else 0
    test = max(round(test_share * len(ordered)), least if test_share else 0)
    valid = max(round(valid_share * len(ordered)), least if valid_share else 0)
    sides = ["test"] * test + ["valid"] * valid + ["train"] * (len(ordered) - test - valid)
    return dict(zip(ordered, sides, strict=True))
