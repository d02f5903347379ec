"""The NLL vector against a loop over tokens in float64."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from megatron_soda.data.store import Store
from megatron_soda.evaluation import likelihood
from megatron_soda.evaluation.suites.nll import evaluate_nll, unigram
from megatron_soda.hf.load import load_model
from megatron_soda.vocab import Grammar
from tests.exported import CONTEXT


def name_of(token: int, space) -> str:
    if token in (space.bos, space.eos) or space.text_size <= token < space.audio_base:
        return "marker"
    codebook = (token - space.audio_base) // space.entries
    return "text" if token < space.text_size else "acoustic_" + str(codebook) if codebook else "semantic"


def members(space) -> Counter:
    return Counter(name_of(token, space) for token in range(space.size))


def unigram_by_hand(train: Store) -> list[float]:
    counts = Counter(int(token) for i in range(len(train)) for token in train.document(i))
    totals = Counter(members(train.space))
    for token, count in counts.items():
        totals[name_of(token, train.space)] += count
    return [-math.log((counts[t] + 1) / totals[name_of(t, train.space)]) for t in range(train.space.size)]


@torch.no_grad()
def by_hand(model, test: Store, train: Store, documents: int) -> dict[str, list[tuple[float, float, float]]]:
    """(nats of the model, of the model among legal tokens, of the unigram) of every label by class; each document
    alone, its context cut."""
    network, grammar = model.model.double(), Grammar(test.space)
    table, kinds, legal = unigram_by_hand(train), test.space.kind_table(), grammar.legal()
    found: dict[str, list[tuple[float, float, float]]] = {}
    for i in range(documents):
        ids = [int(token) for token in test.document(i)][: CONTEXT + 1]
        logits = network(input_ids=torch.tensor([ids[:-1]])).logits[0].numpy()
        state = Grammar.START
        for row, token, label in zip(logits, ids[:-1], ids[1:], strict=True):
            state = grammar.step[state, int(kinds[token])]
            among_all, among_legal = (
                float(np.log(np.exp(some - row.max()).sum()) + row.max() - row[label])
                for some in (row, row[legal[state]])
            )
            found.setdefault(name_of(label, test.space), []).append((among_all, among_legal, table[label]))
    return found


def test_the_unigram_is_counted_by_class(exported):
    train = Store(exported.run / "data" / "train")
    assert unigram(train) == pytest.approx(np.array(unigram_by_hand(train)), abs=1e-12)


@pytest.mark.parametrize("documents", [0, 9])
def test_nll_is_that_of_a_loop_over_tokens(exported, monkeypatch, documents):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 300)  # batches of several lengths, padded, and single documents
    data = exported.run / "data"
    test, train, model = Store(data / "test"), Store(data / "train"), load_model(exported.folder)
    assert sum(len(test.document(i)) > CONTEXT + 1 for i in range(len(test))) == 2
    assert len(list(likelihood.batches([len(test.document(i)) for i in range(len(test))]))) > 3
    result = evaluate_nll(model, test, train, documents, kept=exported.run / "kept")
    expected = by_hand(model, test, train, documents or len(test))
    assert set(result["classes"]) == set(expected) == set(test.space.class_names)
    everything = [label for labels in expected.values() for label in labels]
    for row, labels in [(result["all"], everything), *((result["classes"][name], expected[name]) for name in expected)]:
        ours, among_legal, baseline = np.mean(labels, axis=0)
        assert row["tokens"] == len(labels)
        assert row["model_nats"] == pytest.approx(ours, abs=1e-5)
        assert row["legal_nats"] == pytest.approx(among_legal, abs=1e-5)
        assert row["unigram_nats"] == pytest.approx(baseline, abs=1e-10)
        assert row["model_bits"] == pytest.approx(ours / math.log(2), abs=1e-5)
    means = [np.mean(expected[f"acoustic_{k}"], axis=0) for k in (1, 2, 3)]
    assert result["acoustic_mean"]["model_nats"] == pytest.approx(np.mean(means, axis=0)[0], abs=1e-5)
    assert result["acoustic_mean"]["tokens"] == sum(len(expected[f"acoustic_{k}"]) for k in (1, 2, 3))


def test_an_interrupted_one_goes_on_where_it_was(exported, monkeypatch):
    monkeypatch.setattr(likelihood, "TOKENS_AT_ONCE", 300)
    data, model = exported.run / "data", load_model(exported.folder)
    stores = Store(data / "test"), Store(data / "train")
    whole = evaluate_nll(model, *stores, kept=exported.run / "whole")
    scored, nats, interrupted = [], likelihood.Likelihood.nats, [True, False]

    def once(self, documents, softmaxes):
        if interrupted and interrupted.pop():
            raise KeyboardInterrupt
        scored.extend(documents)
        return nats(self, documents, softmaxes)

    monkeypatch.setattr(likelihood.Likelihood, "nats", once)
    with pytest.raises(KeyboardInterrupt):
        evaluate_nll(model, *stores, kept=exported.run / "kept")
    assert 0 < len(scored) < len(stores[0])
    resumed = evaluate_nll(model, *stores, kept=exported.run / "kept")
    assert len(scored) == len({document.tobytes() for document in scored}) == len(stores[0])
    assert resumed["all"] == pytest.approx(whole["all"], abs=1e-5)  # the batches are others
    figures = [result["items"]["figures"] for result in (whole, resumed)]
    for part, of_documents in figures[0].items():
        assert figures[1][part]["counts"] == of_documents["counts"]
        assert figures[1][part]["sums"] == pytest.approx(of_documents["sums"], abs=1e-3)
    assert evaluate_nll(model, *stores, 9, kept=exported.run / "kept")["all"] != whole["all"]
    assert len(scored) == len(stores[0])
    model.key = "another"
    evaluate_nll(model, *stores, 9, kept=exported.run / "kept")
    assert len(scored) == len(stores[0]) + 9
