import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.data.batch import Batcher
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.validate import _all_legal, find_problems, validate
from megatron_soda.data.windows import Windows, permute
from megatron_soda.errors import SodaError
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, documents, write_data


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "s", documents(50), SPACE)
    return Store(tmp_path / "s")


def test_stock_megatron_reads_the_store(tmp_path, store):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    stock = IndexedDataset(str(tmp_path / "s"))
    assert len(stock) == 50
    assert len(stock.document_indices) == 51
    for i, document in enumerate(documents(50)):
        assert np.array_equal(stock[i], document)
        assert np.array_equal(store.document(i), document)
    stream = np.concatenate(documents(50))
    assert store.size == len(stream)
    assert np.array_equal(store.read(17, 100), stream[17:117])


def test_same_documents_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_store(tmp_path / name, documents(20), SPACE)
    for suffix in ("bin", "idx", "json"):
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


@pytest.mark.parametrize("suffix", ["bin", "idx", "json"])
def test_damaged_store_is_named(tmp_path, store, suffix):
    path = tmp_path / f"s.{suffix}"
    whole = path.read_bytes()
    for cut in {0, 1, 8, 34, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:cut])
        if suffix == "json" and cut == len(whole) - 1:
            continue  # only the last newline is gone
        with pytest.raises(SodaError, match=rf"s\.{suffix}"):
            Store(tmp_path / "s")
    path.unlink()
    with pytest.raises(SodaError, match="no such file"):
        Store(tmp_path / "s")


def test_failed_write_leaves_the_old_store(tmp_path, store):
    def broken():
        yield documents(1)[0]
        raise KeyboardInterrupt

    before = (tmp_path / "s.bin").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        write_store(tmp_path / "s", broken(), SPACE)
    assert (tmp_path / "s.bin").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_another_vocabulary_is_refused(store):
    with pytest.raises(SodaError, match="another vocabulary"):
        store.check_space(TokenSpace(65, 1, 2, 4, 16), "the model")


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=50)
def test_permutation_is_one(count, key):
    assert sorted(permute(i, count, key) for i in range(count)) == list(range(count))


def test_permutation_mixes():
    """Every place is taken by every index about equally often, over keys."""
    table = np.zeros((8, 8))
    for key in range(4000):
        for i in range(8):
            table[i, permute(i, 8, key * 7919)] += 1
    assert np.abs(table / 500 - 1).max() < 0.25


def test_epochs_cover_every_window_once_in_another_order(store):
    windows = Windows(store, 16, seed=3)
    epochs = [[windows[e * windows.count + i].tobytes() for i in range(windows.count)] for e in range(2)]
    stream = store.read(0, store.size)
    expected = sorted(stream[16 * i : 16 * i + 17].tobytes() for i in range(windows.count))
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    assert epochs[0] != expected


def test_too_short_a_store_is_an_error(store):
    with pytest.raises(SodaError, match="do not fill one window"):
        _ = Windows(store, store.size, 0)


def test_batch_against_a_plain_loop(store):
    weights = [1.0, 0.5, 2.0, 1.0, 1.0, 0.0]
    windows = [Windows(store, 40, 0)[i] for i in range(3)]
    batch = Batcher(SPACE, weights)(windows)
    table, starts = SPACE.class_table(), []
    for row, window in enumerate(windows):
        segment = 0
        for i in range(40):
            if i and window[i - 1] == SPACE.eos:
                segment += 1
            if i == 0 or window[i - 1] == SPACE.eos:
                starts.append(40 * row + i)
            assert batch.tokens[row, i] == window[i]
            assert batch.labels[row, i] == window[i + 1]
            assert batch.class_id[row, i] == table[window[i + 1]]
            assert batch.loss_weight[row, i] == weights[table[window[i + 1]]]
            assert batch.segment_id[row, i] == segment
            assert batch.position_id[row, i] == i
    assert batch.cu_seqlens.tolist() == [*starts, 120]
    assert batch.cu_seqlens.dtype == torch.int32


@given(st.integers(0, 300), st.data())
def test_fast_validation_equals_the_automaton(seed, data):
    made = documents(4, seed)
    for document in made:
        if data.draw(st.booleans()):
            document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, SPACE.size - 1))
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in made])])
    assert _all_legal(np.concatenate(made), offsets, SPACE) == all(SPACE.check(d) is None for d in made)


def test_validate_names_document_and_token(tmp_path, capsys):
    write_data(tmp_path)
    assert validate(tmp_path)
    made = documents(40, 1)
    made[7] = np.append(made[7][:-1], [SPACE.size + 5]).astype(np.int32)
    write_store(tmp_path / "valid", made, SPACE)
    assert list(find_problems(Store(tmp_path / "valid"))) == [
        f"document 7, token {len(made[7]) - 1}: id {SPACE.size + 5} is out of range [0, {SPACE.size})"
    ]
    assert not validate(tmp_path)
    assert "document 7" in capsys.readouterr().out
    write_store(tmp_path / "valid", documents(40, 2), SPACE)  # the test store's documents
    assert not validate(tmp_path)
    assert "stand in another store" in capsys.readouterr().out
    meta = json.loads((tmp_path / "test.json").read_text())
    meta["space"]["text_size"] -= 1
    (tmp_path / "test.json").write_text(json.dumps(meta))
    assert not validate(tmp_path)
    assert "different vocabularies" in capsys.readouterr().out
