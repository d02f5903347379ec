"""The slot grammar over a batch of requests: which tokens each may be given next. vllm.py hands it to vLLM.

It runs in vLLM's environment, which need not have our other dependencies: of this package it imports only vocab.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..vocab import Grammar, TokenSpace

PROCESSOR = "megatron_soda.serving.vllm:SlotGrammar"  # as vLLM is told


class SlotMask:
    """The grammar's states and two more, as tensors on `device`.

    free: any token may follow, and the state stays. refused: after an illegal token; only EOS may follow, so that the
    request ends at once. After the end of a document only the next one may start.
    """

    def __init__(self, space: TokenSpace, device: torch.device) -> None:
        self.grammar, kinds = Grammar(space), space.kind_table()
        self.refused, self.free = self.grammar.states, self.grammar.states + 1
        rows = self.grammar.transitions()
        extra = np.repeat([[self.refused], [self.free]], rows.shape[1], axis=1)
        after = np.concatenate([np.where(rows < 0, self.refused, rows), extra])
        illegal = after[:, kinds] == self.refused
        illegal[self.refused, space.eos] = False
        self.kinds = torch.from_numpy(kinds.astype(np.int64)).to(device)  # (ids,)
        self.after = torch.from_numpy(after).to(device)  # int64 (states, kinds)
        self.illegal = torch.from_numpy(illegal).to(device)  # bool (states, ids)
        self._kinds, self._after = kinds.tobytes(), after.tolist()  # for tokens on the host

    def step(self, state: int, token: int) -> int:
        """The state after a token in `state`."""
        return self._after[state][self._kinds[token]]

    def walk(self, ids: Iterable[int]) -> tuple[int, str]:
        """The state after `ids`, from the start of a document, and what is wrong with them, if anything is."""
        state = Grammar.START
        for place, token in enumerate(ids):
            before, state = state, self.step(state, token)
            if state == self.refused:
                name, where = self.grammar.name(self._kinds[token]), self.grammar.where(before)
                return state, f"token {place}: {name} is not legal {where}"
        return state, ""

    def follow(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """int64 (rows,): the states after the first `lengths` of each row of `ids` (rows, longest), without waiting for
        the device. A token maps states to states; the maps of a row are composed in pairs."""
        longest = ids.shape[1]
        same = torch.arange(len(self.after), device=ids.device)
        maps = self.after.T[self.kinds[ids.long()]]  # (rows, longest, states)
        beyond = torch.arange(longest, device=ids.device) >= lengths[:, None]
        maps = torch.where(beyond[:, :, None], same, maps)
        while maps.shape[1] > 1:
            if maps.shape[1] % 2:
                maps = torch.cat([maps, same.expand(len(maps), 1, -1)], 1)
            maps = maps[:, 1::2].gather(2, maps[:, ::2])
        return maps[:, 0, Grammar.START]

    def apply(self, logits: Tensor, states: Tensor) -> Tensor:
        """Sets what may not follow to -inf, in place. logits: (rows, ids); states: int64 (rows,)."""
        return logits.masked_fill_(self.illegal[states], -torch.inf)


@dataclass
class ListedTokens:
    """A request whose output is a list on the host, which grows by itself."""

    mask: SlotMask
    start: int  # the state after the prompt
    output: list[int]
    state: int = 0
    seen: int = 0  # tokens of the output that `state` is after

    def now(self) -> int:
        """The state after all tokens so far."""
        if not 0 < self.seen <= len(self.output):  # none yet, or some were taken back
            self.state, self.seen = self.start, 0
        for token in self.output[self.seen :]:
            if token < 0:
                raise RuntimeError("a token was not known before the next one was to be sampled")
            self.state = self.mask.step(self.state, token)
        self.seen = len(self.output)
        return self.state


class DeviceTokens:
    """The states of requests whose tokens are on the device, by slot. Nothing here waits for the device."""

    def __init__(self, mask: SlotMask, slots: int, device: torch.device) -> None:
        self.mask, self.device = mask, device
        self.states = torch.full((slots,), mask.free, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)  # tokens that `states` are after

    def begin(self, slots: list[int], lengths: list[int], constrained: list[bool], ids: Tensor) -> None:
        """New requests. ids: (all slots, context); the first `lengths` of their rows are known."""
        index, sizes, on = (self._moved(values) for values in (slots, lengths, constrained))
        states = self.mask.follow(ids[index, : max(lengths)], sizes)
        self.states[index] = torch.where(on, states, self.mask.free)
        self.lengths[index] = sizes

    def advance(self, slots: Tensor, tokens: Tensor, positions: Tensor) -> Tensor:
        """int64 (rows,): the states after the tokens that the model was given last, at their positions. Those that
        `begin` or an earlier call has followed are not followed again."""
        before, known = self.states[slots], self.lengths[slots]
        new = positions >= known
        states = torch.where(new, self.mask.after[before, self.mask.kinds[tokens.long()]], before)
        self.states[slots] = states
        self.lengths[slots] = torch.where(new, positions.long() + 1, known)
        return states

    def _moved(self, values: list[int] | list[bool]) -> Tensor:
        pinned = torch.tensor(values, pin_memory=self.device.type == "cuda")
        return pinned.to(self.device, non_blocking=True)
