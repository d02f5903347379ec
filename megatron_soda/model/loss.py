"""Cross-entropy with z-loss over a vocabulary that is split between tensor-parallel ranks, and the loss sums."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _VocabParallelLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, vocabulary: int, z_weight: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        start = rank * logits.shape[-1]
        real = min(max(vocabulary - start, 0), logits.shape[-1])  # the columns after these are padding
        scores = logits.float()
        if real < logits.shape[-1]:
            scores = scores.clone() if scores is logits else scores
            scores[..., real:] = -torch.inf
        highest = scores.amax(-1)
        if ranks > 1:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        shares = torch.exp(scores - highest[..., None])
        total = shares.sum(-1)
        mine = (labels >= start) & (labels < start + real)
        index = torch.where(mine, labels - start, 0)
        score = torch.where(mine, scores.gather(-1, index[..., None])[..., 0], 0.0)
        if ranks > 1:
            both = torch.stack([total, score])
            dist.all_reduce(both, group=group)
            total, score = both
        log_total = highest + total.log()
        nll = log_total - score
        ctx.save_for_backward(shares.div_(total[..., None]), index, mine, log_total)
        ctx.z_weight, ctx.dtype = z_weight, logits.dtype
        ctx.mark_non_differentiable(nll)
        return nll + z_weight * log_total.square(), nll

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shares, index, mine, log_total = ctx.saved_tensors
        gradient = shares * (1 + 2 * ctx.z_weight * log_total)[..., None]
        gradient.scatter_add_(-1, index[..., None], -mine[..., None].to(gradient.dtype))
        return (gradient * gradients[0][..., None]).to(ctx.dtype), None, None, None, None


def vocab_parallel_loss(
    logits: Tensor, labels: Tensor, vocabulary: int, z_weight: float = 0.0, group: dist.ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and negative log-likelihood of every label, float32, in nats.

    logits: (..., local vocabulary), rank r of `group` holding columns [r * local, (r + 1) * local); columns from
    `vocabulary` on are padding and take no probability. labels: int64 (...), global ids.
    Returns (nll + z_weight * logsumexp**2, nll); only the first carries a gradient. z-loss: paper, section 4.
    """
    loss, nll = _VocabParallelLoss.apply(logits, labels, vocabulary, z_weight, group)  # type: ignore[misc]
    return loss, nll


def class_sums(nll: Tensor, weight: Tensor, class_id: Tensor, classes: int) -> Tensor:
    """float32 (2, classes): per class the sum of weighted NLL and the sum of weights."""
    sums = torch.zeros(2, classes, dtype=torch.float32, device=nll.device)
    sums[0].index_add_(0, class_id.flatten(), (nll * weight).flatten())
    sums[1].index_add_(0, class_id.flatten(), weight.flatten())
    return sums
