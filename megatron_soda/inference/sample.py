"""Sampling under the slot grammar, token by token with a KV cache."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..vocab import Grammar, TokenSpace


@dataclass
class Sampled:
    ids: list[int]  # prompt included
    ended: bool = False  # a stop token came
    forced: bool = False  # the token budget ruled out legal tokens, to close the document in time
    valid: bool = True  # every token was legal
    legal_mass: list[float] = field(default_factory=list)  # probability of the legal tokens at each step
    nats: list[float] = field(default_factory=list)  # -log p of each token at temperature 1, without the grammar


class Constraint:
    """The legal tokens of every grammar state, and of every state with few tokens left, as tables on a device."""

    def __init__(self, space: TokenSpace, device: torch.device, slots: int = 0) -> None:
        self.grammar = Grammar(space, slots)
        self.legal = torch.from_numpy(self.grammar.legal()).to(device)  # bool (states, size)
        self.kinds = torch.from_numpy(space.kind_table()).long().to(device)  # (size,)
        following = torch.full((self.grammar.states, int(self.kinds.max()) + 1), -1)
        for (state, kind), after in self.grammar.step.items():
            following[state, kind] = after
        self.following = following.to(device)  # (states, kinds), -1: illegal
        self.distance = torch.from_numpy(self.grammar.shortest_end()).to(device)
        # The token budget matters in a state once a legal token could lead too far from the end for the budget.
        self.furthest = torch.where(self.following >= 0, self.distance[self.following], -1).amax(1)

    def follow(self, ids: list[int]) -> int | None:
        """The state after `ids` from the start of a document, None if one of them is illegal."""
        state = Grammar.START
        for token in ids:
            state = int(self.following[state, self.kinds[token]])
            if state < 0:
                return None
        return state

    def within(self, states: Tensor, left: int) -> tuple[Tensor, Tensor]:
        """bool (rows, size): legal tokens after which the document can still end within `left` tokens, including this
        one; and bool (rows,): whether these are fewer than all legal ones."""
        mask = self.legal[states]
        fewer = self.furthest[states] > left - 1
        for row in fewer.nonzero()[:, 0].tolist():
            after = self.following[states[row]]
            fits = (after >= 0) & (self.distance[after] <= left - 1)
            mask[row] &= fits[self.kinds]
        return mask, fewer


@torch.no_grad()
def sample(
    model: torch.nn.Module,
    constraint: Constraint,
    prompt: list[int],
    *,
    count: int = 1,
    max_tokens: int,
    stop: set[int],
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    constrained: bool = True,
) -> list[Sampled]:
    """`count` continuations of one prompt, at most `max_tokens` new tokens each, until a token of `stop`.

    If constrained, every token is legal and a document can always close within the budget (`forced` if it had to).
    Otherwise, a row ends at its first illegal token. Raises ValueError if the prompt is illegal or the budget is too
    small for the shortest ending.
    """
    from transformers import DynamicCache

    device = constraint.legal.device
    generator = torch.Generator(device).manual_seed(seed)
    start = constraint.follow(prompt)
    if start is None:
        raise ValueError("the prompt is not the start of a document")
    if constrained and constraint.distance[start] > max_tokens:
        raise ValueError(f"a document needs {constraint.distance[start]} more tokens, but the budget is {max_tokens}")
    rows = [Sampled(list(prompt)) for _ in range(count)]
    states = torch.full((count,), start, device=device)
    active = torch.ones(count, dtype=torch.bool, device=device)
    stops = torch.tensor(sorted(stop), dtype=torch.long, device=device)
    ids = torch.tensor([prompt] * count, device=device)
    cache = DynamicCache()
    for step in range(max_tokens):
        logits = model(input_ids=ids, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
        whole = logits.log_softmax(-1)
        mass = (whole.exp() * constraint.legal[states]).sum(-1)
        fewer = torch.zeros_like(active)
        if constrained:
            mask, fewer = constraint.within(states, max_tokens - step)
            logits = logits.masked_fill(~mask & active[:, None], -torch.inf)
        chosen = _draw(logits, temperature, top_p, generator)
        after = constraint.following[states, constraint.kinds[chosen]]
        ended = torch.isin(chosen, stops) | (after == Grammar.END)
        nats = -whole.gather(1, chosen[:, None])[:, 0]
        columns = (active, chosen, nats, mass, fewer, after, ended)
        record = zip(*(column.tolist() for column in columns), strict=True)
        for row, (is_active, token, row_nats, row_mass, row_fewer, row_after, row_ended) in zip(
            rows, record, strict=True
        ):
            if is_active:
                row.ids.append(token)
                row.nats.append(row_nats)
                row.legal_mass.append(row_mass)
                row.forced |= row_fewer
                row.valid = row_after >= 0
                row.ended = row.valid and row_ended
        active &= (after >= 0) & ~ended
        if not active.any():
            break
        states = torch.where(active, after, states)
        ids = chosen[:, None]
    return rows


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """int64 (rows,): one token per row, from the smallest set of tokens with total probability `top_p`."""
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # By the inverse of the cumulative distribution, in float64: a token of probability 0 is never drawn.
    cumulative = probabilities.double().cumsum(-1)
    uniform = torch.rand(len(logits), 1, dtype=torch.float64, device=logits.device, generator=generator)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
