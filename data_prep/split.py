"""Prompts that must stand on one side of a split, because they share a text."""


def group_prompts(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """(prompt, text) pairs -> prompts joined by common texts, each group sorted: union-find over the texts."""
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
