"""Windows of whole documents: every document once an epoch, and which of its labels count, token by token."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import interleave
from megatron_soda.data.batch import Batcher
from megatron_soda.data.packed import Packed, response_start, without_response
from megatron_soda.data.store import Store, write_store
from megatron_soda.errors import SodaError
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, documents

BOS, EOS = SPACE.bos, SPACE.eos
TS, TE, AS, AE = range(SPACE.text_size, SPACE.text_size + 4)
FRAME = SPACE.audio_ids(np.array([[1, 2, 3, 4]])).tolist()


def store_of(folder: Path, made: list, **provenance) -> Store:
    write_store(folder / "s", [np.array(d, np.int32) for d in made], SPACE, **provenance)
    return Store(folder / "s")


def split(ids: np.ndarray) -> list[list[int]]:
    """The documents in a window: everything from a BOS to the next EOS."""
    found: list[list[int]] = []
    for token in ids.tolist():
        if token == BOS:
            found.append([])
        found[-1].append(token)
    return [one for one in found if one[-1] == EOS]


@pytest.mark.parametrize("length", [16, 31, 200])
@pytest.mark.parametrize("format", ["megatron", "compact"])
def test_every_document_that_fits_is_in_one_window(tmp_path, length, format):
    made = documents(60)
    write_store(tmp_path / "s", made, SPACE, format)
    packed = Packed(Store(tmp_path / "s"), length, seed=3)
    fit = sorted(d.tolist() for d in made if len(d) <= length + 1)
    assert len(fit) == 60 - len(packed.too_long)
    epochs = [[packed[epoch * packed.count + i] for i in range(packed.count)] for epoch in range(2)]
    for windows in epochs:
        assert sorted(d for w in windows for d in split(w.ids)) == fit
        assert all(w.ids.shape == (length + 1,) and w.ids.dtype == np.int32 for w in windows)
    orders = [[w.ids.tolist() for w in windows] for windows in epochs]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
    assert packed.fill == pytest.approx(sum(map(len, fit)) / (packed.count * (length + 1)))


def test_samples_depend_on_seed_and_number_alone(tmp_path):
    store = store_of(tmp_path, documents(60))
    one, other = Packed(store, 31, 3), Packed(Store(store.path), 31, 3)
    assert [other[i].ids.tolist() for i in (9, 0, 5)] == [one[i].ids.tolist() for i in (9, 0, 5)]
    assert [Packed(store, 31, 4)[i].ids.tolist() for i in range(9)] != [one[i].ids.tolist() for i in range(9)]


# A prompt of text and a response of sound; below every token, whether it counts as a label.
SPEAK = [BOS, TS, 7, 8, TE, AS, *FRAME, AE, EOS]
COUNTS = {
    0: [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    1: [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
}


@pytest.mark.parametrize("prompt_spans", [0, 1])
def test_the_labels_that_count_are_these(tmp_path, prompt_spans):
    """Two documents and the padding: the weight of position p is that of token p + 1."""
    store = store_of(tmp_path, [SPEAK, SPEAK])
    window = Packed(store, 2 * len(SPEAK) + 5, 0, prompt_spans)[0]
    wanted = [*COUNTS[prompt_spans], *COUNTS[prompt_spans], *[0] * 6]
    assert window.ids.tolist() == [*SPEAK, *SPEAK, *[BOS] * 6]
    assert window.weights is not None
    assert window.weights.tolist() == wanted[1:]
    assert window.count == 2 * len(SPEAK) - 1


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_the_longest_document_has_a_token_more_than_the_window(tmp_path, more):
    """Its last token is a label only, so the window's length is its labels' number."""
    store = store_of(tmp_path, [SPEAK])
    length = len(SPEAK) - 1 + more
    if more < 0:
        with pytest.raises(SodaError, match=rf"all of its 1 documents .*={length} \+ 1 tokens; the shortest has 12"):
            _ = Packed(store, length, 0)
        return
    window = Packed(store, length, 0, 1)[0]
    assert window.ids.tolist() == [*SPEAK, *[BOS] * more]
    assert window.weights is not None
    assert window.weights.tolist() == [*COUNTS[1][1:], *[0] * more]


def naive(ids: np.ndarray, prompt_spans: int) -> list[float]:
    """By hand, a token at a time: whether each one but the first counts as a label."""
    counts: list[float] = []
    spans = ended = 0
    bare = False
    for i, token in enumerate(ids.tolist()):
        if token == BOS:
            ended, bare = 0, i + 1 < len(ids) and int(ids[i + 1]) not in (TS, AS)
            padding = i + 1 == len(ids) or int(ids[i + 1]) == BOS
            spans = 10**9 if padding else 0 if bare else prompt_spans
            counts.append(0.0)
            continue
        counts.append(1.0 if ended >= spans else 0.0)
        ended += token in (TE, AE)
    return counts[1:]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 30), length=st.integers(40, 120), prompt_spans=st.integers(0, 3)
)
def test_against_a_walk_over_the_tokens(tmp_path_factory, seed, count, length, prompt_spans):
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        some = [(rng.integers(3, 64, rng.integers(1, 4)), rng.integers(0, 16, (rng.integers(1, 3), 4)))] * 2
        some = [(text.tolist(), codes) for text, codes in some]
        kinds = interleave.text_first(some, SPACE), interleave.audio_first(some, SPACE), documents(3, seed)[2]
        bare = interleave.text_only(some[0][0], SPACE)
        made.append((kinds[0], kinds[1], bare)[rng.integers(3)])
    store = store_of(tmp_path_factory.mktemp("s"), made)
    packed = Packed(store, length, seed, prompt_spans)
    for sample in range(packed.count):
        window = packed[sample]
        assert window.weights is not None
        assert window.weights.tolist() == naive(window.ids, prompt_spans)


def test_the_batch_keeps_documents_and_padding_apart(tmp_path):
    store = store_of(tmp_path, [SPEAK, SPEAK])
    batch = Batcher(SPACE)([Packed(store, 30, 0, 1)[0]])
    assert batch.segment_id[0].tolist() == [0] * 12 + [1] * 12 + [2] * 6
    assert batch.cu_seqlens.tolist() == [0, 12, 24, 30]
    assert batch.loss_weight.sum() == 14
    torch.testing.assert_close(batch.loss_weight[0, :24], torch.tensor([*COUNTS[1][1:], *COUNTS[1], 0.0][:24]))


@pytest.mark.parametrize(("spans", "start"), [(0, 1), (1, 5), (2, 11), (3, 15)])
def test_the_response_starts_after_the_prompts_last_marker(spans, start):
    translation = np.array([BOS, TS, 7, 8, TE, AS, *FRAME, AE, TS, 9, 9, TE, AS, *FRAME, AE, EOS])
    assert response_start(translation, SPACE, spans) == start
    assert int(translation[start - 1]) in ((BOS,) if spans == 0 else (TE, AE))
    with pytest.raises(ValueError, match="4 spans"):
        response_start(translation, SPACE, 4)


def test_documents_without_a_response_are_named(tmp_path):
    bare, single = [BOS, 5, 6, EOS], [BOS, AS, *FRAME, AE, EOS]
    store = store_of(tmp_path, [SPEAK, bare, single, SPEAK, single])
    assert without_response(store, 0, 4096) == ""
    assert "2 of 5 documents have no span after the 1 of data.prompt_spans" in without_response(store, 1, 4096)
    assert "documents 2, 4 (soda inspect" in without_response(store, 1, 4096)
    assert "documents 0, 2, 3, 4 (" in without_response(store, 2, 4096)  # bare text has no prompt
    assert "documents 2, 4 (" in without_response(store, 1, len(single) - 1)
    assert without_response(store, 1, len(single) - 2) == "", "too long for a window: left out"
    assert without_response(store_of(tmp_path, [SPEAK, bare]), 1, 4096) == ""


def test_another_space_has_other_markers(tmp_path):
    space = TokenSpace(text_size=500, bos=0, eos=499, codebooks=2, entries=5)
    document = interleave.audio_first([([65, 66], np.array([[0, 1]]))], space)
    write_store(tmp_path / "s", [document], space)
    window = Packed(Store(tmp_path / "s"), len(document) - 1, 0, 1)[0]
    assert window.weights is not None
    assert window.weights.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 1]
