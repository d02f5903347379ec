"""One optimizer step through megatron-core's schedules, and the loss sums that come out of it."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from ..config import Recipe, choice
from ..data.batch import Batch, Batcher
from ..data.windows import Samples, Window
from ..errors import SodaError
from ..model.gpt import Inputs, build_model, flat, forward, head_weight, inputs_of
from ..model.head import head_loss
from ..model.legal_rows import LegalRows
from ..model.specs import accumulate_in_place
from ..parallel import cpu, ranks
from ..parallel.partition import padded_tokens
from ..parallel.speed import choose_backend
from ..parallel.userbuffers import start_userbuffers
from ..parallel.watch import place
from ..vocab import TokenSpace
from . import graphs
from .optimizer import Optimizer


@contextlib.contextmanager
def beside(stream: Any) -> Iterator[list[Tensor]]:
    """On CUDA, runs the body on a stream of its own: it has to wait for what it computes, and would otherwise also wait
    for the step before. The tensors that the body puts into the list are then the current stream's to use."""
    made: list[Tensor] = []
    if stream is None:
        yield made
        return
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        yield made
    current.wait_stream(stream)
    for tensor in made:
        tensor.record_stream(current)


class Seconds:
    """Where the time of the steps goes. `data` lies inside `forward_backward`, and is not counted there."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, part: str) -> Iterator[None]:
        data = self.spent.get("data", 0.0)
        began = time.perf_counter()
        with place.of(part):
            yield
        if part != "data" and torch.cuda.is_available():
            torch.cuda.synchronize()
        inner = self.spent.get("data", 0.0) - data if part != "data" else 0.0
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - began - inner

    def take(self) -> dict[str, float]:
        """What was spent since the last call."""
        spent, self.spent = self.spent, {}
        return spent


@dataclass
class StepResult:
    sums: Tensor  # float64 (2, classes): weighted NLL and weights, over the whole global batch; same on every rank
    grad_norm: float
    skipped: bool = False  # no label of the batch had a weight: nothing was updated

    @property
    def loss(self) -> float | None:
        return loss_of(self.sums)


def loss_of(sums: Tensor) -> float | None:
    """Mean NLL in nats over all weights; None if they are all 0."""
    total, weight = sums.sum(1).tolist()
    return total / weight if weight else None


def nll_vector(sums: Tensor, names: list[str]) -> dict[str, float]:
    """Mean NLL in nats by class; a class without tokens is left out."""
    return {n: float(s / w) for n, s, w in zip(names, sums[0], sums[1], strict=True) if w > 0}


class Engine:
    """Model, gradients and optimizer of this rank, and how they take a step. `slots`: see LegalRows; default all."""

    def __init__(self, recipe: Recipe, space: TokenSpace, device: torch.device, slots: set[int] | None = None) -> None:
        self.recipe, self.space, self.device = recipe, space, device
        self.backend = choose_backend(recipe.training.backend)
        if recipe.precision.dtype == "fp8" and self.backend != "transformer_engine":
            raise SodaError(
                "precision.dtype=fp8 needs Transformer Engine and a CUDA device of compute capability 8.9 or more; "
                "at least one of them is missing here. precision.dtype=bf16 runs everywhere. See `soda doctor`."
            )
        if recipe.precision.dtype == "fp8" and torch.cuda.get_device_capability(device) < (8, 9):
            raise SodaError(f"precision.dtype=fp8: {torch.cuda.get_device_name(device)} has no FP8; take bf16")
        self.speed = ranks.speed(recipe)
        if self.speed.overlap_tensor:
            start_userbuffers(recipe)
        virtual = recipe.parallel.virtual_pipeline
        chunks = list(range(virtual)) if virtual > 1 else [None]
        self.models = [build_model(recipe, space, device, chunk) for chunk in chunks]
        self.config, self.rows = self.models[0].config, self.models[0].rows
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=self.speed.overlap_gradients,
            overlap_param_gather=self.speed.overlap_parameters,
        )
        self.ddp = [
            DistributedDataParallel(self.config, ddp_config, model, disable_bucketing=i > 0)
            for i, model in enumerate(self.models)
        ]
        if self.speed.fuse_gradients:
            for model in self.models:
                accumulate_in_place(model)
        self.optimizer = Optimizer(recipe, self.ddp, space)
        for model in self.models:
            model.config.grad_scale_func = self.optimizer.inner.scale_loss
            model.config.finalize_model_grads_func = self._finalize
            if self.speed.overlap_gradients:
                model.config.no_sync_func = self.ddp[0].no_sync
        self.batcher = Batcher(space, class_weights(recipe, space), recipe.data.reset_positions, device)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Samples, int, Inputs] | None = None  # samples, the first of a step, its first micro-batch
        self.legal_rows = self._legal_rows(slots or {space.codebooks})
        self._tokens = 0  # at least, of a micro-batch of packed documents
        self.head_work = [0, 0]  # rows of the head that positions needed, positions
        self.schedule: Any = get_forward_backward_func()
        self._weight_sum = torch.zeros((), dtype=torch.float64, device=device)
        data_parallel = parallel_state.get_data_parallel_world_size()
        self.micro_batches = recipe.training.global_batch_size // (recipe.training.micro_batch_size * data_parallel)
        self.seconds = Seconds()
        self._captured = not self.speed.cuda_graphs
        cpu.return_freed_memory()

    @property
    def head_rows(self) -> int | None:
        """Rows of the head at a position so far, the mean; None: all."""
        return round(self.head_work[0] / self.head_work[1]) if self.head_work[1] else None

    def _legal_rows(self, slots: set[int]) -> LegalRows | None:
        if self.recipe.training.head_rows == "all":
            return None
        share, rank = self.recipe.training.head_other_share, parallel_state.get_tensor_model_parallel_rank()
        return LegalRows(self.rows, slots, rank, self.device, round(1 / share) if share else 0)

    def _finalize(self, model: list, _count: Tensor | None, pg_collection: Any = None, **kwargs: Any) -> None:
        """Divides by the global sum of loss weights; megatron-core's own count is an integer."""
        finalize_model_grads(model, self._weight_sum.clone(), pg_collection, **kwargs)

    def micro_batch(self, samples: Samples, first_sample: int, index: int) -> Inputs:
        """This rank's part of micro-batch `index`; the samples of a step are the same at every layout."""
        with self.seconds.of("data"), beside(self.stream) as made:
            batch = self._batch(samples, first_sample, index)
            inputs = inputs_of(self.models[0], batch, self.legal_rows, self.models[0].training, self._tokens)
            made += inputs.tensors()
            for piece in inputs.pieces or ():
                count = piece.index.numel() if piece.index is not None else 0
                self.head_work[0] += count * piece.width * self.rows.ranks
                self.head_work[1] += count
        return inputs

    def _batch(self, samples: Samples, first_sample: int, index: int) -> Batch:
        size = self.recipe.training.micro_batch_size
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        start = first_sample + (index * ranks + rank) * size
        return self.batcher([samples[start + i] for i in range(size)])

    def _common_tokens(self, samples: Samples, first_sample: int, count: int) -> int:
        """Pipeline stages expect hidden states of one size, so the micro-batches of a step are padded to the longest;
        0: they have one size anyway, or need none."""
        p, unit = self.recipe.parallel, self.models[0].token_unit
        if not self.models[0].packed or p.context == 1 or p.pipeline == 1:
            return 0
        with self.seconds.of("data"):
            batches = (self._batch(samples, first_sample, index) for index in range(count))
            return max(padded_tokens(batch.cu_seqlens, p.context, unit) for batch in batches)

    def _micro_batches(self, samples: Samples, first_sample: int, count: int) -> Iterator[Inputs]:
        for index in range(count):
            ahead = self._ahead
            if index == 0 and ahead is not None and ahead[0] is samples and ahead[1] == first_sample:
                self._ahead = None
                yield ahead[2]
            else:
                yield self.micro_batch(samples, first_sample, index)

    def _build_ahead(self, samples: Samples, first_sample: int) -> None:
        """Builds the first micro-batch of the next step while the device is at this one: else it would wait for it, as
        the host waits for the device at the end of every step. Only where inputs are small: a mask is not."""
        if self.stream is None or not self.models[0].packed or self._tokens:
            return
        with contextlib.suppress(SodaError):  # which the next step raises
            self._ahead = samples, first_sample, self.micro_batch(samples, first_sample, 0)

    def _loss(self, model: Any, inputs: Inputs, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The head on the last stage's hidden states: loss, a count that nobody uses, the sums by class."""
        batch = inputs.batch
        group: Any = parallel_state.get_tensor_model_parallel_group()
        if self.config.sequence_parallel:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, True, group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group)
        weight: Any = head_weight(model)
        if self.speed.overlap_parameters:
            # megatron-core waits for parameters before a module's forward pass; the head has none.
            self.ddp[0].param_to_bucket_group[weight].finish_param_sync()
        labels, weights, classes = (flat(self.models[0], x) for x in (batch.labels, batch.loss_weight, batch.class_id))
        loss, sums = head_loss(
            hidden.view(-1, hidden.shape[-1]),
            weight.detach(),
            labels,
            weights,
            classes,
            classes=len(self.space.class_names),
            rows=self.rows.count(parallel_state.get_tensor_model_parallel_rank()),
            z_weight=self.recipe.training.z_loss,
            group=group,
            weight_gradient=weight.main_grad if torch.is_grad_enabled() else None,
            pieces=inputs.pieces,
        )
        self._weight_sum += sums[1].sum()
        if self.speed.overlap_gradients and torch.is_grad_enabled() and not self.recipe.model.tie_embeddings:
            # Autograd, which tells of all other gradients, does not know of this one. megatron-core minds only the last
            # micro-batch.
            self.ddp[0].param_to_bucket_group[weight].register_grad_ready(weight)
        return loss, torch.ones((), dtype=torch.int, device=self.device), sums

    def _run(self, samples: Samples, first_sample: int, micro_batches: int, forward_only: bool) -> Tensor:
        """The schedule over micro-batches; returns the global loss sums, the same on every rank."""
        self._weight_sum.zero_()
        self._tokens = self._common_tokens(samples, first_sample, micro_batches)

        def batches() -> Iterator[Inputs]:
            return self._micro_batches(samples, first_sample, micro_batches)

        def forward_step(iterator: Iterator[Inputs], model: torch.nn.Module) -> tuple[Tensor, Any]:
            inputs = next(iterator)
            return forward(model, inputs), partial(self._loss, model, replace(inputs, mask=None))

        size, length = self.recipe.training.micro_batch_size, self.recipe.data.sequence_length
        packed = self.models[0].packed  # then a micro-batch is one sequence
        single = len(self.ddp) == 1
        results = self.schedule(
            forward_step_func=forward_step,
            data_iterator=batches() if single else [batches() for _ in self.ddp],
            model=self.ddp[0] if single else self.ddp,
            num_microbatches=micro_batches,
            seq_length=(self._tokens or length * size) if packed else length,
            micro_batch_size=1 if packed else size,
            forward_only=forward_only,
        )
        sums = torch.zeros(2, len(self.space.class_names), dtype=torch.float64, device=self.device)
        if parallel_state.is_pipeline_last_stage():
            sums += torch.stack(results).sum(0)
            dist.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        pipeline_group: Any = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(sums, parallel_state.get_pipeline_model_parallel_last_rank(), group=pipeline_group)
        return sums

    def train_step(self, samples: Samples, first_sample: int, rate: float) -> StepResult:
        """One step on the samples from `first_sample` on, at a learning rate.

        The gradient is that of sum(weight * loss) / sum(weight), over the global batch. Where all weights are 0 there
        is none, and parameters and Adam's state stay as they are.
        """
        with self.seconds.of("forward_backward"):
            if not self._captured:  # not earlier: a checkpoint may have been loaded since
                graphs.capture(self.recipe, self.ddp, self.optimizer.inner)
                self._captured = True
            for ddp in self.ddp:
                ddp.train()
                ddp.zero_grad_buffer()
            self.optimizer.inner.zero_grad()
            sums = self._run(samples, first_sample, self.micro_batches, False)
            self._build_ahead(samples, first_sample + self.recipe.training.global_batch_size)
        if not sums[1].any():
            return StepResult(sums, 0.0, skipped=True)
        with self.seconds.of("optimizer"):
            grad_norm = self.optimizer.step(rate)
        return StepResult(sums, grad_norm)

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Whether all parameters and all of Adam's state are, on every rank. Each is read once, and nothing copied."""
        self._gather_parameters()
        ends = [end.to(self.device, torch.float32) for tensor in self._state() for end in torch.aminmax(tensor)]
        finite = torch.isfinite(torch.stack(ends)).all().float()  # the ends pass NaN on
        dist.all_reduce(finite, dist.ReduceOp.MIN)
        return bool(finite.item())

    def _gather_parameters(self) -> None:
        """After a step that leaves it to the next forward pass, a rank has only its own share of the new ones."""
        for ddp in self.ddp if self.speed.overlap_parameters else []:
            for group in ddp.bucket_groups:
                if not group.param_gather_dispatched:
                    group.start_param_sync(force_sync=True)

    def _state(self) -> Iterator[Tensor]:
        for tensor in (*(p for model in self.models for p in model.parameters()), *self.optimizer.state()):
            if tensor.is_floating_point() and tensor.numel():
                yield tensor

    @torch.no_grad()
    def validate(self, windows: Samples, count: int) -> Tensor:
        """Loss sums over the first `count` windows: the same at every layout."""
        for ddp in self.ddp:
            ddp.eval()
        each = self.recipe.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
        if self.recipe.parallel.virtual_pipeline > 1:
            each *= self.recipe.parallel.pipeline
        micro_batches = -(-count // each) * (each // self._samples_of_a_micro_batch())
        return self._run(_First(windows, count), 0, micro_batches, True)

    def _samples_of_a_micro_batch(self) -> int:
        return self.recipe.training.micro_batch_size * parallel_state.get_data_parallel_world_size()


class _First:
    """The first `count` samples; what fills up the last micro-batches after them weighs nothing."""

    def __init__(self, windows: Samples, count: int) -> None:
        self.windows, self.count = windows, count

    def __getitem__(self, sample: int) -> Window:
        window = self.windows[sample]
        return window if sample < self.count else Window(window.ids, 0)


def class_weights(recipe: Recipe, space: TokenSpace) -> list[float]:
    """`training.loss_weights` in the order of the token classes; SodaError for a class that does not exist."""
    for name in recipe.training.loss_weights:
        choice("training.loss_weights", name, tuple(space.class_names))
    weights = [recipe.training.loss_weights.get(name, 1.0) for name in space.class_names]
    if not any(weights):
        raise SodaError("training.loss_weights: every class of tokens has the weight 0; there is nothing to learn")
    return weights
