"""The head and its loss against float64: on one rank, split over two and four, with and without sequence parallel."""

import numpy as np
import pytest

from tests.distributed.test_layouts import metrics, train

TOKENS, HIDDEN, CLASSES = 24, 16, 5


def reference(hidden, weight, labels, weights, classes, z):
    """Loss, gradients of hidden and weight, and the sums by class, in float64."""
    logits = hidden @ weight.T
    high = logits.max(-1, keepdims=True)
    log_total = (high + np.log(np.exp(logits - high).sum(-1, keepdims=True)))[:, 0]
    rows = np.arange(len(labels))
    nll = log_total - logits[rows, labels]
    gradient = np.exp(logits - log_total[:, None]) * (1 + 2 * z * log_total)[:, None]
    gradient[rows, labels] -= 1
    gradient *= weights[:, None]
    sums = np.stack([np.bincount(classes, x, CLASSES) for x in (nll * weights, weights)])
    return ((nll + z * log_total**2) * weights).sum(), gradient @ weight, gradient.T @ hidden, sums


def compute(vocabulary: int, padded: int, z: float, scale: float, rows: int, sequence: bool, main_grad: bool):
    """On a rank of the pool: the largest differences to the reference, relative to its largest value."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    from megatron_soda.model import head

    ranks, rank = dist.get_world_size(), dist.get_rank()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks)
    rng = np.random.default_rng(7)
    hidden, start = rng.normal(size=(TOKENS, HIDDEN)), rank * padded // ranks
    weight = np.full((padded, HIDDEN), 9.0)  # padded rows would win if they counted
    weight[:vocabulary] = rng.normal(size=(vocabulary, HIDDEN)) * scale
    labels, classes = rng.integers(0, vocabulary, TOKENS), rng.integers(0, CLASSES, TOKENS)
    weights = rng.choice([0.0, 0.5, 1.0, 2.0], TOKENS)
    loss, of_hidden, of_weight, sums = reference(hidden, weight[:vocabulary], labels, weights, classes, z)
    of_weight = np.concatenate([of_weight, np.zeros((padded - vocabulary, HIDDEN))])

    local = torch.tensor(np.split(weight, ranks)[rank], dtype=torch.float32)
    if sequence:
        mine = torch.tensor(np.split(hidden, ranks)[rank], dtype=torch.float32).requires_grad_()
        whole = tensor_parallel.gather_from_sequence_parallel_region(mine)
        of_hidden = np.split(of_hidden, ranks)[rank]
    else:
        mine = torch.tensor(hidden, dtype=torch.float32).requires_grad_()
        whole = tensor_parallel.copy_to_tensor_model_parallel_region(mine)
    gradient = torch.ones_like(local) if main_grad else None
    local.requires_grad_(not main_grad)
    kept = head.CHUNK_BYTES
    head.CHUNK_BYTES, head.FEWEST_ROWS = {"cpu": rows * 4 * len(local)}, 1
    try:
        found, found_sums = head.head_loss(
            whole, local, torch.tensor(labels), torch.tensor(weights, dtype=torch.float32), torch.tensor(classes),
            classes=CLASSES, rows=min(max(vocabulary - start, 0), len(local)), z_weight=z, group=dist.group.WORLD,
            weight_gradient=gradient,
        )  # fmt: skip
    finally:
        head.CHUNK_BYTES, head.FEWEST_ROWS = kept, 16
    (found if main_grad else 3 * found).backward()
    times = 1 if main_grad else 3
    found_weight = gradient - 1 if gradient is not None else local.grad / times
    pairs = [
        (float(found), loss),
        (found_sums.numpy(), sums),
        (mine.grad.numpy() / times, of_hidden),
        (found_weight.numpy(), np.split(of_weight, ranks)[rank]),
    ]
    return [float(np.abs(a - b).max() / max(1.0, np.abs(b).max())) for a, b in pairs]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("sequence", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize(
    ("vocabulary", "padded", "z", "scale", "rows", "main_grad"),
    [
        (40, 40, 0.0, 1.0, 100, False),
        (37, 40, 1e-4, 1.0, 5, True),
        (37, 40, 0.1, 3.0, 7, False),
        (9, 40, 1e-4, 1.0, 1, True),  # whole ranks of padding
    ],
)
def test_against_float64(pool, world, sequence, vocabulary, padded, z, scale, rows, main_grad):
    for rank in pool.run(world, compute, vocabulary, padded, z, scale, rows, sequence, main_grad):
        assert max(rank) < 3e-6


def scale_the_loss() -> None:
    import torch

    from megatron_soda.model.head import head_loss

    weight = torch.zeros(8, 4)
    hidden = torch.ones(2, 4, requires_grad=True)
    labels, ones = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    loss, _ = head_loss(hidden, weight, labels, ones, labels, classes=1, rows=8, weight_gradient=weight.clone())
    (2 * loss).backward()


def test_a_scaled_loss_is_refused(pool):
    with pytest.raises(RuntimeError, match="cannot be scaled by 2"):
        pool.run(1, scale_the_loss)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.pipeline=2"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.tensor=2", "parallel.pipeline=2"],
    ],
    ids=["pp2", "sp2", "tp2pp2"],
)
def test_tied_embeddings(pool, data, tied_reference, tmp_path, overrides):
    world = 4 if len(overrides) == 2 and "pipeline" in overrides[1] else 2
    pool.run(world, train, str(tmp_path), str(data), ["model.tie_embeddings=true", *overrides])
    for a, b in zip(metrics(tied_reference), metrics(tmp_path), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-4)


@pytest.fixture(scope="module")
def tied_reference(pool, data, tmp_path_factory):
    run = tmp_path_factory.mktemp("tied")
    pool.run(1, train, str(run), str(data), ["model.tie_embeddings=true"])
    return run
