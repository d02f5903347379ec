"""Train, valid and test, so that one prompt, or one text, never stands on two sides, in any language."""

import hashlib
from collections.abc import Iterable


def split(pairs: Iterable[tuple[str, str]], valid_share: float, test_share: float) -> dict[str, str]:
    """(prompt, text) pairs -> {prompt: "train" | "valid" | "test"}.

    Prompts that share a text stay together. The result depends on the set of pairs, not on their order. A share above
    0 gets at least one group of prompts if there are three. Shares are of the groups.
    """
    groups = _groups(sorted(set(pairs)))
    ordered = sorted(groups, key=lambda prompts: hashlib.sha256(prompts[0].encode()).digest())
    least = 1 if len(ordered) >= 3 else 0
    test = max(round(test_share * len(ordered)), least if test_share else 0)
    valid = max(round(valid_share * len(ordered)), least if valid_share else 0)
    sides = ["test"] * test + ["valid"] * valid + ["train"] * (len(ordered) - test - valid)
    return {prompt: side for prompts, side in zip(ordered, sides, strict=True) for prompt in prompts}


def _groups(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """Prompts joined by common texts, each group sorted: union-find over the texts."""
    parent: dict[str, str] = {}

    def root(prompt: str) -> str:
        while parent[prompt] != prompt:
            prompt = parent[prompt]
        return prompt

    first: dict[str, str] = {}
    for prompt, text in pairs:
        parent.setdefault(prompt, prompt)
        one, other = sorted((root(prompt), root(first.setdefault(text, prompt))))
        parent[other] = one
    groups: dict[str, list[str]] = {}
    for prompt in parent:
        groups.setdefault(root(prompt), []).append(prompt)
    return [sorted(group) for group in groups.values()]
