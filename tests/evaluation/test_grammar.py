"""The counts of the grammar suite: on generations of known faults, and on those of a model."""

import numpy as np
import pytest
import torch

from megatron_soda.evaluation.suites import grammar
from megatron_soda.evaluation.suites.grammar import audio_spans, evaluate_grammar
from megatron_soda.hf.load import load_model
from megatron_soda.inference import sample as sampling
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.sample import Constraint, Sampled, sample
from megatron_soda.inference.task import Prompt
from tests.exported import HOP, FakeCodec


class ShortCodec(FakeCodec):
    """Loses a sample of every span of two frames."""

    def decode(self, codes):
        return [wave[1:] if len(one) == 2 else wave for wave, one in zip(super().decode(codes), codes, strict=True)]


def test_counts_of_generations_with_known_faults(exported, monkeypatch):
    model, s = load_model(exported.folder), exported.space

    def span(frames: int) -> list[int]:
        return [s.audio_start, *s.audio_ids(np.full((frames, 4), 3)).tolist(), s.audio_end]

    whole = [s.bos, *span(3), *span(2), s.text_start, 5, s.text_end, s.eos]
    held = [
        Sampled(whole, ended=True, legal_mass=[0.5, 0.7]),
        Sampled([s.bos, *span(1), s.eos], ended=True, forced=True, legal_mass=[0.9]),
        Sampled([s.bos, *span(3), s.eos, 5], ended=False, legal_mass=[0.1]),
    ]
    free = [Sampled(whole, ended=True, legal_mass=[0.2]), Sampled([s.bos, 5], ended=False, legal_mass=[0.4])]
    free.append(Sampled([s.bos, s.eos], ended=True, valid=False, legal_mass=[0.3]))
    calls = []

    def canned(decoder, constraint, prompts, *, count, seed, constrained, statistics):
        assert prompts == [Prompt([s.bos], set(), 40)]
        assert statistics
        calls.append((constrained, count, seed))
        rows = held if constrained else free
        start = sum(c for flag, c, _ in calls[:-1] if flag == constrained)
        return rows[start : start + count]

    monkeypatch.setattr(sampling, "sample", canned)
    monkeypatch.setattr(grammar, "ROWS_AT_ONCE", 2)
    result = evaluate_grammar(model, ShortCodec(), 3, 40, 11, kept=exported.run / "kept")
    assert calls == [(True, 2, 11), (True, 1, 13), (False, 2, 14), (False, 1, 16)]
    assert result == {
        "generations": 3,
        "valid": 2,
        "duration_exact": 2,
        "audio_spans": 4,
        "ended_by_itself": 1,
        "legal_mass_mean": pytest.approx((0.5 + 0.7 + 0.9 + 0.1) / 4),
        "free_valid": 1,
        "free_legal_mass_mean": pytest.approx(0.3),
    }


def test_counts_of_a_model(exported):
    """Recounted from the same draws; the mass from whole-sequence probabilities in float64."""
    model = load_model(exported.folder)
    result = evaluate_grammar(model, FakeCodec(), 6, 40, 5, kept=exported.run / "kept")
    constraint = Constraint(model.space, torch.device("cpu"))
    decoder, prompts = Decoder(model.model), [Prompt([model.space.bos], set(), 40)]
    held = sample(decoder, constraint, prompts, count=6, seed=5, statistics=True)
    free = sample(decoder, constraint, prompts, count=6, seed=11, statistics=True, constrained=False)
    assert result["generations"] == result["valid"] == result["duration_exact"] == 6
    assert result["audio_spans"] == sum(row.ids.count(model.space.audio_start) for row in held) > 0
    assert result["free_valid"] == sum(model.space.check(np.array(row.ids)) is None for row in free)
    for rows, key in ((held, "legal_mass_mean"), (free, "free_legal_mass_mean")):
        assert result[key] == pytest.approx(np.mean([m for row in rows for m in masses(model, constraint, row.ids)]))


@torch.no_grad()
def masses(model, constraint: Constraint, ids: list[int]) -> list[float]:
    logits = model.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    legal = torch.from_numpy(constraint.grammar.legal())
    states = [constraint.follow(ids[: i + 1]) for i in range(len(ids) - 1)]
    return [float(logits[i][legal[state]].sum()) for i, state in enumerate(states)]


def test_without_sound_no_duration_is_measured(exported):
    result = evaluate_grammar(load_model(exported.folder), None, 2, 30, 0, 1, kept=exported.run / "kept")
    assert result["valid"] == 2
    assert "duration_exact" not in result
    assert "audio_spans" not in result


def test_audio_spans_of_a_document(exported):
    s, codes = exported.space, np.arange(12).reshape(3, 4)
    ids = [s.bos, s.audio_start, *s.audio_ids(codes).tolist(), s.audio_end, s.text_start, 5, s.text_end]
    ids += [s.audio_start, *s.audio_ids(codes[1:]).tolist(), s.audio_end, s.eos]
    first, second = audio_spans(ids, load_model(exported.folder))
    assert first.tolist() == codes.tolist()
    assert second.tolist() == codes[1:].tolist()
    assert len(FakeCodec().decode([first])[0]) == 3 * HOP


def test_an_interrupted_one_goes_on_where_it_was(exported, monkeypatch):
    model, kept = load_model(exported.folder), exported.run / "kept"
    monkeypatch.setattr(grammar, "ROWS_AT_ONCE", 4)
    whole = evaluate_grammar(model, FakeCodec(), 6, 40, 5, kept=exported.run / "whole")
    drawn = []

    def thrice(*arguments, **settings):
        if len(drawn) == 3:
            drawn.append("interrupt")
            raise KeyboardInterrupt
        drawn.append(settings["seed"])
        return sample(*arguments, **settings)

    monkeypatch.setattr("megatron_soda.inference.sample.sample", thrice)
    with pytest.raises(KeyboardInterrupt):
        evaluate_grammar(model, FakeCodec(), 6, 40, 5, kept=kept)
    assert evaluate_grammar(model, FakeCodec(), 6, 40, 5, kept=kept) == whole
    assert drawn == [5, 9, 11, "interrupt", 15]
    evaluate_grammar(model, FakeCodec(), 2, 30, 5, kept=kept)  # of another length
    assert drawn[5:] == [5, 7]
