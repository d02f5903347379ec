"""Sampling under the slot grammar, a token at a time with a KV cache."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..vocab import Grammar, TokenSpace


@dataclass
class Sampled:
    ids: list[int]  # prompt included
    ended: bool = False  # a stop token came
    forced: bool = False  # the token budget took legal tokens away, to close the document in time
    valid: bool = True  # every token was legal
    legal_mass: list[float] = field(default_factory=list)  # probability of the legal tokens, before each token


class Constraint:
    """The legal tokens of every grammar state, and of every state with few tokens left."""

    def __init__(self, space: TokenSpace, device: torch.device) -> None:
        self.grammar = Grammar(space)
        self.kinds = space.kind_table()
        self.legal = torch.from_numpy(self.grammar.legal()).to(device)
        self.distance = self.grammar.shortest_end()
        self._kinds = torch.from_numpy(self.kinds).to(device)

    def follow(self, ids: list[int], state: int = Grammar.START) -> int | None:
        """The state after `ids`, None if one of them is illegal."""
        for token in ids:
            following = self.grammar.step.get((state, int(self.kinds[token])))
            if following is None:
                return None
            state = following
        return state

    def within(self, state: int, left: int) -> tuple[Tensor, bool]:
        """bool (size,): legal tokens after which the document can still end within `left` tokens, this one included;
        and whether that is fewer than all legal ones."""
        moves = {kind: following for (s, kind), following in self.grammar.step.items() if s == state}
        fitting = [kind for kind, following in moves.items() if self.distance[following] <= left - 1]
        if len(fitting) == len(moves):
            return self.legal[state], False
        allowed = torch.tensor(fitting, dtype=self._kinds.dtype, device=self._kinds.device)
        return torch.isin(self._kinds, allowed), True


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

    Constrained, every token is legal and a document always can close within the budget (`forced` tells that it had
    to). Not constrained, a row ends at its first illegal token. ValueError if the prompt itself is illegal or the
    budget cannot hold the shortest ending.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    start = constraint.follow(prompt)
    if start is None:
        raise ValueError("the prompt is not the start of a document")
    if constrained and constraint.distance[start] > max_tokens:
        raise ValueError(f"a document needs {constraint.distance[start]} more tokens, the budget is {max_tokens}")
    rows = [Sampled(list(prompt)) for _ in range(count)]
    states = [start] * count
    active = np.ones(count, bool)
    ids = torch.tensor([prompt] * count, device=device)
    cache = None
    for step in range(max_tokens):
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        logits = out.logits[:, -1].float()
        probabilities = logits.softmax(-1)
        for i in np.flatnonzero(active):
            rows[i].legal_mass.append(float(probabilities[i][constraint.legal[states[i]]].sum()))
            if constrained:
                mask, fewer = constraint.within(states[i], max_tokens - step)
                rows[i].forced |= fewer
                logits[i].masked_fill_(~mask, -torch.inf)
        chosen = _draw(logits, temperature, top_p, generator)
        for i in np.flatnonzero(active):
            token = int(chosen[i])
            rows[i].ids.append(token)
            state = constraint.grammar.step.get((states[i], int(constraint.kinds[token])))
            if state is None:
                rows[i].valid, active[i] = False, False
            elif token in stop or state == Grammar.END:
                rows[i].ended, active[i] = True, False
            else:
                states[i] = state
        if not active.any():
            break
        ids = chosen[:, None]
    return rows


def _draw(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """int64 (rows,): one token a row, from the smallest set of tokens that holds `top_p` of the probability."""
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
