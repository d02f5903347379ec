"""The cross-modal gain: who is whose partner, and the figures against a loop over tokens in float64."""

import math

import numpy as np
import pytest
import torch

from megatron_soda.codecs.description import read_description
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import likelihood
from megatron_soda.evaluation.bench import Bench
from megatron_soda.evaluation.run import evaluate
from megatron_soda.evaluation.suites.gain import PARTS, Gain, Utterance, _utterance, with_partners
from megatron_soda.vocab import Grammar
from tests.evaluation.toys import Toy


def utterance(name: str, text: int, audio: int, **facts: str) -> Utterance:
    known = {"said": name, "language": "en", "speaker": "s", "recording": name, **facts}
    value = sum(map(ord, name))
    return Utterance(name, np.full(text, value), np.full(audio, value), **known)


def test_partners_have_other_words_in_the_same_language_and_the_same_lengths():
    everyone = [
        utterance("own", 3, 8),
        utterance("same words", 3, 8, said="own"),
        utterance("same recording", 3, 8, recording="own"),
        utterance("foreign", 3, 8, language="es"),
        utterance("shorter", 2, 4),
        utterance("longest", 9, 40),
        utterance("as long", 3, 12, speaker="t"),
        utterance("longer", 4, 16),
    ]
    found = {own.id: (text, audio) for own, text, audio in with_partners(everyone, 0)}
    assert set(found) == {"own", "same words", "same recording", "shorter", "longer", "as long"}
    text, audio = found["own"]
    assert text.tolist() == [sum(map(ord, "as long"))] * 3
    assert audio.tolist() == [sum(map(ord, "longer"))] * 8  # the next longer one is another speaker's
    for own in everyone:
        if own.id in found:
            assert list(map(len, found[own.id])) == [len(own.text), len(own.audio)]


def test_utterances_of_no_known_recording_are_each_of_their_own(exported):
    rows = [{**exported.rows[i], "recording": ""} for i in range(4)]
    known = [_utterance(row, [5, 6], exported.space) for row in rows]
    assert with_partners(known, 0)


def test_ties_are_broken_by_the_seed():
    everyone = [utterance(f"utterance {i}", 3, 8) for i in range(20)]

    def chosen(seed: int) -> list[int]:
        return [int(text[0]) for _, text, _ in with_partners(everyone, seed)]

    assert chosen(1) == chosen(1) != chosen(2)


def more_rows(exported) -> list[dict]:
    """A dozen utterances that fit, and one that does not, with a code that follows from the first letter."""
    rng = np.random.default_rng(5)
    rows = []
    for i in range(12):
        text = f"{'abcd'[i % 4]} bird {i}"
        codes = rng.integers(0, 16, (4 + i % 3, 4))
        codes[:, 1] = ord(text[0]) % 16
        rows.append({**exported.rows[0], "id": f"n{i}", "recording": f"n{i}", "text": text, "codes": codes})
    rows.append({**exported.rows[5], "id": "long"})
    data = exported.run / "data"
    write_units(data / "test.parquet", rows, codec=read_description(data))
    return rows


@torch.no_grad()
def by_hand(bench: Bench, ids: list[int], legal: bool) -> list[float]:
    logits = bench.model.model.double()(torch.tensor([ids[:-1]])).logits[0].numpy()
    bench.model.model.float()
    grammar, kinds = Grammar(bench.model.space), bench.model.space.kind_table()
    state, found = Grammar.START, []
    for row, token, label in zip(logits, ids[:-1], ids[1:], strict=True):
        state = grammar.step[state, int(kinds[token])]
        some = row[grammar.legal()[state]] if legal else row
        found.append(float(np.log(np.exp(some).sum()) - row[label]))
    return found


@pytest.mark.parametrize("head_rows", ["all", "legal"])
def test_figures_are_those_of_a_loop_over_tokens(exported, monkeypatch, head_rows):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 200)
    rows, s = more_rows(exported), exported.space
    bench = Bench(exported.recipe(f"training.head_rows={head_rows}"), exported.folder)
    result = Gain().measure(bench)
    longest = [row["id"] for row in rows[:12] if len(row["codes"]) == 6]
    assert result["left_out"]["longer than the context"] == {"count": 1, "first": ["long"]}
    used = result["items"]["names"]
    assert result["utterances"] == len(used) == 12 - result["left_out"]["none as long in the same language"]["count"]
    assert set(used) >= set(longest[:3])
    sums = {part: {name: np.zeros(2) for name in ("right", "wrong", "alone")} for part in PARTS}

    def add(name: str, of_audio: list[float], of_text: list[float]) -> None:
        levels = np.array(of_audio).reshape(-1, 4)
        sums["semantic"][name] += levels[:, 0].sum(), len(levels)
        sums["acoustic"][name] += levels[:, 1:].sum(), 3 * len(levels)
        sums["audio"][name] += levels.sum(), levels.size
        sums["text"][name] += sum(of_text), len(of_text)

    def predicted(first: list[int], second: list[int]) -> tuple[list[float], list[float]]:
        nats = by_hand(bench, [s.bos, *first, *second, s.eos], head_rows == "legal")
        return nats[1 : len(first) - 1], nats[len(first) + 1 : -2]

    frames = 0
    fitting = [_utterance(row, bench.model.text.encode(row["text"]), s) for row in rows[:12]]
    for own, *wrong in with_partners(fitting, bench.recipe.seed):
        written, sound, other_text, other_sound = (
            [start, *ids.tolist(), end]
            for (start, end), ids in zip(
                [(s.text_start, s.text_end), (s.audio_start, s.audio_end)] * 2,
                [own.text, own.audio, *wrong],
                strict=True,
            )
        )
        (text_alone, audio_right), (audio_alone, text_right) = predicted(written, sound), predicted(sound, written)
        add("right", audio_right, text_right)
        add("alone", audio_alone, text_alone)
        add("wrong", predicted(other_text, sound)[1], predicted(other_sound, written)[1])
        frames += len(own.audio) // 4
    for part, by_name in sums.items():
        for name, (nats, count) in by_name.items():
            assert result[part]["tokens"] == count
            assert result[part][f"{name}_nats"] == pytest.approx(nats / count, abs=1e-5)
        gain = (by_name["wrong"][0] - by_name["right"][0]) / by_name["right"][1]
        assert result[part]["gain"] == pytest.approx(gain, abs=1e-5)
        assert result[part]["gain_low"] < gain < result[part]["gain_high"]
    bits = sums["audio"]["right"][0] / math.log(2) / (frames / 12.5)
    assert result["bits_per_audio_second"]["right"] == pytest.approx(bits, rel=1e-5)
    assert result["bits_per_text_token"]["alone"] == pytest.approx(result["text"]["alone_nats"] / math.log(2))
    assert result["softmax"] == head_rows


def test_a_model_that_reads_gains_and_one_that_does_not_gains_nothing(exported):
    """The reader knows the second code of a frame by the first letter of the text before it: of 16, log 16 nats."""
    more_rows(exported)
    bench, s = Bench(exported.recipe(), exported.folder), exported.space

    def reads(ids: list[int]) -> np.ndarray:
        logits = np.zeros(s.size)
        if s.text_end in ids and s.audio_start in ids[ids.index(s.text_end) :]:
            letter = bench.model.text.decode(ids[2 : ids.index(s.text_end)])[0]
            logits[s.audio_base + 16 + ord(letter) % 16] = 60.0
        return logits

    def knows_nothing(ids: list[int]) -> np.ndarray:
        return np.zeros(s.size)

    for logits, low, high in ((reads, 1.0, 99.0), (knows_nothing, -1e-6, 1e-6)):
        bench.model.model, bench.model.key = Toy(s, logits), logits.__name__
        found = Gain().measure(bench)["acoustic"]
        assert low < found["gain_low"] <= found["gain"] <= found["gain_high"] < high


def test_what_cannot_be_measured_is_refused(exported):
    rows = more_rows(exported)
    data = exported.run / "data"
    codec = read_description(data)
    write_units(data / "test.parquet", [{**row, "text": ""} for row in rows], codec=codec)
    with pytest.raises(SodaError, match="no utterance of the test split has a transcript"):
        evaluate(exported.recipe("suite=[gain]"), exported.folder)
    write_units(data / "test.parquet", rows[:1], codec=codec)
    with pytest.raises(SodaError, match="only 0 of 1 utterances with a transcript fit"):
        evaluate(exported.recipe("suite=[gain]"), exported.folder)


def test_an_interrupted_suite_goes_on(exported, monkeypatch):
    more_rows(exported)
    bench = Bench(exported.recipe(), exported.folder)
    whole = Gain().measure(bench)
    kept = exported.run / "evaluate" / "gain.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[:9]) + lines[9][:20])  # killed while writing
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 1)  # one by one
    scored = []
    nats = likelihood.Likelihood.nats
    monkeypatch.setattr(
        likelihood.Likelihood, "nats", lambda self, some, of: (scored.extend(some), nats(self, some, of))[1]
    )
    again = Gain().measure(bench)
    assert len(scored) == len(lines) - 9
    for name, figure in whole["items"]["figures"].items():
        assert again["items"]["figures"][name]["sums"] == pytest.approx(figure["sums"], abs=1e-5)
    complete = kept.read_bytes()
    assert complete.count(b"\n") == len(lines)
    kept.write_bytes(complete + lines[-1][:20])
    Gain().measure(bench)
    assert kept.read_bytes() == complete
    for damaged in (b'["a", [1.0]]\n', b'["a"\n', b'["a", 5]\n'):
        kept.write_bytes(lines[0] + damaged + lines[1])
        with pytest.raises(SodaError, match=r"gain\.jsonl: damaged; delete it and evaluate again"):
            Gain().measure(bench)
    kept.write_bytes(complete)
    bench.model.key = "another model"
    scored.clear()
    Gain().measure(bench)
    assert len(scored) == len(lines) - 1
