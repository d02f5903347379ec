"""Cross-entropy with z-loss over a vocabulary that is split between tensor-parallel ranks, and the loss sums."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ROWS = 64  # of logits that are worked on together: they stay in the cache, which is half of the time on CPU


class _VocabParallelLoss(torch.autograd.Function):
    """Works in place: the logits become exp(logits - max), and those the gradient. Nothing of their size is added."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocabulary: int, z_weight: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        width = logits.shape[-1]
        start = rank * width
        real = min(max(vocabulary - start, 0), width)  # the columns after these are padding
        scores = logits.detach().float().view(-1, width)
        flat = labels.reshape(-1)
        mine = (flat >= start) & (flat < start + real)
        index = torch.where(mine, flat - start, 0)
        score = torch.where(mine, scores.gather(-1, index[:, None])[:, 0], 0.0)
        highest = torch.cat([chunk.amax(-1) for chunk in scores[:, :real].split(ROWS)]) if real else score - torch.inf
        if ranks > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        total = torch.empty_like(highest)
        for chunk, high, out in zip(scores.split(ROWS), highest.split(ROWS), total.split(ROWS), strict=True):
            chunk[:, real:] = -torch.inf
            torch.sum(chunk.sub_(high[:, None]).exp_(), -1, out=out)
        if ranks > 1:
            both = torch.stack([total, score])
            dist.all_reduce(both, group=group)
            total, score = both
        log_total = highest + total.log()
        nll = (log_total - score).view(labels.shape)
        ctx.save_for_backward(scores, total, index, mine, log_total)
        ctx.z_weight, ctx.dtype, ctx.shape = z_weight, logits.dtype, logits.shape
        ctx.mark_non_differentiable(nll)
        return nll + z_weight * log_total.square().view(labels.shape), nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        scores, total, index, mine, log_total = ctx.saved_tensors
        incoming = gradients[0].reshape(-1).float()
        factor = incoming * (1 + 2 * ctx.z_weight * log_total) / total
        for chunk, part in zip(scores.split(ROWS), factor.split(ROWS), strict=True):
            chunk.mul_(part[:, None])
        scores.scatter_add_(-1, index[:, None], torch.where(mine, -incoming, 0.0)[:, None])
        return scores.view(ctx.shape).to(ctx.dtype), None, None, None, None


def vocab_parallel_loss(
    logits: Tensor, labels: Tensor, vocabulary: int, z_weight: float = 0.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood of every label, float32, in nats.

    logits: (..., local vocabulary), rank r of `group` holding columns [r * local, (r + 1) * local); columns from
    `vocabulary` on are padding and take no probability. labels: int64 (...), global ids.
    Returns (nll + z_weight * logsumexp**2, nll); only the first carries a gradient. z-loss: paper, section 4.
    Float32 logits are used up: their memory holds the gradient afterwards, so backward can run once.
    """
    loss, nll = _VocabParallelLoss.apply(logits, labels, vocabulary, z_weight, group)  # type: ignore[misc]
    return loss, nll


def class_sums(nll: Tensor, weight: Tensor, class_id: Tensor, classes: int) -> Tensor:
    """float32 (2, classes): per class the sum of weighted NLL and the sum of weights."""
    sums = torch.zeros(2, classes, dtype=torch.float32, device=nll.device)
    sums[0].index_add_(0, class_id.flatten(), (nll * weight).flatten())
    sums[1].index_add_(0, class_id.flatten(), weight.flatten())
    return sums
