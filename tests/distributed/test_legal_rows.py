"""The head over legal rows: against float64 and the grammar's automaton, split over ranks, and in training."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_soda.data.batch import Batcher
from megatron_soda.data.windows import Window
from megatron_soda.errors import SodaError
from megatron_soda.model.legal_rows import LegalRows
from megatron_soda.model.rows import Rows
from megatron_soda.vocab import LLAMA3, MARKERS, Grammar, TokenSpace
from tests.distributed.test_layouts import metrics, same, train
from tests.helpers import SPACE, deal, dealt, documents

CLASSES = len(SPACE.class_names)
WIDE = TokenSpace(text_size=30, bos=0, eos=2, codebooks=3, entries=11)


def automaton(ids: np.ndarray, space: TokenSpace, slots: int) -> np.ndarray:
    """bool (len(ids), size): what may follow each token of whole documents, one after the other."""
    grammar, kinds = Grammar(space, slots), space.kind_table()
    legal, state, found = grammar.legal(), Grammar.START, []
    for token in ids:
        state = grammar.step[state, int(kinds[token])]
        if state == Grammar.END:
            state = Grammar.START
        found.append(legal[state])
    return np.array(found)


def rows_of(legal: LegalRows, batch) -> np.ndarray:
    """bool (positions, rows of this rank): those that the head computes for each position."""
    group = legal.groups(batch).reshape(-1)
    found = np.zeros((len(group), len(legal.ids)), bool)
    for piece in legal.pieces(group, batch.loss_weight.reshape(-1)):
        mine = np.zeros(len(legal.ids), bool)
        assert piece.high <= len(mine)  # no padding
        mine[piece.low : piece.high] = True
        if piece.illegal is not None:
            mine[piece.low + piece.illegal.numpy()] = False
        found[piece.index.numpy()] = mine
    return found


def batch_of(ids: np.ndarray, space: TokenSpace = SPACE):
    return Batcher(space)([Window(ids, len(ids) - 1)])


@pytest.mark.parametrize("space", [SPACE, WIDE, replace(WIDE, codebooks=1)], ids=["small", "three", "one"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_are_the_automatons(space, ranks):
    ids = np.concatenate(documents(40, 0, space))
    wanted = automaton(ids[:-1], space, space.codebooks)
    for rank in range(ranks):
        found = rows_of(LegalRows(Rows(space, ranks), {space.codebooks}, rank), batch_of(ids, space))
        assert np.array_equal(found, wanted[:, dealt(space, ranks, rank)])


@pytest.mark.parametrize("space", [SPACE, WIDE, LLAMA3], ids=["small", "three", "soda"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_share_the_work(space, ranks):
    """Whatever a position needs, each rank computes an equal part of it; a range may hold a few masked rows besides."""
    legal = [LegalRows(Rows(space, ranks), {space.codebooks}, rank) for rank in range(ranks)]
    markers = 2 + len(MARKERS)  # BOS and EOS too
    for sets in zip(*(one.sets for one in legal), strict=True):
        rows = [piece.high - piece.low - (0 if piece.illegal is None else len(piece.illegal)) for piece in sets]
        assert max(rows) - min(rows) <= 1 + markers
        ranges = [piece.high - piece.low for piece in sets]
        if sum(rows) >= space.entries:  # of markers alone, which one rank has, the range is longer
            assert max(ranges) <= max(rows) + markers
        assert sets[0].width == max(1, *ranges)  # the same on every rank
        assert len({piece.width for piece in sets}) == 1


def test_windows_that_begin_anywhere():
    """What is legal is never left out; only where a window begins with text is it not known which text."""
    ids = np.concatenate(documents(20))
    wanted = automaton(ids, SPACE, SPACE.codebooks)
    legal = LegalRows(Rows(SPACE), {SPACE.codebooks})
    text = SPACE.kind_table()[ids] == 0
    unsure = 0
    for start in range(0, len(ids) - 40, 3):
        found, exact = rows_of(legal, batch_of(ids[start : start + 40])), wanted[start : start + 39]
        assert (found >= exact).all()
        first = int(np.argmin(text[start : start + 40]))
        assert np.array_equal(found[first:], exact[first:])
        unsure += first
        assert found[:first].sum() == exact[:first].sum() + first  # EOS or TEXT_END besides
    assert unsure > 20


def test_semantic_only_stores_beside_full_ones():
    ids = np.array([SPACE.bos, SPACE.audio_start, SPACE.audio_base, SPACE.audio_base + 1, SPACE.audio_end, SPACE.eos])
    semantic = rows_of(LegalRows(Rows(SPACE), {1}), batch_of(ids.astype(np.int32)))
    assert np.array_equal(semantic, automaton(ids[:-1], SPACE, 1))
    both = rows_of(LegalRows(Rows(SPACE), {1, SPACE.codebooks}), batch_of(ids.astype(np.int32)))
    second = SPACE.audio_base + SPACE.entries
    assert both[2, second : second + SPACE.entries].all()
    both[2, second : second + SPACE.entries] = both[3, second : second + SPACE.entries] = False
    assert np.array_equal(both, semantic)


def test_an_illegal_label_is_named():
    ids = documents(1)[0][:4].copy()
    ids[3] = SPACE.bos
    legal, batch = LegalRows(Rows(SPACE), {SPACE.codebooks}), batch_of(ids)
    with pytest.raises(SodaError, match=f"token {SPACE.bos} after token {ids[2]}, where the grammar"):
        legal.groups(batch)
    batch.loss_weight[0, 2] = 0  # the padding of a last window is not looked at
    assert not rows_of(legal, batch)[2].any()


@pytest.mark.parametrize("ranks", [1, 3])
def test_a_sample_of_the_other_rows(ranks):
    """Every row that is not legal is in just one of the samples; which one a batch takes follows from its tokens."""
    ids = np.concatenate(documents(40))
    batch, allowed = batch_of(ids), automaton(ids[:-1], SPACE, SPACE.codebooks)
    for rank in range(ranks):
        mine = dealt(SPACE, ranks, rank)
        legal = LegalRows(Rows(SPACE, ranks), {SPACE.codebooks}, rank, one_in=5)
        found = np.zeros((5, *allowed[:, mine].shape), int)
        for turn in range(5):
            for piece in legal.pieces(legal.groups(batch).flatten(), batch.loss_weight.flatten(), turn):
                assert piece.one_in == 5
                assert (mine[piece.others.numpy()] % 5 == turn).all()
                found[turn][np.ix_(piece.index.numpy(), piece.others.numpy())] += 1
        assert np.array_equal(found.sum(0), ~allowed[:, mine])
        turns = [legal.turn(batch_of(ids[i : i + 50])) for i in range(60)]
        assert turns == [legal.turn(batch_of(ids[i : i + 50])) for i in range(60)]
        assert set(turns) == set(range(5))
    assert LegalRows(Rows(SPACE), {SPACE.codebooks}).turn(batch) is None


def test_positions_without_a_weight_cost_nothing():
    """Validation fills its last micro-batches with windows that weigh nothing: no product of the head is for them."""
    from megatron_soda.model.head import head_loss

    ids = np.concatenate(documents(2))
    legal, batch = LegalRows(Rows(SPACE), {SPACE.codebooks}), batch_of(ids)
    labels, weights, classes = batch.labels.flatten(), torch.zeros(len(ids) - 1), batch.class_id.flatten()
    pieces = legal.pieces(legal.groups(batch).flatten(), weights)
    assert pieces == []
    unusable = torch.full((len(ids) - 1, 4), torch.nan), torch.full((SPACE.size, 4), torch.nan)
    loss, sums = head_loss(*unusable, labels, weights, classes, classes=CLASSES, rows=SPACE.size, pieces=pieces)
    assert loss == 0
    assert not sums.any()


def compute(one_in: int, at_a_time: int, z: float, sequence: bool) -> list[float]:
    """On a rank of the pool: the largest differences to float64, relative to its largest value."""
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_soda.model import head

    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    rng = np.random.default_rng(3)
    rows = Rows(SPACE, ranks)
    mine, row_of_id = dealt(SPACE, ranks, rank), rows.of_ids()
    ids = np.concatenate(documents(12))
    ids = ids[: len(ids) // 4 * 4 - 3]
    batch = batch_of(ids)
    batch.loss_weight *= torch.tensor(rng.choice([0.0, 0.5, 1.0, 2.0], batch.loss_weight.shape)).float()
    hidden, weight = rng.normal(size=(len(ids) - 1, 16)), rng.normal(size=(SPACE.size, 16))
    legal = LegalRows(rows, {SPACE.codebooks}, rank, one_in=one_in)
    allowed, turn = automaton(ids[:-1], SPACE, SPACE.codebooks), legal.turn(batch)
    logits = np.where(allowed, hidden @ weight.T, -np.inf)
    labels, weights, classes = (x.reshape(-1) for x in (batch.labels, batch.loss_weight, batch.class_id))
    at, of_label = np.arange(len(labels)), weights.double().numpy()
    nll = np.log(np.exp(logits).sum(1)) - logits[at, labels]
    sums = np.stack([np.bincount(classes, x, CLASSES) for x in (nll * of_label, of_label)])
    if turn is not None:
        sampled = ~allowed & (np.arange(SPACE.size) % one_in == turn)
        logits = np.where(sampled, hidden @ weight.T + np.log(one_in), logits)
    log_total = np.log(np.exp(logits).sum(1))
    losses = (log_total - logits[at, labels] + z * log_total**2) * of_label
    gradient = np.exp(logits - log_total[:, None]) * (1 + 2 * z * log_total)[:, None]
    gradient[at, labels] -= 1
    gradient *= of_label[:, None]

    x, part = torch.tensor(hidden).float().requires_grad_(), torch.full((rows.local, 16), 9.0)
    if sequence:
        x = torch.tensor(np.split(hidden, ranks)[rank]).float().requires_grad_()
        whole = tensor_parallel.gather_from_sequence_parallel_region(x)
    else:
        whole = tensor_parallel.copy_to_tensor_model_parallel_region(x)
    part[: len(mine)] = torch.tensor(weight[mine])  # padding would win if it counted
    summed, kept = torch.zeros_like(part), (head.CHUNK_BYTES, head.FEWEST_ROWS)
    head.CHUNK_BYTES, head.FEWEST_ROWS = {"cpu": at_a_time * 4 * SPACE.entries}, 1
    try:
        found, found_sums = head.head_loss(
            whole, part, row_of_id[labels], weights, classes, classes=CLASSES, rows=len(mine), z_weight=z,
            group=dist.group.WORLD, weight_gradient=summed,
            pieces=legal.pieces(legal.groups(batch).flatten(), weights, turn),
        )  # fmt: skip
    finally:
        head.CHUNK_BYTES, head.FEWEST_ROWS = kept
    found.backward()
    pairs = [
        (float(found), losses.sum()),
        (found_sums.numpy(), sums),
        (x.grad.numpy(), np.split(gradient @ weight, ranks)[rank] if sequence else gradient @ weight),
        (summed.numpy(), deal(gradient.T @ hidden, rows.local, SPACE, ranks, rank)),
    ]
    return [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs]


@pytest.mark.parametrize(("world", "sequence"), [(1, False), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize(
    ("one_in", "at_a_time", "z"), [(0, 1000, 1e-4), (0, 3, 0.1), (4, 7, 0.1), (16, 1000, 1e-4), (1000, 1000, 0.1)]
)
def test_against_float64(pool, world, sequence, one_in, at_a_time, z):
    for rank in pool.run(world, compute, one_in, at_a_time, z, sequence):
        assert max(rank) < 3e-6


LEGAL = ["training.head_rows=legal", "training.head_other_share=0.2", "model.num_query_groups=4"]
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "tp4": (4, ["parallel.tensor=4"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "dp2": (2, ["parallel.distributed_optimizer=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


@pytest.fixture(scope="module")
def alone(pool, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("legal")
    pool.run(1, train, str(run), str(data), LEGAL)
    return metrics(run)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_at_every_layout(pool, data, alone, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    pool.run(world, train, str(tmp_path), str(data), [*LEGAL, *overrides])
    assert same(alone, metrics(tmp_path))


def test_a_tied_head_over_legal_rows(pool, data, tmp_path):
    for world, overrides in ((1, []), LAYOUTS["tp4"], LAYOUTS["tp2pp2"]):
        tied = [*LEGAL, "model.tie_embeddings=true", *overrides]
        pool.run(world, train, str(tmp_path / f"{len(overrides)}"), str(data), tied)
    alone, *others = (metrics(tmp_path / str(n)) for n in range(3))
    assert all(same(alone, found) for found in others)


def test_a_run_can_switch(pool, data, tmp_path):
    """From all rows to legal ones at a checkpoint. The loss falls at once by what the grammar knows."""
    flat = ["schedule.warmup_share=0", "schedule.decay_share=0"]
    pool.run(1, train, str(tmp_path), str(data), ["training.steps=10", *flat])
    pool.run(1, train, str(tmp_path), str(data), ["training.steps=20", "training.head_rows=legal", *flat])
    found = metrics(tmp_path)
    assert len(found) == 20
    assert found[10]["loss"] < found[9]["loss"] - 0.5
