"""The loss against float64, on one rank and split over two and four."""

import numpy as np
import pytest
import torch

from megatron_soda.model.loss import class_sums


def reference(logits: np.ndarray, labels: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
    """Loss (n,) and the gradient of its sum (n, v), in float64."""
    high = logits.max(-1, keepdims=True)
    log_total = (high + np.log(np.exp(logits - high).sum(-1, keepdims=True)))[:, 0]
    rows = np.arange(len(labels))
    loss = log_total - logits[rows, labels] + z * log_total**2
    gradient = np.exp(logits - log_total[:, None]) * (1 + 2 * z * log_total)[:, None]
    gradient[rows, labels] -= 1
    return loss, gradient


def compute(seed: int, vocabulary: int, padded: int, z: float, scale: float):
    """On a rank of the pool: its part of logits that are padded with large values, which must not count."""
    import torch.distributed as dist

    from megatron_soda.model.loss import vocab_parallel_loss

    rng = np.random.default_rng(seed)
    logits = np.full((12, padded), 50.0)
    logits[:, :vocabulary] = rng.normal(size=(12, vocabulary)) * scale
    labels = rng.integers(0, vocabulary, 12)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    local = torch.tensor(logits, dtype=torch.float32).chunk(ranks, -1)[rank].clone().requires_grad_()
    loss, nll = vocab_parallel_loss(
        local.view(3, 4, -1), torch.tensor(labels).view(3, 4), vocabulary, z, dist.group.WORLD
    )
    loss.sum().backward()
    expected, gradient = reference(logits[:, :vocabulary], labels, z)
    plain, _ = reference(logits[:, :vocabulary], labels, 0.0)
    full = np.zeros((12, padded))
    full[:, :vocabulary] = gradient
    mine = np.split(full, ranks, -1)[rank]
    return (
        float(np.abs(loss.detach().numpy().reshape(-1) - expected).max()),
        float(np.abs(nll.numpy().reshape(-1) - plain).max()),
        float(np.abs(local.grad.numpy() - mine).max()),
    )


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("vocabulary", "padded", "z", "scale"), [(40, 40, 0.0, 1.0), (37, 40, 1e-4, 3.0), (33, 40, 0.1, 10.0)]
)
def test_against_float64(pool, world, vocabulary, padded, z, scale):
    for rank in pool.run(world, compute, 5, vocabulary, padded, z, scale):
        assert max(rank) < 2e-4 * scale if z == 0.1 else max(rank) < 1e-5


def test_class_sums():
    nll = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    weight = torch.tensor([[1.0, 0.5], [1.0, 0.0]])
    classes = torch.tensor([[0, 2], [2, 1]])
    assert class_sums(nll, weight, classes, 4).tolist() == [[1.0, 0.0, 4.0, 0.0], [1.0, 0.0, 1.5, 0.0]]
