import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.studio import generated_codes
from tests.helpers import SPACE


def qwen3(seed: int = 0, scale: float = 0.02):
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


CONSTRAINT = Constraint(SPACE, torch.device("cpu"))


@given(st.integers(0, 10**6), st.integers(3, 60))
@settings(max_examples=20)
def test_a_model_that_knows_nothing_still_writes_documents(seed, budget):
    rows = sample(qwen3(seed, 0.5), CONSTRAINT, [SPACE.bos], count=4, max_tokens=budget, stop=set(), seed=seed)
    for row in rows:
        assert SPACE.check(np.array(row.ids)) is None
        assert len(row.ids) <= budget + 1
        assert row.ended
        assert row.valid


def test_without_the_grammar_it_does_not():
    rows = sample(qwen3(), CONSTRAINT, [SPACE.bos], count=20, max_tokens=40, stop=set(), constrained=False)
    assert sum(row.valid and row.ended for row in rows) < 10
    for row in rows:
        assert row.valid == (CONSTRAINT.follow(row.ids) is not None)


def test_nothing_is_called_that_goes_away():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        sample(qwen3(), CONSTRAINT, [SPACE.bos], max_tokens=4, stop=set())


def test_legal_mass_is_the_models_own():
    """Recomputed from whole-sequence logits without a cache, which also checks the cache."""
    model = qwen3(3, 0.3)
    row = sample(model, CONSTRAINT, [SPACE.bos], max_tokens=30, stop=set(), seed=1)[0]
    with torch.no_grad():
        probabilities = model(torch.tensor([row.ids])).logits[0].double().softmax(-1)
    for i, mass in enumerate(row.legal_mass):
        state = CONSTRAINT.follow(row.ids[: i + 1])
        assert mass == pytest.approx(float(probabilities[i][CONSTRAINT.legal[state]].sum()), abs=1e-5)


def test_stop_and_whole_frames():
    prompt = [SPACE.bos, SPACE.text_start, 5, SPACE.text_end, SPACE.audio_start]
    row = sample(qwen3(1), CONSTRAINT, prompt, max_tokens=30, stop={SPACE.audio_end}, seed=2)[0]
    assert row.ids[-1] == SPACE.audio_end
    codes = generated_codes(row.ids, SPACE)
    assert codes.shape == ((len(row.ids) - len(prompt) - 1) // SPACE.codebooks, SPACE.codebooks)


def test_greedy_is_greedy():
    model = qwen3(2, 0.5)
    row = sample(model, CONSTRAINT, [SPACE.bos], max_tokens=25, stop=set(), temperature=1e-4)[0]
    with torch.no_grad():
        logits = model(torch.tensor([row.ids])).logits[0]
    for i in range(len(row.ids) - 1):
        mask, _ = CONSTRAINT.within(torch.tensor([CONSTRAINT.follow(row.ids[: i + 1])]), 25 - i)
        assert row.ids[i + 1] == int(logits[i].masked_fill(~mask[0], -torch.inf).argmax())


@pytest.mark.parametrize(("prompt", "budget", "message"), [([5], 9, "not the start"), ([SPACE.bos], 1, "budget is 1")])
def test_impossible_requests(prompt, budget, message):
    with pytest.raises(ValueError, match=message):
        sample(qwen3(), CONSTRAINT, prompt, max_tokens=budget, stop=set())


def test_top_p_keeps_the_smallest_set():
    from megatron_soda.inference.sample import _draw

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    drawn = _draw(logits, 1.0, 0.7, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn, minlength=4) / 4000
    assert shares[2:].sum() == 0
    assert shares[0] == pytest.approx(0.5 / 0.8, abs=0.03)
