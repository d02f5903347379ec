"""The LM head and its loss in one: linear, cross-entropy, z-loss, and sums by token class, over a split vocabulary.

With 144,644 ids the head is the cost: all logits of a sequence are 2.4 GB, and 46 % of the FLOPs at 135M. So it works
on a few rows at a time, and takes the gradient at once, in the forward pass: logits become probabilities, those the
gradient, and the gradient goes into the hidden states' and the weight's, all before the next rows.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .legal_rows import Piece

CHUNK_BYTES = {"cpu": 150 << 20, "cuda": 1 << 30}  # of scores that are there at a time
FEWEST_ROWS = 16
IN_CACHE = 4 * 144_644  # scores, 2 MB
ALIGNED = 64  # columns that tensor cores like


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        loss_weight: Tensor,
        class_id: Tensor,
        classes: int,
        rows: int,
        z_weight: float,
        group: dist.ProcessGroup | None,
        weight_gradient: Tensor | None,
        pieces: list[Piece] | None,
    ) -> tuple[Tensor, Tensor]:
        rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        start, local = rank * weight.shape[0], weight.shape[0]
        scores_of = _scores_class(hidden)
        itemsize = 4 if hidden.device.type == "cpu" else hidden.element_size()
        room = CHUNK_BYTES.get(hidden.device.type, 150 << 20) // itemsize
        wanted = weight_gradient is not None or ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        hidden_gradient = torch.zeros_like(hidden) if wanted else None
        if wanted and weight_gradient is None:
            summed = torch.zeros(local, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
        else:
            summed = weight_gradient
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        sums = torch.zeros(2, classes, dtype=torch.float64, device=hidden.device)
        buffer = hidden.new_empty(0)
        for piece, part in _chunks([Piece(None, local, 0, rows)] if pieces is None else pieces, len(hidden), room):
            of_label, own = loss_weight[part], piece.high - piece.low
            index = labels[part] - (start + piece.low)
            index = torch.where((index >= 0) & (index < own), index, -1)
            width = min(-(-own // ALIGNED) * ALIGNED, local - piece.low) if scores_of.padded else own
            if buffer.numel() < len(index) * width:
                buffer = hidden.new_empty(len(index) * width)
            legal = _Block(hidden[part], weight, slice(piece.low, piece.low + width))
            legal.compute(scores_of, own, index, buffer, piece.illegal)
            blocks = [(legal, 1.0)]
            highest, total, score = legal.over_ranks(group if ranks > 1 else None)
            log_total = highest + total.log()
            nll = log_total - score
            sums[0].index_add_(0, class_id[part], (nll * of_label).double())
            sums[1].index_add_(0, class_id[part], of_label.double())
            if piece.others is not None:
                others = _Block(hidden[part], weight, piece.others)
                others.compute(scores_of, len(piece.others), torch.full_like(index, -1))
                blocks.append((others, piece.one_in))
                mine, (of_others, total_others, _) = highest, others.over_ranks(group if ranks > 1 else None)
                highest = torch.maximum(mine, of_others)
                total = total * (mine - highest).exp() + piece.one_in * total_others * (of_others - highest).exp()
                log_total = highest + total.log()
                nll = log_total - score
            loss += ((nll + z_weight * log_total.square()) * of_label).sum()
            if hidden_gradient is None or summed is None:
                continue
            factor = of_label * (1 + 2 * z_weight * log_total) / total
            for block, times in blocks:
                block.add_gradient(hidden_gradient, part, summed, highest, times * factor, of_label)
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is not None else summed)
        ctx.mark_non_differentiable(sums)
        return loss.float(), sums

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, weight_gradient = ctx.saved_tensors
        incoming = gradients[0]
        if weight_gradient is None and incoming.device.type == "cpu" and incoming.item() != 1:
            raise RuntimeError(f"the head's gradient is in main_grad already; it cannot be scaled by {incoming.item()}")
        scaled = [None if g is None else g * incoming.to(g.dtype) for g in (hidden_gradient, weight_gradient)]
        return *scaled, *[None] * 9


def _chunks(pieces: list[Piece], positions: int, room: int) -> Iterator[tuple[Piece, slice | Tensor]]:
    """Parts of every piece whose scores fit `room` elements, and which positions they are."""
    for piece in pieces:
        rows = max(FEWEST_ROWS, room // piece.width)
        rows = rows // 128 * 128 or rows  # whole tiles of a matrix product
        count = positions if piece.index is None else len(piece.index)
        for at in range(0, count, rows):
            yield piece, slice(at, at + rows) if piece.index is None else piece.index[at : at + rows]


class _Block:
    """Some positions by some rows of this rank's weight. rows: a range, or the numbers of rows that lie apart."""

    def __init__(self, hidden: Tensor, weight: Tensor, rows: slice | Tensor) -> None:
        self.hidden, self.rows, self.weight = hidden, rows, weight[rows]
        self.scores: _TorchScores | _TritonScores | None = None  # None: other ranks have all the rows

    def compute(
        self,
        scores_of: "type[_TorchScores | _TritonScores]",
        columns: int,
        index: Tensor,
        buffer: Tensor | None = None,
        illegal: Tensor | None = None,
    ) -> None:
        if not columns:
            return
        shape = len(self.hidden), len(self.weight)
        products = self.hidden.new_empty(shape) if buffer is None else buffer[: shape[0] * shape[1]].view(shape)
        torch.mm(self.hidden, self.weight.t(), out=products)
        if illegal is not None:
            products.index_fill_(1, illegal, -torch.inf)
        self.scores = scores_of(products, columns, index)

    def over_ranks(self, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        """Of the rows of all ranks, float32 (positions,): the highest score, the sum of exp(score - highest), and the
        score of the label (0 if no rank has it)."""
        if self.scores is not None:
            mine, total, score = self.scores.highest, self.scores.total, self.scores.of_label
        else:
            score, total = torch.zeros(2, len(self.hidden), device=self.hidden.device)
            mine = torch.full_like(score, -torch.inf)
        if group is None:
            return mine, total, score
        highest = mine.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        highest.clamp_(min=torch.finfo(highest.dtype).min)  # where no rank has a row: -inf - -inf would be NaN
        both = torch.stack([total * (mine - highest).exp(), score])  # total is relative to this rank's highest
        dist.all_reduce(both, group=group)
        return highest, both[0], both[1]

    def add_gradient(
        self, of_hidden: Tensor, part: slice | Tensor, of_weight: Tensor, highest: Tensor, factor: Tensor, label: Tensor
    ) -> None:
        """factor * exp(score - highest), less `label` at the label, into the gradients of both."""
        if self.scores is None:
            return
        gradient = self.scores.gradient(highest, factor, label)
        if isinstance(part, slice):
            of_hidden[part].addmm_(gradient, self.weight)
        else:
            of_hidden[part] += gradient @ self.weight
        if isinstance(self.rows, slice):
            _add_product(of_weight[self.rows], gradient.t(), self.hidden)
        else:
            of_weight.index_add_(0, self.rows, (gradient.t() @ self.hidden).to(of_weight.dtype))


class _TorchScores:
    """The softmax of some rows. scores (rows, columns) are overwritten; index int64 (rows,) is the column of the label,
    -1 if another rank has it. All results are float32 (rows,); `total` is relative to `highest`."""

    padded = False

    def __init__(self, scores: Tensor, columns: int, index: Tensor) -> None:
        self.dtype, self.scores = scores.dtype, scores.float()  # the same memory if it is float32
        self.mine, self.column = index >= 0, index.clamp(min=0)[:, None]
        self.of_label = torch.where(self.mine, self.scores.gather(1, self.column)[:, 0], 0.0)
        self.highest, self.total = torch.empty(2, len(scores), device=scores.device)
        rows = max(1, IN_CACHE // columns) if scores.device.type == "cpu" else len(scores)
        for at in range(0, len(scores), rows):  # scores become exp(score - highest)
            some, part = self.scores[at : at + rows], slice(at, at + rows)
            torch.amax(some, 1, out=self.highest[part])
            torch.sum(some.sub_(self.highest[part, None]).exp_(), 1, out=self.total[part])

    def gradient(self, highest: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        """factor * exp(score - highest), less `weight` at the label: (rows, columns) in the dtype of the scores."""
        self.scores.mul_((factor * (self.highest - highest).exp())[:, None])
        self.scores.scatter_add_(1, self.column, torch.where(self.mine, -weight, 0.0)[:, None])
        return self.scores.to(self.dtype)


class _TritonScores:
    """The same through kernels.py. Columns from `columns` on are padding, which keeps the rows aligned as matrix
    products on tensor cores want them: 144,644 columns took several times as long as 144,768."""

    padded = True

    def __init__(self, scores: Tensor, columns: int, index: Tensor) -> None:
        from . import kernels

        self.kernels, self.scores, self.columns, self.index = kernels, scores, columns, index
        self.highest, self.total, self.of_label = kernels.statistics(scores, columns, index)

    def gradient(self, highest: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        self.kernels.gradient_(self.scores, self.columns, self.index, highest, factor, weight)
        return self.scores


def _scores_class(hidden: Tensor) -> type[_TorchScores] | type[_TritonScores]:
    return _TritonScores if hidden.is_cuda and find_spec("triton") else _TorchScores


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be float32 and a, b bfloat16."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)  # pyright: ignore[reportCallIssue]
    else:
        for part, some in zip(total.split(16384), a.split(16384), strict=True):  # a product as large as total is memory
            part.add_(some @ b)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    loss_weight: Tensor,
    class_id: Tensor,
    *,
    classes: int,
    rows: int,
    z_weight: float = 0.0,
    group: dist.ProcessGroup | None = None,
    weight_gradient: Tensor | None = None,
    pieces: list[Piece] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sum of weighted losses of the tokens, and the sums that are logged; all logits are never there together.

    hidden: (tokens, hidden_size), the same on every rank of `group`. weight: (local, hidden_size), rank r holding the
    rows [r * local, (r + 1) * local); those from `rows` on, on each rank, are padding and take no probability.
    labels, class_id: int64 (tokens,), labels are numbers of rows. loss_weight: float32 (tokens,).
    Returns a float32 scalar, sum(loss_weight * (nll + z_weight * logsumexp**2)), nats, and float64 (2, classes): by
    class the sums of loss_weight * nll and of loss_weight. z-loss: paper, section 4.

    The gradient of hidden is that of this rank's rows alone: the caller sums it over the group (megatron-core's
    copy_to_tensor_model_parallel_region or gather_from_sequence_parallel_region do).
    `pieces`: the softmax of a position is over the rows that LegalRows found for it; None: over all, everywhere.
    `weight_gradient` (megatron-core's main_grad, shape of weight): the weight's gradient is added to it right away and
    autograd sees none. Then the loss must be differentiated with a gradient of 1, or RuntimeError (on CPU) is raised.
    """
    return _Head.apply(  # type: ignore[no-any-return]
        hidden, weight, labels, loss_weight, class_id, classes, rows, z_weight, group, weight_gradient, pieces
    )
