"""megatron_soda.ops: csrc with and without vector instructions, and the reference, against independent numpy."""

import itertools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_soda.ops import library, reference
from megatron_soda.vocab import Grammar, TokenSpace

seeds = st.integers(0, 2**32 - 1)


def test_csrc_is_used():
    """Where it is built; one that is stale, or of another torch, is to be built again."""
    if (library.why_absent or "").startswith("not built"):
        pytest.skip(f"csrc: {library.why_absent}")
    assert library.why_absent is None, f"csrc: {library.why_absent}. {library.REBUILD}"
    for name in library.CPU_OPS[:-1]:
        assert library.find(name, "cpu") is not None, name


def same(a: Tensor, b: np.ndarray) -> None:
    assert a.shape == b.shape
    assert str(a.dtype).removeprefix("torch.") == str(b.dtype)
    assert np.array_equal(a.numpy(), b)


# ---- packed codes


def packed_by_numpy(codes: np.ndarray, bits: int) -> np.ndarray:
    planes = (codes[:, :, None].astype(np.int64) >> np.arange(bits) & 1).astype(np.uint8)
    return np.packbits(planes.reshape(len(codes), codes.shape[1] * bits), axis=1, bitorder="little")


def unpacked_by_numpy(packed: np.ndarray, slots: int, bits: int) -> np.ndarray:
    planes = np.unpackbits(packed, axis=1, bitorder="little")[:, : slots * bits].reshape(len(packed), slots, bits)
    return (planes.astype(np.int64) @ (1 << np.arange(bits))).astype(np.int32)


@pytest.mark.parametrize("slots", [1, 2, 3, 7, 8, 9, 16, 17, 32])
def test_packing(side, slots):
    rng = np.random.default_rng(slots)
    for bits, frames in itertools.product(range(1, 25), (0, 1, 3, 40)):
        codes = rng.integers(0, 2**bits, (frames, slots)).astype(np.int32)
        codes[:1] = 2**bits - 1
        wanted = packed_by_numpy(codes, bits)
        assert wanted.shape == (frames, -(-slots * bits // 8))
        same(side.pack_frames(torch.from_numpy(codes), bits), wanted)
        short = (codes % 2**15).astype(np.int16)
        same(side.pack_frames(torch.from_numpy(short), bits), packed_by_numpy(short, bits))
        same(side.unpack_frames(torch.from_numpy(wanted), slots, bits), codes)
        noise = rng.integers(0, 256, wanted.shape).astype(np.uint8)  # bits behind the last code are ignored
        same(side.unpack_frames(torch.from_numpy(noise), slots, bits), unpacked_by_numpy(noise, slots, bits))


def test_many_threads_pack_the_same(side):
    codes = np.random.default_rng(0).integers(0, 2048, (70_001, 9)).astype(np.int32)
    wanted = packed_by_numpy(codes, 11)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same(side.pack_frames(torch.from_numpy(codes), 11), wanted)
        same(side.unpack_frames(torch.from_numpy(wanted), 9, 11), codes)
        codes[69_000, 4] = 2048
        with pytest.raises(ValueError, match=r"codes\[69000, 4\] is 2048, not in \[0, 2048\)"):
            side.pack_frames(torch.from_numpy(codes), 11)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32])
@pytest.mark.parametrize("value", [-1, 32, 32767, -32768])
@pytest.mark.parametrize("slot", [0, 8, 9])
def test_the_first_code_out_of_range_is_named(side, dtype, value, slot):
    codes = torch.zeros(7, 10, dtype=dtype)
    codes[3, slot] = value
    codes[5, 0] = -2
    with pytest.raises(ValueError, match=rf"^codes\[3, {slot}\] is {value}, not in \[0, 32\)$"):
        side.pack_frames(codes, 5)


# ---- windows


def stream(seed: int, slots: int, bits: int, text_bits: int):
    """A random token stream, token by token, and its tables."""
    rng = np.random.default_rng(seed)
    base, entries = 300, 2**bits
    ids, text, frames, starts, firsts = [], [], [], [], []
    for _ in range(rng.integers(0, 9)):
        words = rng.integers(0, 2**text_bits, rng.choice([0, 1, 5, 40]))
        ids += words.tolist()
        text += words.tolist()
        starts.append(len(ids))
        firsts.append(len(frames))
        codes = rng.integers(0, entries, (rng.choice([0, 1, 2, 20]), slots))
        frames += codes.tolist()
        ids += (base + entries * np.arange(slots) + codes).reshape(-1).tolist()
    words = rng.integers(0, 2**text_bits, rng.integers(0, 9)).tolist()
    ids, text = ids + words, text + words
    plane = packed_by_numpy(np.array(text + [0] * (-len(text) % 8), np.int64).reshape(-1, 8), text_bits)
    packed = packed_by_numpy(np.array(frames, np.int64).reshape(-1, slots), bits)
    tables = [plane, packed, np.array([*starts, len(ids)]), np.array([*firsts, len(frames)])]
    how = {"slots": slots, "bits": bits, "text_bits": text_bits, "audio_base": base, "entries": entries}
    return np.array(ids, np.int32), [torch.from_numpy(table) for table in tables], how


shapes = st.tuples(st.sampled_from([1, 3, 8, 9, 16, 32]), st.integers(1, 24), st.integers(1, 24))


@given(seeds, shapes)
def test_windows(side, seed, shape):
    ids, tables, how = stream(seed, *shape)
    rng = np.random.default_rng(seed)
    for length in {1, 2, len(ids) // 2, len(ids)} - {0}:
        if length <= len(ids):
            begins = np.concatenate([[0, len(ids) - length], rng.integers(0, len(ids) - length + 1, 5)])
            wanted = np.stack([ids[begin : begin + length] for begin in begins])
            same(side.Stream(*tables, **how).windows(torch.from_numpy(begins), length), wanted)
    none = side.Stream(*tables, **how).windows(torch.zeros(0, dtype=torch.int64), 3)
    assert none.shape == (0, 3)
    for begin in (-1, len(ids), -(2**63), 2**63 - 1):
        begins = torch.tensor([0, begin][len(ids) == 0 :])  # of an empty stream not even token 0 is there
        with pytest.raises(ValueError, match=rf"^window {len(begins) - 1}: 1 tokens from token {begin} on are not"):
            side.Stream(*tables, **how).windows(begins, 1)


@given(seeds, shapes, st.data())
def test_damaged_tables_never_lead_outside(side, seed, shape, data):
    """Whatever the tables say: an error, or the right number of ids."""
    ids, tables, how = stream(seed, *shape)
    extremes = [-(2**63), -(2**40), -1, 0, 1, 2, 7, len(ids) - 1, len(ids), len(ids) + 1, 2**40, 2**63 - 1]
    for _ in range(data.draw(st.integers(1, 3))):
        table = tables[data.draw(st.integers(2, 3))]
        table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.sampled_from(extremes))
    if data.draw(st.booleans()):
        tables[1] = tables[1][: len(tables[1]) // 2]
    if data.draw(st.booleans()):
        tables[0] = tables[0][: len(tables[0]) // 2]
    for begin in range(0, len(ids), 3):
        length = min(7, len(ids) - begin)
        try:
            found = side.Stream(*tables, **how).windows(torch.tensor([begin]), length)
        except ValueError as error:
            assert str(error).startswith("window 0: ")  # noqa: PT017
        else:
            assert found.shape == (1, length)


def damaged(which: int, index: int, value: int) -> list[Tensor]:
    """3 text tokens, 2 frames of 2 codes, 2 text tokens, 1 frame, 3 text tokens; one entry of a table changed."""
    tables = [
        torch.arange(8, dtype=torch.uint8).reshape(1, 8),
        torch.zeros(3, 1, dtype=torch.uint8),
        torch.tensor([3, 9, 14]),
        torch.tensor([0, 2, 3]),
    ]
    tables[which][index] = value
    return tables


@pytest.mark.parametrize(
    ("which", "index", "value"),
    [(2, 0, -1), (2, 1, 4), (2, 1, 2), (3, 1, 4), (3, 1, -1), (3, 0, 3), (3, 0, 2**62), (3, 2, 2**62), (2, 1, 2**62)],
)
def test_damage_is_found(side, which, index, value):
    how = {"slots": 2, "bits": 4, "text_bits": 8, "audio_base": 10, "entries": 16}
    wanted = [0, 1, 2, 10, 26, 10, 26, 3, 4, 10, 26, 5, 6, 7]
    begins = torch.tensor([0, 0])
    assert side.Stream(*damaged(2, 0, 3), **how).windows(begins, 14).tolist() == [wanted, wanted]
    with pytest.raises(ValueError, match="window 0: its runs lead outside"):
        side.Stream(*damaged(which, index, value), **how).windows(begins, 14)


def test_only_the_tables_that_a_window_needs_are_believed(side):
    how = {"slots": 2, "bits": 4, "text_bits": 8, "audio_base": 10, "entries": 16}
    tables = damaged(3, 2, 99)  # how many frames the last run has
    assert side.Stream(*tables, **how).windows(torch.tensor([1]), 7).tolist() == [[1, 2, 10, 26, 10, 26, 3]]
    with pytest.raises(ValueError, match=r"^window 1: its runs"):
        side.Stream(*tables, **how).windows(torch.tensor([0, 3]), 7)


def test_a_read_only_memory_map_is_read(side, tmp_path):
    ids, tables, how = stream(7, 8, 11, 3)
    mapped = []
    for i, table in enumerate(tables):
        np.save(tmp_path / f"{i}.npy", table.numpy())
        mapped.append(torch.from_numpy(np.load(tmp_path / f"{i}.npy", mmap_mode="r")))
    same(side.Stream(*mapped, **how).windows(torch.tensor([0]), len(ids))[0], ids)


# ---- batches


def batch_by_numpy(ids, counts, classes, weights, eos, reset_positions, label_weights):
    """A token at a time."""
    sequences, length = ids.shape[0], ids.shape[1] - 1
    found = [np.zeros((sequences, length), np.float32 if i == 2 else np.int64) for i in range(6)]
    starts = []
    for s in range(sequences):
        segment, origin = 0, 0
        for p in range(length):
            if p and ids[s, p - 1] == eos:
                segment, origin = segment + 1, p
            if p == 0 or origin == p:
                starts.append(s * length + p)
            label_class = classes[ids[s, p + 1]]
            weight = weights[label_class] if p < counts[s] else 0
            if label_weights is not None:
                weight = weight * label_weights[s, p]
            position = p - origin if reset_positions else p
            for i, value in enumerate((ids[s, p], ids[s, p + 1], weight, label_class, segment, position)):
                found[i][s, p] = value
    return [*found, np.array([*starts, sequences * length], np.int32)]


@given(seeds, st.integers(1, 5), st.integers(1, 70), st.booleans(), st.booleans())
def test_batches(side, seed, sequences, length, reset, weighted):
    rng = np.random.default_rng(seed)
    vocabulary = int(rng.integers(1, 40))
    ids = rng.integers(0, vocabulary, (sequences, length + 1)).astype(np.int32)
    counts = rng.integers(-1, length + 3, sequences)
    classes, weights = rng.integers(0, 5, vocabulary).astype(np.uint8), rng.random(5).astype(np.float32)
    eos = int(rng.integers(0, vocabulary))
    labels = (rng.random((sequences, length)) * rng.integers(0, 2)).astype(np.float32) if weighted else None
    arguments = [torch.from_numpy(x) for x in (ids, counts, classes, weights)]
    found = side.build_batch(*arguments, eos, reset, torch.from_numpy(labels) if weighted else None)
    for tensor, wanted in zip(found, batch_by_numpy(ids, counts, classes, weights, eos, reset, labels), strict=True):
        same(tensor, wanted)
        assert tensor.is_contiguous()


@pytest.mark.parametrize("bad", [-1, 20, 2**31 - 1, -(2**31)])
def test_an_id_outside_the_vocabulary(side, bad):
    ids = torch.full((3, 40), 7, dtype=torch.int32)
    ids[1, 39] = bad
    arguments = torch.full((3,), 39), torch.zeros(20, dtype=torch.uint8), torch.ones(1), 2, False
    with pytest.raises(ValueError, match=rf"^ids must lie in \[0, 20\), found {min(bad, 7)} to {max(bad, 7)}$"):
        side.build_batch(ids, *arguments)


def test_a_class_without_a_weight(side):
    ids, classes = torch.zeros(1, 5, dtype=torch.int32), torch.full((4,), 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^classes must lie in \[0, 3\), the number of weights; found 3$"):
        side.build_batch(ids, torch.tensor([4]), classes, torch.ones(3), 2, False)


def test_a_label_that_does_not_count_has_no_weight(side):
    """Not even if its own weight is none that could be multiplied."""
    ids, labels = torch.zeros(1, 5, dtype=torch.int32), torch.full((1, 4), math.inf)
    found = side.build_batch(ids, torch.tensor([2]), torch.zeros(1, dtype=torch.uint8), torch.ones(1), 2, False, labels)
    assert found[2].tolist() == [[math.inf, math.inf, 0, 0]]


def test_batches_are_those_of_the_batcher(side):
    from megatron_soda.data.batch import Batcher
    from megatron_soda.data.windows import Window
    from tests.helpers import SPACE, documents

    tokens = np.concatenate(documents(50))
    own = [np.linspace(i, i + 1, 33, dtype=np.float32) if i % 3 else np.ones(33, np.float32) for i in range(8)]
    rows = [tokens[33 * i : 33 * i + 34] for i in range(8)]
    windows = [Window(row, 30, None if i % 3 == 0 else own[i]) for i, row in enumerate(rows)]
    weights = [1.0 + i for i in range(len(SPACE.class_names))]
    for reset in (False, True):
        wanted = Batcher(SPACE, weights, reset)(windows)
        found = side.build_batch(
            torch.from_numpy(np.stack([w.ids for w in windows])), torch.full((8,), 30),
            torch.from_numpy(SPACE.class_table()), torch.tensor(weights), SPACE.eos, reset,
            torch.from_numpy(np.stack(own)),
        )  # fmt: skip
        lengths = wanted.cu_seqlens.diff()
        assert wanted.longest == lengths.max()
        columns = [column for name, column in vars(wanted).items() if name != "longest"]
        for a, b in zip(found, columns, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)


# ---- packing documents


@given(st.lists(st.integers(1, 30), max_size=80), st.integers(30, 33), st.sampled_from([np.int32, np.int64]))
def test_best_fit(side, lengths, capacity, dtype):
    """Places the documents again, one by one, and looks whether each bin was the right one."""
    order, offsets = side.best_fit(torch.from_numpy(np.array(lengths, dtype)), capacity)
    assert order.dtype == offsets.dtype == torch.int64
    order, offsets = order.tolist(), offsets.tolist()
    assert offsets[0] == 0
    assert offsets[-1] == len(order)
    assert sorted(order) == list(range(len(lengths)))
    bins = {document: b for b in range(len(offsets) - 1) for document in order[offsets[b] : offsets[b + 1]]}
    room: list[int] = []
    touched: list[int] = []
    now, content = 0, [[] for _ in offsets[1:]]
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, chosen, now = lengths[document], bins[document], now + 1
        enough = [b for b in range(len(room)) if room[b] >= length]
        if not enough:
            assert chosen == len(room)
            room.append(capacity)
            touched.append(0)
        else:
            assert chosen == min(enough, key=lambda b: (room[b], -touched[b]))
        room[chosen] -= length
        touched[chosen] = now
        content[chosen].append(document)
    assert [document for one in content for document in one] == order


@pytest.mark.parametrize("capacity", [1, 63, 64, 65, 4096, 4097, 2**18 + 1, 2**24])
def test_best_fit_of_many_sizes(side, capacity):
    rng = np.random.default_rng(capacity)
    lengths = np.minimum(rng.integers(1, capacity + 1, 700), rng.integers(1, capacity + 1, 700))
    order, offsets = side.best_fit(torch.from_numpy(lengths), capacity)
    wanted = reference.best_fit(torch.from_numpy(lengths), capacity)
    assert torch.equal(order, wanted[0])
    assert torch.equal(offsets, wanted[1])
    sums = np.add.reduceat(lengths[order.numpy()], offsets.numpy()[:-1])
    assert sums.max() <= capacity


@pytest.mark.parametrize("bad", [0, -3, 11, 2**31 - 1])
def test_the_first_document_that_does_not_fit_is_named(side, bad):
    lengths = torch.tensor([3, 10, bad, 99], dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"^lengths\[2\] is {bad}, not in 1 to 10$"):
        side.best_fit(lengths, 10)


# ---- documents


def illegal_by_python(ids, offsets, kinds, step, start, end):
    found = []
    for d in range(len(offsets) - 1):
        state, answer = start, None
        document = ids[offsets[d] : offsets[d + 1]]
        for position, token in enumerate(document):
            state = step[state, kinds[token]] if 0 <= token < len(kinds) else -1
            if state < 0:
                answer = position
                break
        found.append(answer if answer is not None else -1 if state == end else len(document))
    return np.array(found, np.int64)


@given(seeds, st.sampled_from([(1, 1), (2, 3), (17, 15), (17, 16), (5, 40), (127, 127), (100, 3)]))
def test_automata(side, seed, shape):
    rng = np.random.default_rng(seed)
    states, n_kinds = shape
    step = np.where(rng.random(shape) < rng.choice([0.001, 0.02, 0.3]), -1, rng.integers(0, states, shape))
    step = step.astype(np.int8)
    step[step < 0] = rng.integers(-128, 0)
    kinds = rng.integers(0, n_kinds, rng.integers(1, 50)).astype(np.int8)
    lengths = rng.choice([0, 0, 1, 2, 63, 64, 65, 130, 300], rng.integers(0, 9))
    offsets = np.concatenate([[2], 2 + np.cumsum(lengths)])
    ids = rng.integers(0, len(kinds), offsets[-1] + 3).astype(np.int32)
    strange = rng.random(len(ids)) < rng.choice([0, 0.003])
    ids[strange] = rng.choice([-1, len(kinds), 2**31 - 1, -(2**31)], strange.sum())
    start, end = int(rng.integers(states)), int(rng.integers(states))
    arguments = [torch.from_numpy(x) for x in (ids, offsets, kinds, step)]
    wanted = illegal_by_python(ids, offsets, kinds, step, start, end)
    same(side.first_illegal(*arguments, start, end), wanted)


def test_the_grammar_of_the_token_space(side):
    """The automaton gives what the token space says of a document, for whole and for damaged ones."""
    from tests.helpers import SPACE, documents

    space: TokenSpace = SPACE
    grammar = Grammar(space)
    step = np.full((grammar.states, 7 + space.codebooks + 1), -1, np.int8)
    for (state, kind), following in grammar.step.items():
        step[state, kind] = following
    rng = np.random.default_rng(0)
    made = documents(60)
    for document in made[20:]:
        document[rng.integers(len(document))] = rng.integers(-2, space.size + 2)
    made[5] = made[5][:-1]
    made[6] = made[6][:0]
    offsets = np.cumsum([0, *map(len, made)])
    tables = torch.from_numpy(space.kind_table()), torch.from_numpy(step)
    ids = torch.from_numpy(np.concatenate(made).astype(np.int32))
    found = side.first_illegal(ids, torch.from_numpy(offsets), *tables, Grammar.START, Grammar.END).tolist()
    for document, token in zip(made, found, strict=True):
        words = space.check(document)
        if words is None or "out of range" not in words:  # an id out of range is told before all else
            assert (words is None) == (token == -1)
            assert words is None or words.startswith(f"token {token}:")
        else:
            assert 0 <= token < len(document)
    assert found[5] == len(made[5])
    assert found[6] == 0


def hash_by_python(document) -> int:
    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) % 2**64
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    total = sum(mix(int(token) % 2**32 + ((p + 1) << 32)) for p, token in enumerate(document)) % 2**64
    signed = mix(total ^ len(document))
    return signed - 2**64 if signed >= 2**63 else signed


@given(seeds)
def test_hashes(side, seed):
    rng = np.random.default_rng(seed)
    lengths = rng.choice([0, 0, 1, 3, 8, 17, 100], rng.integers(0, 8))
    offsets = np.concatenate([[1], 1 + np.cumsum(lengths)])
    ids = rng.integers(-(2**31), 2**31, offsets[-1] + 2).astype(np.int32)
    wanted = [hash_by_python(ids[a:b]) for a, b in pairwise(offsets)]
    same(side.hash_documents(torch.from_numpy(ids), torch.from_numpy(offsets)), np.array(wanted, np.int64))


def test_hashes_tell_documents_apart(side):
    """Each token and its place count: other ids, other order, other length."""
    documents = [[], [0], [0, 0], [1, 2], [2, 1], [1, 2, 0], [0, 1, 2], [-1], [-1, 0]]
    ids = torch.tensor([token for one in documents for token in one], dtype=torch.int32)
    offsets = torch.from_numpy(np.cumsum([0, *map(len, documents)]))
    assert len(set(side.hash_documents(ids, offsets).tolist())) == len(documents)


# ---- wrong arguments


def codes(**kind) -> Tensor:
    return torch.zeros(4, 8, **{"dtype": torch.int32, **kind})


I32, I64, U8 = (lambda *s, t=t: torch.zeros(*s, dtype=t) for t in (torch.int32, torch.int64, torch.uint8))
I8 = torch.zeros(2, 2, dtype=torch.int8)
EXPAND = {"slots": 8, "bits": 11, "text_bits": 16, "audio_base": 0, "entries": 4}
WRONG = {
    "a list": (TypeError, "codes must be a tensor, not list", lambda o: o.pack_frames([[1]], 3)),
    "a dtype": (TypeError, "codes must be int16 or int32, not int64", lambda o: o.pack_frames(I64(2, 2), 3)),
    "a device": (ValueError, "codes must be on a CPU or", lambda o: o.pack_frames(codes(device="meta"), 3)),
    "dimensions": (ValueError, "codes must have 2 dimensions, not shape", lambda o: o.pack_frames(I32(4), 3)),
    "strides": (ValueError, "codes must be contiguous", lambda o: o.pack_frames(codes().T, 3)),
    "bits": (ValueError, "bits must be 1 to 24, not 25", lambda o: o.pack_frames(codes(), 25)),
    "bits 0": (ValueError, "bits must be 1 to 24, not 0", lambda o: o.unpack_frames(U8(2, 2), 8, 0)),
    "float bits": (TypeError, "bits must be an int, not float", lambda o: o.pack_frames(codes(), 3.0)),
    "a width": (ValueError, r"packed must be \(frames, 11\)", lambda o: o.unpack_frames(U8(2, 10), 8, 11)),
    "slots": (ValueError, "slots must be 1 to", lambda o: o.unpack_frames(U8(2, 0), 0, 11)),
    "text bytes": (
        ValueError,
        r"text must be \(frames, 16\) for 8 slots of 16 bits, not \(1, 15\)",
        lambda o: o.Stream(U8(1, 15), U8(1, 11), I64(1), I64(1), **EXPAND).windows(I64(1), 1),
    ),
    "tables": (
        ValueError,
        "starts and firsts must be equally long.* 2 and 1",
        lambda o: o.Stream(U8(1, 16), U8(1, 11), I64(2), I64(1), **EXPAND).windows(I64(1), 1),
    ),
    "no tables": (
        ValueError,
        "starts and firsts must be equally long, at least 1",
        lambda o: o.Stream(U8(1, 16), U8(1, 11), I64(0), I64(0), **EXPAND).windows(I64(1), 1),
    ),
    "two devices": (
        ValueError,
        "starts must be on cpu, not on meta",
        lambda o: o.Stream(U8(1, 16), U8(1, 11), I64(1).to("meta"), I64(1), **EXPAND).windows(I64(1), 1),
    ),
    "length": (
        ValueError,
        "length must be 1 to",
        lambda o: o.Stream(U8(1, 16), U8(1, 11), I64(1), I64(1), **EXPAND).windows(I64(1), 0),
    ),
    "ids over int32": (
        ValueError,
        "make ids over int32",
        lambda o: o.Stream(U8(1, 16), U8(1, 11), I64(1), I64(1), **{**EXPAND, "entries": 2**30}).windows(I64(1), 1),
    ),
    "a short batch": (
        ValueError,
        r"ids must be \(sequences, length \+ 1\)",
        lambda o: o.build_batch(I32(2, 1), I64(2), U8(2), torch.ones(1), 0, False),
    ),
    "no batch": (
        ValueError,
        r"ids must be \(sequences, length \+ 1\)",
        lambda o: o.build_batch(I32(0, 4), I64(0), U8(2), torch.ones(1), 0, False),
    ),
    "counts": (
        ValueError,
        r"counts must be \(2,\)",
        lambda o: o.build_batch(I32(2, 5), I64(3), U8(2), torch.ones(1), 0, False),
    ),
    "weights": (
        TypeError,
        "weights must be float32, not float64",
        lambda o: o.build_batch(I32(2, 5), I64(2), U8(2), torch.ones(1).double(), 0, False),
    ),
    "label weights": (
        ValueError,
        r"label_weights must be \(2, 4\), one per label of ids, not \(2, 5\)",
        lambda o: o.build_batch(I32(2, 5), I64(2), U8(2), torch.ones(1), 0, False, torch.ones(2, 5)),
    ),
    "capacity": (ValueError, "capacity must be 1 to 16777216", lambda o: o.best_fit(I32(0), 2**24 + 1)),
    "lengths": (TypeError, "lengths must be int32 or int64, not uint8", lambda o: o.best_fit(U8(3), 4)),
    "cpu only": (ValueError, "lengths must be on cpu, not on meta", lambda o: o.best_fit(I32(3).to("meta"), 4)),
    "falling offsets": (
        ValueError,
        "offsets must never fall and lie within 0 to 9",
        lambda o: o.hash_documents(I32(9), torch.tensor([0, 5, 4, 9])),
    ),
    "offsets outside": (
        ValueError,
        "offsets must never fall and lie within 0 to 9",
        lambda o: o.hash_documents(I32(9), torch.tensor([0, 10])),
    ),
    "offsets below": (
        ValueError,
        "offsets must never fall and lie within 0 to 9",
        lambda o: o.first_illegal(I32(9), torch.tensor([-1, 9]), I8[0], I8, 0, 0),
    ),
    "no offsets": (ValueError, "offsets must have at least one entry", lambda o: o.hash_documents(I32(9), I64(0))),
    "a kind": (
        ValueError,
        r"kinds must lie in \[0, 2\), found 2 to 2",
        lambda o: o.first_illegal(I32(9), I64(1), I8[0] + 2, I8, 0, 0),
    ),
    "a state": (
        ValueError,
        "step holds state 2, but there are 2 states",
        lambda o: o.first_illegal(I32(9), I64(1), I8[0], I8 + 2, 0, 0),
    ),
    "start": (
        ValueError,
        "start must be 0 to 1, not 2",
        lambda o: o.first_illegal(I32(9), I64(1), I8[0], I8, 2, 0),
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(side, what):
    kind, words, call = WRONG[what]
    with pytest.raises(kind, match=words):
        call(side)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pack_frames", (codes(), 25)),
        ("unpack_frames", (U8(2, 10), 8, 11)),
        ("unpack_frames", (U8(22).view(11, 2).T, 8, 11)),
        ("expand_windows", (U8(1, 16), U8(1, 11), I64(2), I64(1), I64(1), 1, 8, 11, 16, 0, 4)),
        ("expand_windows", (U8(1, 16), U8(1, 11), I64(1), I64(1), I64(1), 1, 8, 11, 17, 0, 4)),
        ("build_batch", (I32(2, 1), I64(2), U8(2), torch.ones(1), 0, False, None)),
        ("build_batch", (I32(2, 5), I64(2), I64(2), torch.ones(1), 0, False, None)),
        ("build_batch", (I32(2, 5), I64(2), U8(2), torch.ones(1), 0, False, torch.ones(2, 5))),
        ("build_batch", (I32(2, 5), I64(2), U8(2), torch.ones(1), 0, False, torch.ones(1, 4))),
        ("best_fit", (I32(3), 0)),
        ("first_illegal", (I32(9), torch.tensor([0, 10]), I8[0], I8, 0, 0)),
        ("first_illegal", (I32(9), torch.tensor([0, 9]), I8[0] - 1, I8, 0, 0)),
        ("first_illegal", (I32(9), torch.tensor([0, 9]), I8[0], I8 + 9, 0, 0)),
        ("hash_documents", (I32(9), torch.tensor([5, 4]))),
    ],
)
def test_csrc_itself_never_reads_outside(name, arguments):
    """What the Python functions would have refused, given to the ops themselves."""
    test_csrc_is_used()
    with pytest.raises(RuntimeError, match=r"megatron_soda: |expected scalar type"):
        getattr(torch.ops.megatron_soda, name)(*arguments)
