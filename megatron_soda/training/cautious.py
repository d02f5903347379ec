"""Cautious AdamW (arXiv 2411.16085) as in Levanter, the optimizer of the paper's code.

An element's update is dropped if it would go against the gradient, and the rest of the matrix's update is divided by
the share of elements that remain. megatron-core keeps Q, K and V in one tensor, gate and up in another, and splits
tensors over tensor-parallel ranks and the distributed optimizer's ranks. The shares are computed for the model's own
matrices nevertheless, so the layout changes nothing. Levanter stacks all layers, so a matrix there is, say, the Q of
every layer: `optimizer.cautious_mask=stacked`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from ..config import Model, Recipe
from ..model.gpt import global_name
from ..vocab import TokenSpace


class CautiousAdamW(torch.optim.AdamW):
    """Every parameter needs an attribute `runs`, from Matrices.describe; the optimizer itself needs `matrices`."""

    matrices: "Matrices"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise NotImplementedError("a closure makes no sense here")
        left = torch.zeros_like(self.matrices.sizes)
        for group, p in self._with_gradient():
            state = self.state[p]
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32)
            if "exp_avg" not in state:
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            beta1, beta2 = group["betas"]
            state["step"] += 1
            state["exp_avg"].lerp_(p.grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            if p.is_counted:
                for of_run, matrix in rows(state["exp_avg"] * p.grad > 0, p.runs):
                    left.index_add_(0, matrix, of_run.sum(1))
        for process_group in self.matrices.groups:
            dist.all_reduce(left, group=process_group)
        share = left / self.matrices.sizes
        for group, p in self._with_gradient():
            state = self.state[p]
            beta1, beta2 = group["betas"]
            step = state["step"].item()
            scale = (1 / ((share + group["eps"]) * (1 - beta1**step))).to(p.dtype)
            update = (state["exp_avg"] * p.grad > 0).to(p.dtype)
            for of_run, matrix in rows(update, p.runs):
                of_run.mul_(scale[matrix, None])
            root = (state["exp_avg_sq"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.sub_(update.mul_(state["exp_avg"]).div_(root), alpha=group["lr"])

    def _with_gradient(self) -> Iterable[tuple[dict, Any]]:
        return ((group, p) for group in self.param_groups for p in group["params"] if p.grad is not None)


Run = tuple[slice, Tensor]  # for a flat piece: rows of one length, and the matrix of each row


def rows(piece: Tensor, runs: list[Run]) -> Iterable[tuple[Tensor, Tensor]]:
    """For each run, a view of the piece as (rows, length), and the matrix of each row."""
    flat = piece.view(-1)
    return ((flat[run].view(len(matrix), -1), matrix) for run, matrix in runs)


def runs_of(matrix: Tensor, length: int, start: int, stop: int) -> list[Run]:
    """The runs in elements [start, stop) of a tensor whose rows have `length` elements and belong to `matrix`: the end
    of a row, whole rows, and the beginning of a row, where they exist."""
    first = min(-(-start // length) * length, stop)
    last = max(stop // length * length, first)
    edges = [(a, b) for a, b in ((start, first), (first, last), (last, stop)) if a < b]
    return [(slice(a - start, b - start), matrix[a // length : -(-b // length)]) for a, b in edges]


class Matrices:
    """The model's matrices, and the matrix of each element that this rank updates.

    sizes: int64, by matrix, without vocabulary padding, which has no gradient. groups: the process groups over which a
    matrix may be split.
    """

    def __init__(self, recipe: Recipe, ddp: list[DistributedDataParallel], space: TokenSpace, device: Any) -> None:
        rank, ranks = parallel_state.get_tensor_model_parallel_rank(), recipe.parallel.tensor
        stacked = recipe.optimizer.cautious_mask == "stacked"
        elements: dict[str, int] = {}  # for this stage's matrices
        found = []
        for chunk in ddp:
            parameters: Any = chunk.module.named_parameters()
            for name, parameter in parameters:
                name = global_name(chunk.module, name)
                cut = bool(getattr(parameter, "tensor_model_parallel", False))
                whole = parameter.numel() * (ranks if cut else 1)
                if name.startswith(("embedding.", "output_layer.")):
                    whole = space.size * parameter.shape[1]
                if stacked:
                    name = re.sub(r"\.layers\.\d+\.", ".layers.", name)
                kinds, row = split(name, parameter, recipe.model)
                for kind, count in zip(kinds, row.bincount().tolist(), strict=True):
                    elements[kind] = elements.get(kind, 0) + whole // len(row) * count
                found.append((parameter, kinds, row, cut or rank == 0))
        stages = [elements]
        self.groups: list[Any] = [parallel_state.get_tensor_model_parallel_group()] if ranks > 1 else []
        if recipe.parallel.distributed_optimizer:
            self.groups.append(parallel_state.get_data_parallel_group(with_context_parallel=True))
        if stacked and recipe.parallel.pipeline > 1:
            # A tied embedding is in the first and in the last stage, so it is counted twice on both sides.
            self.groups.append(parallel_state.get_pipeline_model_parallel_group())
            stages = [{}] * recipe.parallel.pipeline
            dist.all_gather_object(stages, elements, group=self.groups[-1])
        number = {name: i for i, name in enumerate(sorted({name for stage in stages for name in stage}))}
        sizes = [sum(stage.get(name, 0) for stage in stages) for name in number]
        self.sizes = torch.tensor(sizes, dtype=torch.int64, device=device)
        self.of = {  # for a parameter: the matrix of each row, and whether this rank's part is counted
            parameter: (torch.tensor([number[kind] for kind in kinds])[row].to(device), counted)
            for parameter, kinds, row, counted in found
        }

    def describe(self, piece: Any, parameter: Any, start: int) -> None:
        """Tells a piece that Adam updates, the elements of a model parameter from `start` on, which matrices it belongs
        to."""
        matrix, piece.is_counted = self.of[parameter]
        piece.runs = runs_of(matrix, parameter.numel() // len(matrix), start, start + piece.numel())


def split(name: str, parameter: Tensor, m: Model) -> tuple[list[str], Tensor]:
    """The matrices in a tensor, by name, and the matrix of each row (a single row if there is only one matrix)."""
    if name.endswith("linear_qkv.weight"):  # by query group: the rows of its queries, key and value
        lengths = torch.tensor([m.num_attention_heads // m.num_query_groups, 1, 1]) * m.head_dim
        group = torch.arange(3).repeat_interleave(lengths)
        return [f"{name}/{part}" for part in "qkv"], group.repeat(len(parameter) // len(group))
    if name.endswith("linear_fc1.weight"):
        return [f"{name}/gate", f"{name}/up"], torch.arange(2).repeat_interleave(len(parameter) // 2)
    return [name], torch.zeros(1, dtype=torch.int64)
