"""Sampling under the slot grammar, token by token with a KV cache, for a batch of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ..vocab import Grammar, TokenSpace
from .decoder import Decoder
from .task import Prompt

COLDEST = 1e-6  # below this temperature the likeliest token is taken: a division by less could overflow


@dataclass
class Sampled:
    ids: list[int]  # prompt included
    ended: bool = False  # a stop token came
    forced: bool = False  # the token budget ruled out legal tokens, to close the document in time
    valid: bool = True  # every token was legal
    legal_mass: list[float] = field(default_factory=list)  # probability of the legal tokens at each step
    nats: list[float] = field(default_factory=list)  # -log p of each token at temperature 1, without the grammar

    @property
    def ended_by_itself(self) -> bool:
        """The model ended it: the token budget neither cut it off nor forced its end."""
        return self.ended and not self.forced


@dataclass(frozen=True, eq=False)
class LegalIds:
    """Which rows of the head compete for the next token."""

    first: int
    end: int
    illegal: Tensor | None  # bool (end - first,), those in between that do not; None: all do
    forced: bool = False  # the token budget rules out some that the grammar allows


class Constraint:
    """The legal tokens of every grammar state, and of every state with few tokens left. Masks are on `device`."""

    def __init__(self, space: TokenSpace, device: torch.device, slots: int = 0) -> None:
        self.grammar = Grammar(space, slots)
        self.device = device
        self.all = LegalIds(0, space.size, None)
        self.kinds = space.kind_table()  # int8 (size,)
        self.following = self.grammar.transitions()
        self.distance = self.grammar.shortest_end()
        # The token budget matters in a state once a legal token could lead too far from the end for the budget.
        self.furthest = np.where(self.following >= 0, self.distance[self.following], -1).max(1)
        self._rows = lru_cache(256)(self._find_rows)

    def after(self, state: int, token: int) -> int:
        """The state after a token, -1 if it is illegal."""
        return int(self.following[state, self.kinds[token]])

    def follow(self, ids: list[int]) -> int | None:
        """The state after `ids`, documents one after another; None if one of them is illegal."""
        state = Grammar.START
        for token in ids:
            state = self.after(state, token)
            if state < 0:
                return None
        return state

    def rows(self, state: int, left: int | None = None) -> LegalIds:
        """The legal tokens in `state`; given `left`, only those after which the document can still end within that many
        tokens, including this one."""
        ample = left is None or self.furthest[state] <= left - 1
        return self._rows(state, None if ample else left)

    def _find_rows(self, state: int, left: int | None) -> LegalIds:
        after = self.following[state]
        allowed = after >= 0
        if left is not None:
            allowed &= self.distance[after] <= left - 1
        legal = allowed[self.kinds]
        ids = np.flatnonzero(legal)
        first, end = int(ids[0]), int(ids[-1]) + 1
        illegal = None if len(ids) == end - first else torch.from_numpy(~legal[first:end]).to(self.device)
        return LegalIds(first, end, illegal, left is not None)


@dataclass
class _Row:
    """A generation in progress."""

    result: Sampled
    stop: set[int]
    state: int  # of the grammar
    left: int  # tokens of the budget
    going: bool = True

    def take(self, token: int, after: int, forced: bool) -> None:
        result = self.result
        result.ids.append(token)
        result.forced |= forced
        result.valid = after >= 0
        result.ended = result.valid and (token in self.stop or after == Grammar.END)
        self.going = result.valid and not result.ended and self.left > 1
        if self.going:  # otherwise it may stay in the batch, where it needs a state that has legal tokens
            self.state = after
            self.left -= 1


def sample(
    decoder: Decoder,
    constraint: Constraint,
    prompts: Sequence[Prompt],
    *,
    count: int = 1,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    constrained: bool = True,
    statistics: bool = False,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Sampled]:
    """`count` continuations of each prompt, in the order of the prompts: at most prompt.max_tokens new tokens each,
    until a token of prompt.stop. The prompts may differ in length. Prompt i draws with seed + i.

    Args:
        temperature: 0 takes the likeliest token. top_k: draws from so many of the likeliest; 0: from all. top_p: draws
        from the fewest tokens that have this probability together. constrained: every token is legal and a document can
        always close within its budget (`forced` if it had to); the head is computed for the legal tokens alone.
        Otherwise a row ends at its first illegal token. statistics: records `legal_mass` and `nats`, for which the
        whole head is computed. on_token: called with (row, token) as soon as a token is drawn.

    Raises ValueError if a prompt is empty, not the start of a document or longer than the model's context, or if its
    budget is too small for the shortest ending.
    """
    states = [_start(constraint, prompt, constrained) for prompt in prompts]
    rows = [
        _Row(Sampled(list(prompt.ids)), prompt.stop, state, prompt.max_tokens)
        for prompt, state in zip(prompts, states, strict=True)
        for _ in range(count)
    ]
    choice = _Choice(decoder, constraint, temperature, top_p, top_k, constrained, statistics)
    generators = [torch.Generator(decoder.device).manual_seed(seed + i) for i in range(len(prompts))]
    hidden, cache = decoder.prefill([prompt.ids for prompt in prompts], max(row.left for row in rows))
    if count > 1:
        copies = [i for i in range(len(prompts)) for _ in range(count)]
        hidden, cache = hidden[copies], cache.select(copies)
    batch = list(range(len(rows)))  # which rows hidden states and cache are of
    while True:
        drawn = [torch.rand(count, 1, dtype=torch.float64, device=decoder.device, generator=g) for g in generators]
        chosen = choice.choose(hidden, [rows[i] for i in batch], torch.cat(drawn)[batch])
        for i, token in zip(batch, chosen.tolist(), strict=True):
            row = rows[i]
            if row.going:
                legal = choice.legal(row)
                row.take(token, constraint.after(row.state, token), legal.forced)
                if on_token:
                    on_token(i, token)
        going = [place for place, i in enumerate(batch) if rows[i].going]
        if not going:
            return [row.result for row in rows]
        if len(going) <= len(batch) // 2:  # the others cost more than a copy of the cache does
            batch, chosen, cache = [batch[place] for place in going], chosen[going], cache.select(going)
        hidden = decoder.step(chosen, cache)


def _start(constraint: Constraint, prompt: Prompt, constrained: bool) -> int:
    """The grammar's state after a prompt."""
    state = constraint.follow(prompt.ids)
    if state is None or not prompt.ids:
        raise ValueError("the prompt is not the start of a document")
    if state == Grammar.END:
        raise ValueError("the prompt is a whole document: nothing can follow")
    needed = constraint.distance[state] if constrained else 1
    if needed > prompt.max_tokens:
        raise ValueError(f"a document needs {needed} more tokens, but the budget is {prompt.max_tokens}")
    return state


@dataclass(frozen=True)
class _Choice:
    """How the next tokens of a batch are chosen."""

    decoder: Decoder
    constraint: Constraint
    temperature: float
    top_p: float
    top_k: int
    constrained: bool
    statistics: bool

    def legal(self, row: _Row) -> LegalIds:
        return self.constraint.rows(row.state, row.left) if self.constrained else self.constraint.all

    @torch.inference_mode()
    def choose(self, hidden: Tensor, rows: list[_Row], uniform: Tensor) -> Tensor:
        """int64 (rows,): a token for each row. hidden: (rows, hidden); uniform: float64 (rows, 1)."""
        chosen = torch.empty(len(rows), dtype=torch.long, device=hidden.device)
        whole = self.decoder.logits(hidden) if self.statistics else None
        groups: dict[LegalIds, list[int]] = {}
        for place, row in enumerate(rows):
            groups.setdefault(self.legal(row), []).append(place)
        for legal, places in groups.items():
            index = slice(None) if len(groups) == 1 else torch.tensor(places, device=hidden.device)
            if whole is None:
                logits = self.decoder.logits(hidden[index], legal.first, legal.end)
            else:
                logits = whole[index][:, legal.first : legal.end]
            if legal.illegal is not None:
                logits = logits.masked_fill(legal.illegal, -torch.inf)
            chosen[index] = legal.first + _draw(logits, self.temperature, self.top_p, self.top_k, uniform[index])
        if whole is not None:
            self._record(whole.log_softmax(-1), rows, chosen)
        return chosen

    def _record(self, whole: Tensor, rows: list[_Row], chosen: Tensor) -> None:
        masses = []
        for logs, row in zip(whole, rows, strict=True):
            legal = self.constraint.rows(row.state)
            mass = logs[legal.first : legal.end].exp()
            masses.append((mass if legal.illegal is None else mass[~legal.illegal]).sum())
        found = torch.stack([torch.stack(masses), -whole.gather(1, chosen[:, None])[:, 0]]).tolist()
        for row, mass, nats in zip(rows, *found, strict=True):
            if row.going:
                row.result.legal_mass.append(mass)
                row.result.nats.append(nats)


def _draw(logits: Tensor, temperature: float, top_p: float, top_k: int, uniform: Tensor) -> Tensor:
    """int64 (rows,): one token per row. uniform: float64 (rows, 1) in [0, 1), what chance decides."""
    if temperature < COLDEST:
        return logits.argmax(-1)
    if 0 < top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -torch.inf)
    probabilities = (logits / temperature).softmax(-1)
    if top_p < 1.0:
        ordered, order = probabilities.sort(-1, descending=True)
        ordered[ordered.cumsum(-1) - ordered > top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    # By the inverse of the cumulative distribution, in float64: a token of probability 0 is never drawn.
    cumulative = probabilities.double().cumsum(-1)
    return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]
