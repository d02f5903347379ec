"""One optimizer step through megatron-core's schedules, and the loss sums that come out of it."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ..config import Recipe
from ..data.batch import Batch, Batcher
from ..data.windows import Windows
from ..model.gpt import build_model, forward
from ..model.loss import class_sums, vocab_parallel_loss
from ..model.specs import choose_backend
from ..vocab import TokenSpace
from .optimizer import build_optimizer


@dataclass
class StepResult:
    sums: Tensor  # float64 (2, classes): weighted NLL and weights, over the whole global batch; same on every rank
    grad_norm: float

    @property
    def loss(self) -> float:
        return loss_of(self.sums)


def loss_of(sums: Tensor) -> float:
    """Mean NLL in nats over all weights."""
    return float(sums[0].sum() / sums[1].sum())


def nll_vector(sums: Tensor, names: list[str]) -> dict[str, float]:
    """Mean NLL in nats by class; a class without tokens is left out."""
    return {n: float(s / w) for n, s, w in zip(names, sums[0], sums[1], strict=True) if w > 0}


class Engine:
    """Model, gradients and optimizer of this rank, and how they take a step."""

    def __init__(self, recipe: Recipe, space: TokenSpace, device: torch.device) -> None:
        self.recipe, self.space, self.device = recipe, space, device
        self.backend = choose_backend(recipe.training.backend)
        self.model = build_model(recipe, space, device)
        self.config = self.model.config
        self.ddp = DistributedDataParallel(
            config=self.config,
            ddp_config=DistributedDataParallelConfig(
                use_distributed_optimizer=recipe.parallel.distributed_optimizer, grad_reduce_in_fp32=True
            ),
            module=self.model,
        )
        self.optimizer: MegatronOptimizer = build_optimizer(recipe, self.ddp)
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = self._finalize
        self.batcher = Batcher(space)
        self.schedule: Any = get_forward_backward_func()
        self._weight_sum = torch.zeros((), device=device)
        data_parallel = parallel_state.get_data_parallel_world_size()
        self.micro_batches = recipe.training.global_batch_size // (recipe.training.micro_batch_size * data_parallel)

    def _finalize(self, model: list, _count: Tensor | None, pg_collection: Any = None, **kwargs: Any) -> None:
        """Divides by the global sum of loss weights; megatron-core's own count is an integer."""
        finalize_model_grads(model, self._weight_sum.clone(), pg_collection, **kwargs)

    def micro_batch(self, windows: Windows, first_sample: int, index: int) -> Batch:
        """Micro-batch `index` of this data-parallel rank; the samples of a step are the same at every layout."""
        size = self.recipe.training.micro_batch_size
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        start = first_sample + (index * ranks + rank) * size
        return self.batcher([windows[start + i] for i in range(size)]).to(self.device)

    def _run(self, windows: Windows, first_sample: int, micro_batches: int, forward_only: bool) -> Tensor:
        """The schedule over micro-batches; returns the global loss sums, the same on every rank."""
        classes = len(self.space.class_names)
        batches: Iterator[Batch] = (self.micro_batch(windows, first_sample, i) for i in range(micro_batches))
        self._weight_sum.zero_()
        tensor_group: Any = parallel_state.get_tensor_model_parallel_group()
        data_group: Any = parallel_state.get_data_parallel_group()
        pipeline_group: Any = parallel_state.get_pipeline_model_parallel_group()

        def loss_function(batch: Batch, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            loss, nll = vocab_parallel_loss(
                logits.view(*batch.labels.shape, -1),
                batch.labels,
                self.space.size,
                self.recipe.training.z_loss,
                tensor_group,
            )
            self._weight_sum += batch.loss_weight.sum()
            sums = class_sums(nll, batch.loss_weight, batch.class_id, classes)
            return (loss * batch.loss_weight).sum(), torch.ones((), dtype=torch.int, device=self.device), sums

        def forward_step(iterator: Iterator[Batch], model: torch.nn.Module) -> tuple[Tensor, Any]:
            batch = next(iterator)
            return forward(model, batch, self.backend), partial(loss_function, batch)

        size, length = self.recipe.training.micro_batch_size, self.recipe.data.sequence_length
        packed = self.backend == "transformer_engine"  # then a micro-batch is one sequence
        results = self.schedule(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=self.ddp,
            num_microbatches=micro_batches,
            seq_length=length * size if packed else length,
            micro_batch_size=1 if packed else size,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, classes, dtype=torch.float64, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            sums += torch.stack(results).double().sum(0)
            dist.all_reduce(sums, group=data_group)
        dist.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group)
        return sums

    def train_step(self, windows: Windows, step: int) -> StepResult:
        """Step `step` (0-based) on its samples. The gradient is of sum(weight * loss) / sum(weight), globally."""
        self.ddp.train()
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(windows, step * self.recipe.training.global_batch_size, self.micro_batches, False)
        outcome: Any = self.optimizer.step()
        _, grad_norm, _ = outcome
        return StepResult(sums, float(grad_norm) if grad_norm is not None else math.nan)

    @torch.no_grad()
    def validate(self, windows: Windows, count: int) -> Tensor:
        """Loss sums over the first `count` windows (rounded up to whole micro-batches of all ranks)."""
        self.ddp.eval()
        each = self.recipe.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
        return self._run(windows, 0, -(-count // each), True)
