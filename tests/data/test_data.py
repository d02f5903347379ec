import json
import struct
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.data.batch import Batcher
from megatron_soda.data.indexed import HEADER, INT32, MAGIC
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.validate import validate
from megatron_soda.data.windows import Window, Windows, permute
from megatron_soda.errors import SodaError
from megatron_soda.files import write_sealed
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, documents, find_problems, write_data


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


def test_an_empty_store_is_named(tmp_path):
    write_store(tmp_path / "s", [], SPACE)
    with pytest.raises(SodaError, match="no tokens"):
        Store(tmp_path / "s")


def test_offsets_and_documents(store):
    lengths = [len(d) for d in documents(50)]
    wanted = np.concatenate([[0], np.cumsum(lengths)])
    for first, last in ((0, 50), (0, 1), (7, 31), (49, 50)):
        assert store.offsets(first, last).tolist() == wanted[first : last + 1].tolist()
    assert len(store) == 50
    for index in (-1, 50):
        with pytest.raises(IndexError):
            store.document(index)


def test_opening_does_not_read_the_index(tmp_path):
    """An index of a million documents, nearly all of it a hole in the file."""
    count, length = 10**6, 5
    with open(tmp_path / "s.idx", "wb") as file:
        file.write(HEADER.pack(MAGIC, 1, INT32, count, count + 1))
        file.seek(HEADER.size + 4 * (count - 1))
        file.write(np.int32(length).tobytes())
        file.seek(HEADER.size + 4 * count + 8 * (count - 1))
        file.write(np.int64(4 * length * (count - 1)).tobytes())
        file.truncate(HEADER.size + 12 * count + 8 * (count + 1))
    with open(tmp_path / "s.bin", "wb") as file:
        file.seek(4 * (length * count - 1))
        file.write(np.int32(3).tobytes())
    (tmp_path / "s.json").write_text(json.dumps({"space": SPACE.to_dict()}))
    Store(tmp_path / "s")  # what a first call imports and caches is not meant
    tracemalloc.start()
    store = Store(tmp_path / "s")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # the lengths alone are 4 MB
    assert (len(store), store.size) == (count, count * length)
    assert store.document(count - 1).tolist() == [0, 0, 0, 0, 3]


@pytest.mark.parametrize(
    ("part", "entry", "value"),
    [
        ("length", 0, 0),
        ("length", 4, -3),
        ("length", 4, 1),
        ("pointer", 0, 4),
        ("pointer", 5, 8),
        ("pointer", 5, 2**40),
    ],
)
def test_a_damaged_index_is_for_validate_to_find(tmp_path, capsys, part, entry, value):
    write_data(tmp_path)
    assert validate(tmp_path)
    index = tmp_path / "valid.idx"
    data = bytearray(index.read_bytes())
    if part == "length":
        struct.pack_into("<i", data, HEADER.size + 4 * entry, value)
    else:
        struct.pack_into("<q", data, HEADER.size + 4 * 40 + 8 * entry, value)
    index.write_bytes(data)
    with pytest.raises(SodaError, match=rf"valid\.idx: document ({entry}|{entry + 1}) "):
        Store(tmp_path / "valid").check_index()
    capsys.readouterr()
    assert not validate(tmp_path)
    assert "valid.idx: document" in capsys.readouterr().out


def test_an_empty_document_is_for_check_index_to_find(tmp_path, store):
    """One whose place is right: the document before it has its tokens."""
    index = tmp_path / "s.idx"
    lengths = [len(document) for document in documents(50)]
    lengths[6:8] = [lengths[6] + lengths[7], 0]
    data = bytearray(index.read_bytes())
    struct.pack_into("<50i", data, HEADER.size, *lengths)
    struct.pack_into("<50q", data, HEADER.size + 200, *(4 * (np.cumsum(lengths) - lengths)))
    store.check_index()
    index.write_bytes(data)
    with pytest.raises(SodaError, match="document 7 has 0 tokens"):
        Store(tmp_path / "s").check_index()


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
    epochs = [[windows[e * windows.count + i].ids.tobytes() for i in range(windows.count)] for e in range(2)]
    stream = store.read(0, store.size)
    expected = sorted(stream[16 * i : 16 * i + 17].tobytes() for i in range(windows.count))
    assert sorted(epochs[0]) == sorted(epochs[1]) == expected
    assert epochs[0] != epochs[1]
    assert epochs[0] != expected


def test_too_short_a_store_is_an_error(store):
    for aligned in (False, True):
        assert Windows(store, store.size - 1, 0, aligned).count == 1
        with pytest.raises(SodaError, match="do not fill one window"):
            _ = Windows(store, store.size, 0, aligned)


def test_too_short_a_window_to_align_is_an_error(store):
    assert Windows(store, 7, 0, aligned=True).count > 0
    with pytest.raises(SodaError, match="at least 7"):
        _ = Windows(store, 6, 0, aligned=True)


@given(st.integers(1, 5), st.booleans(), st.integers(0, 2**32), st.data())
def test_every_label_counts_once(codebooks, aligned, seed, data):
    """Also in a stream that is not legal: an epoch counts every label once, but for a tail that fills no window."""
    space = TokenSpace(200, 1, 2, codebooks, 200)
    length = data.draw(st.integers(2 * codebooks - 1, 40))
    size = data.draw(st.integers(length + 1, 400))
    stream = np.random.default_rng(seed).permutation(space.size)[:size].astype(np.int32)  # no id twice
    counted = np.zeros(size, int)
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "s", [stream], space)
        windows = Windows(Store(Path(folder) / "s"), length, seed, aligned)
        for sample in range(windows.count):
            window = windows[sample]
            start = int(np.flatnonzero(stream == window.ids[0])[0])
            assert np.array_equal(window.ids, stream[start : start + length + 1])
            assert window.ids.dtype == np.int32
            assert 1 <= window.count <= length
            assert aligned or window.count == length
            counted[start + 1 : start + 1 + window.count] += 1
    tail = size - 1 - int(counted.sum())
    assert counted.tolist() == [0] + [1] * (size - 1 - tail) + [0] * tail  # nothing predicts the first token
    assert tail < length + (codebooks - 1 if aligned else 0)


@pytest.mark.parametrize("length", [7, 16, 33, 200])
def test_aligned_windows_begin_with_whole_frames(store, length):
    def inside_a_frame(windows):
        firsts = np.array([windows[i].ids[0] for i in range(windows.count)])
        return int((SPACE.class_table()[firsts] > 2).sum())

    assert inside_a_frame(Windows(store, length, 0))
    assert not inside_a_frame(Windows(store, length, 0, aligned=True))


def test_a_damaged_token_is_named_also_when_aligned(tmp_path):
    write_store(tmp_path / "s", [np.full(100, SPACE.size + 5)], SPACE)
    with pytest.raises(SodaError, match="soda validate"):
        Batcher(SPACE)([Windows(Store(tmp_path / "s"), 10, 0, aligned=True)[0]])


@pytest.mark.parametrize("reset_positions", [False, True])
def test_batch_against_a_plain_loop(store, reset_positions):
    weights = [1.0, 0.5, 2.0, 1.0, 1.0, 0.0]
    windows = [Windows(store, 40, 0, aligned=True)[i] for i in range(3)]
    windows.append(Window(store.read(3, 41), 40))
    assert any(window.count < 40 for window in windows)
    batch = Batcher(SPACE, weights, reset_positions)(windows)
    table, starts = SPACE.class_table(), []
    for row, window in enumerate(windows):
        ids, segment, position = window.ids, 0, 0
        for i in range(40):
            if i and ids[i - 1] == SPACE.eos:
                segment += 1
                position = 0 if reset_positions else position
            if i == 0 or ids[i - 1] == SPACE.eos:
                starts.append(40 * row + i)
            assert batch.tokens[row, i] == ids[i]
            assert batch.labels[row, i] == ids[i + 1]
            assert batch.class_id[row, i] == table[ids[i + 1]]
            assert batch.loss_weight[row, i] == (weights[table[ids[i + 1]]] if i < window.count else 0)
            assert batch.segment_id[row, i] == segment
            assert batch.position_id[row, i] == position
            position += 1
    assert batch.cu_seqlens.tolist() == [*starts, 160]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.position_id.is_contiguous()
    assert batch.loss_weight.dtype == torch.float32


def test_weights_of_one_batch_do_not_reach_the_next(store):
    batcher = Batcher(SPACE)
    window = Window(store.read(0, 41), 0)
    assert batcher([window]).loss_weight.sum() == 0
    assert batcher([Window(window.ids, 40)]).loss_weight.sum() == 40


@given(st.integers(0, 300), st.sampled_from([1, 2, SPACE.codebooks]), st.data())
def test_fast_validation_equals_the_automaton(seed, slots, data):
    after = SPACE.audio_base + slots * SPACE.entries  # frames of the first `slots` codes, 1 of semantic-only documents
    made = [document[document < after] for document in documents(4, seed)]
    for document in made:
        if data.draw(st.booleans()):
            document[data.draw(st.integers(0, len(document) - 1))] = data.draw(st.integers(0, SPACE.size - 1))
    with tempfile.TemporaryDirectory() as folder:
        write_store(Path(folder) / "s", made, SPACE, slots=slots)
        found = find_problems(Store(Path(folder) / "s"))
    wanted = [SPACE.check(document, slots) for document in made]
    assert found == [f"document {i}, {problem}" for i, problem in enumerate(wanted) if problem]


def test_validate_names_document_and_token(tmp_path, capsys):
    write_data(tmp_path)
    assert validate(tmp_path)
    made = documents(40, 1)
    made[7] = np.append(made[7][:-1], [SPACE.size + 5]).astype(np.int32)
    write_store(tmp_path / "valid", made, SPACE)
    assert find_problems(Store(tmp_path / "valid")) == [
        f"document 7, token {len(made[7]) - 1}: id {SPACE.size + 5} is out of range [0, {SPACE.size})"
    ]
    assert not validate(tmp_path)
    assert "document 7" in capsys.readouterr().out
    write_store(tmp_path / "valid", documents(40, 2), SPACE)  # the test store's documents
    assert not validate(tmp_path)
    assert "is in two stores" in capsys.readouterr().out
    meta = json.loads((tmp_path / "test.json").read_text())
    meta["space"]["text_size"] -= 1
    write_sealed(tmp_path / "test.json", meta)
    assert not validate(tmp_path)
    assert "different vocabularies" in capsys.readouterr().out
