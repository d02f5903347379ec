"""Sampling under the grammar: legal documents, the model's own probabilities, batches, seeds and limits."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.inference import sample as sampling
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.sample import Constraint, Sampled, sample
from megatron_soda.inference.studio import generated_codes
from megatron_soda.inference.task import Prompt
from tests.helpers import SPACE

CONSTRAINT = Constraint(SPACE, torch.device("cpu"))
LEGAL = torch.from_numpy(CONSTRAINT.grammar.legal())
SPEAK = [SPACE.bos, SPACE.text_start, 5, SPACE.text_end, SPACE.audio_start]


def qwen3(seed: int = 0, scale: float = 0.02) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=SPACE.size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        initializer_range=scale,
    )
    return Qwen3ForCausalLM(config).eval()


def draw(model: Any, prompt: list[int], budget: int, stop: tuple[int, ...] = (), **how: Any) -> list[Sampled]:
    return sample(Decoder(model), CONSTRAINT, [Prompt(prompt, set(stop), budget)], **how)


@given(st.integers(0, 10**6), st.integers(3, 60))
@settings(max_examples=20)
def test_a_model_that_knows_nothing_still_writes_documents(seed, budget):
    for row in draw(qwen3(seed, 0.5), [SPACE.bos], budget, count=4, seed=seed):
        assert SPACE.check(np.array(row.ids)) is None
        assert len(row.ids) <= budget + 1
        assert row.ended
        assert row.valid
        assert row.ended_by_itself == (not row.forced)
        assert row.nats == row.legal_mass == []  # nobody asked


def test_without_the_grammar_it_does_not():
    rows = draw(qwen3(), [SPACE.bos], 40, count=20, constrained=False)
    assert sum(row.valid and row.ended for row in rows) < 10
    for row in rows:
        assert row.valid == (CONSTRAINT.follow(row.ids) is not None)


def test_statistics_are_the_models_own():
    """Recomputed from whole-sequence logits without a cache, which also checks the cache."""
    model = qwen3(3, 0.3)
    for row in draw(model, [SPACE.bos], 30, seed=1, count=3, statistics=True):
        with torch.no_grad():
            probabilities = model(torch.tensor([row.ids])).logits[0].double().softmax(-1)
        assert len(row.legal_mass) == len(row.nats) == len(row.ids) - 1
        for i, (mass, nats) in enumerate(zip(row.legal_mass, row.nats, strict=True)):
            state = CONSTRAINT.follow(row.ids[: i + 1])
            assert mass == pytest.approx(float(probabilities[i][LEGAL[state]].sum()), abs=1e-5)
            assert nats == pytest.approx(-float(probabilities[i][row.ids[i + 1]].log()), abs=1e-5)


def test_only_the_legal_rows_of_the_head_are_computed(monkeypatch):
    asked = []
    logits = Decoder.logits

    def counted(self, hidden, first=0, end=None):
        asked.append((first, end))
        return logits(self, hidden, first, end)

    monkeypatch.setattr(Decoder, "logits", counted)
    (plain,) = draw(qwen3(1), SPEAK, 30, (SPACE.audio_end,), seed=2)
    base, size = SPACE.audio_base, SPACE.entries
    for place, (first, end) in enumerate(asked):
        begin = base + size * (place % 4)
        assert (first, end) in ((begin, begin + size), (begin - 1, begin + size), (begin - 1, begin))
    (told,) = draw(qwen3(1), SPEAK, 30, (SPACE.audio_end,), seed=2, statistics=True)
    assert told.ids == plain.ids
    assert asked[-1] == (0, None)


def test_rows_of_every_state_are_the_grammars():
    for state in range(CONSTRAINT.grammar.states):
        if not LEGAL[state].any():
            continue
        for left in (None, *range(int(CONSTRAINT.distance[state]), 8)):
            rows, wanted = CONSTRAINT.rows(state, left), LEGAL[state].clone()
            for token in wanted.nonzero()[:, 0].tolist() if left else ():
                wanted[token] = bool(CONSTRAINT.distance[CONSTRAINT.after(state, token)] <= left - 1)
            found = torch.zeros(SPACE.size, dtype=torch.bool)
            found[rows.first : rows.end] = True if rows.illegal is None else ~rows.illegal
            assert torch.equal(found, wanted)
            assert rows.forced == bool((wanted != LEGAL[state]).any())


def test_stop_and_whole_frames():
    (row,) = draw(qwen3(1), SPEAK, 30, (SPACE.audio_end,), seed=2)
    assert row.ids[-1] == SPACE.audio_end
    codes = generated_codes(row.ids, SPACE)
    assert codes.shape == ((len(row.ids) - len(SPEAK) - 1) // SPACE.codebooks, SPACE.codebooks)


def test_greedy_is_greedy():
    model = qwen3(2, 0.5)
    (row,) = draw(model, [SPACE.bos], 25, temperature=0.0)
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0]
    for i in range(len(row.ids) - 1):
        rows = CONSTRAINT.rows(CONSTRAINT.follow(row.ids[: i + 1]) or 0, 25 - i)
        some = logits[i][rows.first : rows.end]
        some = some if rows.illegal is None else some.masked_fill(rows.illegal, -torch.inf)
        assert row.ids[i + 1] == rows.first + int(some.argmax())


def test_prompts_of_unequal_length_are_what_they_are_alone():
    """In one batch, each with its own budget and stop tokens; rows leave the batch at different steps."""
    decoder = Decoder(qwen3(4, 0.4))
    prompts = [
        Prompt([SPACE.bos], set(), 40),
        Prompt(SPEAK, {SPACE.audio_end}, 30),
        Prompt([SPACE.bos, SPACE.audio_start, *range(SPACE.audio_base, SPACE.size, 16)], {SPACE.audio_end}, 9),
        Prompt([SPACE.bos, *range(3, 60)], set(), 60),
    ]
    together = sample(decoder, CONSTRAINT, prompts, count=3, seed=7)
    alone = [row for i, p in enumerate(prompts) for row in sample(decoder, CONSTRAINT, [p], count=3, seed=7 + i)]
    assert together == alone
    assert len({len(row.ids) for row in together}) > 4


def test_a_row_that_ended_at_its_limit_stays_in_the_batch():
    frame = [SPACE.bos, SPACE.audio_start, *range(SPACE.audio_base, SPACE.size, 16)]
    prompts = [Prompt(frame, {SPACE.audio_end}, 2), *[Prompt([SPACE.bos], set(), 40)] * 4]
    short, *others = sample(Decoder(qwen3(4, 0.4)), CONSTRAINT, prompts, seed=1)
    assert short.ids == [*frame, SPACE.audio_end]
    assert short.forced
    assert max(len(row.ids) for row in others) > 5


def test_tokens_are_told_as_they_come():
    told: dict[int, list[int]] = {}
    rows = draw(
        qwen3(1), SPEAK, 30, count=3, seed=2, on_token=lambda row, token: told.setdefault(row, []).append(token)
    )
    assert [told[i] for i in range(3)] == [row.ids[len(SPEAK) :] for row in rows]


@pytest.mark.parametrize(
    ("prompt", "budget", "message"),
    [
        ([5], 9, "not the start"),
        ([], 9, "not the start"),
        ([SPACE.bos], 1, "budget is 1"),
        ([SPACE.bos, 5, SPACE.eos], 9, "a whole document"),
        ([SPACE.bos, *[5] * 256], 9, "has 257 tokens, but the model's context is 256"),
    ],
)
def test_impossible_requests(prompt, budget, message):
    with pytest.raises(ValueError, match=message):
        draw(qwen3(), prompt, budget)


def drawn(**how: Any) -> torch.Tensor:
    """Shares of 4,000 draws from probabilities 0.5, 0.3, 0.15 and 0.05."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    uniform = torch.rand(4000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    chosen: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, **how}
    found = sampling._draw(logits, **chosen, uniform=uniform)
    return torch.bincount(found, minlength=4) / 4000


def test_how_a_token_is_drawn():
    assert drawn().tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.03)
    for how in ({"top_p": 0.7}, {"top_k": 2}):  # the smallest set; the likeliest two
        assert drawn(**how).tolist() == pytest.approx([0.5 / 0.8, 0.3 / 0.8, 0, 0], abs=0.03)
    assert drawn(temperature=0.5).tolist() == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.03)
    assert drawn(temperature=0.0).tolist() == drawn(top_k=1).tolist() == [1, 0, 0, 0]
    for temperature in (1e-5, 1e-40, 1e-300):  # no number overflows
        assert drawn(temperature=temperature).tolist() == [1, 0, 0, 0]
