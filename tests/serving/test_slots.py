"""What vLLM is given: the grammar of vocab.py, whichever way a request's tokens come."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.inference.sample import Constraint
from megatron_soda.serving.slots import DeviceTokens, ListedTokens, SlotMask
from megatron_soda.vocab import Grammar
from tests.helpers import SPACE, documents

CPU = torch.device("cpu")
MASK = SlotMask(SPACE, CPU)
LEGAL = Grammar(SPACE).legal()
CONSTRAINT = Constraint(SPACE, CPU)
AFTER = {Grammar.END: Grammar.START}  # a document ends, and the next one starts


def random_ids(seed: int, damage: bool) -> list[int]:
    """The start of a few documents, or, damaged, with a token that may be any."""
    rng = np.random.default_rng(seed)
    ids = np.concatenate(documents(3, seed))[: rng.integers(1, 150)]
    if damage:
        ids[rng.integers(len(ids))] = rng.integers(SPACE.size)
    return ids.tolist()


def expected(ids: list[int]) -> int:
    state = CONSTRAINT.follow(ids)
    return MASK.refused if state is None else state


def test_every_state_allows_what_the_grammar_does():
    for state in range(Grammar(SPACE).states):
        assert np.array_equal(~MASK.illegal[state].numpy(), LEGAL[AFTER.get(state, state)])
    assert not MASK.illegal[MASK.free].any()
    assert (~MASK.illegal[MASK.refused]).nonzero().tolist() == [[SPACE.eos]]


@given(st.integers(0, 10**6), st.booleans())
@settings(max_examples=60)
def test_tokens_on_the_host(seed, damage):
    """All at once, or as they come; some are taken back."""
    ids = random_ids(seed, damage)
    rng = np.random.default_rng(seed)
    prompt = int(rng.integers(len(ids)))
    state, wrong = MASK.walk(ids[:prompt])
    assert state == expected(ids[:prompt])
    assert bool(wrong) == (state == MASK.refused)
    request = ListedTokens(MASK, state, [])
    for end in range(prompt, len(ids) + 1):
        request.output[:] = ids[prompt:end]
        if rng.random() < 0.7:
            assert request.now() == expected(ids[:end])
        if rng.random() < 0.1 and end > prompt:
            request.output.pop()
            assert request.now() == expected(ids[: end - 1])


@given(st.integers(0, 10**6))
@settings(max_examples=30)
def test_tokens_on_the_device(seed):
    """Requests of unequal length, in batches whose rows change places, some of them free, some not in a step; slots are
    used again, and a request comes back with tokens of its answer in its prompt."""
    rng = np.random.default_rng(seed)
    slots, table = 5, torch.zeros(5, 200, dtype=torch.int32)
    tracked = DeviceTokens(MASK, slots, CPU)
    ids: list[list[int]] = [[] for _ in range(slots)]
    done, free = [0] * slots, [False] * slots  # tokens that the model was given; whether a request is free
    for turn in range(40):
        new = [slot for slot in range(slots) if not turn or rng.random() < 0.1]
        for slot in new:
            back = turn and rng.random() < 0.5
            if not back:
                ids[slot], free[slot] = random_ids(int(rng.integers(10**6)), rng.random() < 0.3), rng.random() < 0.3
            done[slot] = len(ids[slot]) if back and done[slot] else int(rng.integers(1, len(ids[slot]) + 1))
            table[slot] = int(rng.integers(SPACE.size))  # of whoever had the slot before
            table[slot, : done[slot]] = torch.tensor(ids[slot][: done[slot]])
        if new:
            tracked.begin(new, [done[s] for s in new], [not free[s] for s in new], table)
        rows = rng.permutation(slots)[: rng.integers(1, slots + 1)].tolist()
        tokens, places = [ids[s][done[s] - 1] for s in rows], [done[s] - 1 for s in rows]
        for _ in range(2):  # a step that is taken twice
            states = tracked.advance(torch.tensor(rows), torch.tensor(tokens), torch.tensor(places))
            assert states.tolist() == [MASK.free if free[s] else expected(ids[s][: done[s]]) for s in rows]
        for slot in rows:
            if done[slot] == len(ids[slot]):
                ids[slot].append(int(rng.integers(SPACE.size)))
            done[slot] += 1


@pytest.mark.parametrize("lengths", [[1], [2, 1, 7], [0, 33, 32, 31]])
def test_prompts_of_any_length(lengths):
    longest = max(lengths)
    ids = np.stack([np.concatenate(documents(9, seed))[:longest] for seed in range(len(lengths))])
    states = MASK.follow(torch.from_numpy(ids), torch.tensor(lengths))
    assert states.tolist() == [expected(row[:n].tolist()) for row, n in zip(ids, lengths, strict=True)]


def test_a_request_is_masked_by_its_state():
    logits = torch.randn(4, SPACE.size)
    states = torch.tensor([Grammar.OPEN, MASK.free, Grammar(SPACE).frame[2], MASK.refused])
    masked = MASK.apply(logits.clone(), states)
    assert torch.equal(masked == -torch.inf, MASK.illegal[states])
    assert torch.equal(masked[masked > -torch.inf], logits[masked > -torch.inf])


def test_what_is_wrong_with_a_prompt_is_said():
    ids = [SPACE.bos, SPACE.audio_start, SPACE.audio_base, SPACE.audio_base]
    assert MASK.walk(ids)[1] == "token 3: a code of codebook 0 is not legal at slot 1 of an audio frame"
    assert SPACE.check(np.array(ids)) == MASK.walk(ids)[1]


def test_a_token_that_is_not_known_yet():
    with pytest.raises(RuntimeError, match="not known"):
        ListedTokens(MASK, Grammar.OPEN, [5, -1]).now()
