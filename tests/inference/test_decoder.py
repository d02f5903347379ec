"""The decoder against transformers: logits of every step, greedy tokens, unequal prompts, copies of weights."""

from typing import Any

import pytest
import torch

from megatron_soda.errors import SodaError
from megatron_soda.inference.decoder import Decoder
from megatron_soda.ops import library
from tests.qwen3 import random_qwen3

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 32,
}
SHAPES: dict[str, dict[str, Any]] = {
    "groups": {},
    "every head its own": {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "one group": {"num_key_value_heads": 1, "head_dim": 8},
    "scaled positions": {"rope_parameters": LLAMA3},
    "odd sizes": {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 3, "num_key_value_heads": 3},
}
PROMPTS = [[1, 5, 9, 33, 7], [2, 8], [3, 3, 60, 41, 77, 12, 90, 4, 6]]


@pytest.fixture(params=SHAPES, scope="module")
def model(request, tmp_path_factory) -> Any:
    return random_qwen3(tmp_path_factory.mktemp("model"), rows=101, **SHAPES[request.param])


@torch.no_grad()
def greedy(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    """Of transformers, without a cache: ids, and the logits at each."""
    ids, found = list(prompt), []
    for _ in range(tokens):
        found.append(model(torch.tensor([ids])).logits[0, -1].float())
        ids.append(int(found[-1].argmax()))
    return ids[len(prompt) :], torch.stack(found)


def decode(decoder: Decoder, prompts: list[list[int]], tokens: int) -> tuple[list[list[int]], torch.Tensor]:
    hidden, cache = decoder.prefill(prompts, tokens)
    ids, found = [], []
    for _ in range(tokens):
        found.append(decoder.logits(hidden))
        ids.append(found[-1].argmax(-1))
        hidden = decoder.step(ids[-1], cache)
    return torch.stack(ids, 1).tolist(), torch.stack(found, 1)


@pytest.mark.parametrize("without_csrc", [False, True])
@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS[:1] * 2, PROMPTS], ids=["one", "equal", "unequal"])
def test_logits_and_greedy_tokens_are_transformers(model, prompts, without_csrc, monkeypatch):
    if without_csrc:
        monkeypatch.setattr(library, "find", lambda *_: None)
    ids, logits = decode(Decoder(model), prompts, 40)
    for row, prompt in enumerate(prompts):
        wanted, theirs = greedy(model, prompt, 40)
        assert ids[row] == wanted
        assert torch.allclose(logits[row], theirs, atol=2e-4, rtol=1e-4)


def test_bf16_models_round_as_transformers_does(tmp_path):
    model = random_qwen3(tmp_path, rows=101, dtype=torch.bfloat16)
    decoder = Decoder(model)
    for prompt in PROMPTS:
        wanted, theirs = greedy(model, prompt, 24)
        hidden, cache = decoder.prefill([prompt], 24)
        for token, logits in zip(wanted, theirs, strict=True):
            ours = decoder.logits(hidden)[0]
            top = theirs.abs().max()
            assert (ours - logits).abs().max() <= top / 32  # a few roundings to 8 bits
            assert logits.max() - logits[ours.argmax()] <= top / 32
            hidden = decoder.step(torch.tensor([token]), cache)


def test_rows_of_the_head(model):
    decoder = Decoder(model)
    hidden, _ = decoder.prefill(PROMPTS, 1)
    assert torch.allclose(decoder.logits(hidden, 7, 40), decoder.logits(hidden)[:, 7:40], atol=1e-5)


def test_selected_rows_go_on(model):
    decoder = Decoder(model)
    _, cache = decoder.prefill(PROMPTS, 2)
    step = decoder.step(torch.tensor([5, 6, 7]), cache)
    _, cache = decoder.prefill(PROMPTS, 2)
    again = decoder.step(torch.tensor([7, 7, 5]), cache.select([2, 2, 0]))
    assert torch.allclose(again, step[[2, 2, 0]], atol=1e-5)


def rounded(model: Any, weights: str) -> Any:
    """The same model with its matrices rounded as the decoder's copies are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "embed" in name:
                continue
            scale = parameter.abs().amax(1, keepdim=True) / 127
            near = (parameter / scale).round() * scale if weights == "int8" else parameter.bfloat16().float()
            parameter.copy_(near)
    return model


@pytest.mark.parametrize("weights", ["bf16", "int8"])
def test_copies_of_weights(tmp_path, weights):
    """Against transformers with the same rounded weights. int8 also rounds vectors, to 15 bits."""
    model = random_qwen3(tmp_path, rows=101)
    _, logits = decode(Decoder(model, weights), [PROMPTS[0]], 1)
    with torch.no_grad():
        plain = model(torch.tensor([PROMPTS[0]])).logits[0, -1]
        theirs = rounded(model, weights)(torch.tensor([PROMPTS[0]])).logits[0, -1]
    assert torch.allclose(logits[0, 0], theirs, atol=theirs.abs().max() * (5e-4 if weights == "int8" else 1e-5))
    assert not torch.allclose(theirs, plain, atol=theirs.abs().max() * 1e-3)


def test_what_cannot_be_decoded_is_refused(tmp_path):
    model = random_qwen3(tmp_path, rows=101)
    decoder = Decoder(model)
    with pytest.raises(ValueError, match="a prompt is empty"):
        decoder.prefill([[1], []], 3)
    with pytest.raises(ValueError, match="a prompt has 40000 tokens, but the model's context is 32768"):
        decoder.prefill([[1] * 40_000], 3)
    with pytest.raises(SodaError, match="weights=int8: is for decoding on a CPU, but this model is on meta"):
        Decoder(model.to("meta"), "int8")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(SodaError, match="rotary positions of type 'dynamic': only default and llama3"):
        Decoder(model)
