"""AdamW, or Cautious AdamW, on megatron-core's optimizers, plain or distributed, and three repairs these need."""

import importlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import megatron.core.optimizer as megatron_optimizer
import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey, get_megatron_optimizer
from megatron.core.optimizer import distrib_optimizer as megatron_distributed
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from torch import Tensor

from ..config import Recipe
from ..vocab import TokenSpace
from .cautious import CautiousAdamW, Matrices


class Optimizer:
    """`inner` is megatron-core's; `backend` says whose Adam it runs.

    Norms and the input embedding are not decayed (Levanter's default mask, paper code, section 4); nor is a tied head,
    which is the embedding.
    """

    def __init__(self, recipe: Recipe, ddp: list[DistributedDataParallel], space: TokenSpace) -> None:
        o = recipe.optimizer
        self.cautious, self.decay, self.peak = o.name == "cautious", o.weight_decay, o.learning_rate
        self.betas, self.epsilon = (o.beta1, o.beta2), o.epsilon
        self.backend, adam, is_torch = choose_adam(self.cautious)
        # megatron-core takes the first of Transformer Engine, apex and torch that it could import. We have chosen.
        megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER = adam, False  # type: ignore[misc]
        megatron_distributed.HAVE_APEX_OR_TE = not is_torch
        half = recipe.precision.dtype != "fp32"
        config = OptimizerConfig(
            optimizer="adam",
            lr=o.learning_rate,
            weight_decay=o.weight_decay,
            adam_beta1=o.beta1,
            adam_beta2=o.beta2,
            adam_eps=o.epsilon,
            clip_grad=o.clip_grad,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
            use_distributed_optimizer=recipe.parallel.distributed_optimizer,
        )
        exempt = ParamPredicate(name="exempt from decay", fn=lambda p: p.ndim == 1 or getattr(p, "is_embedding", False))
        parameters: Any = (item for chunk in ddp for item in chunk.module.named_parameters())
        for name, parameter in parameters:
            tied = name == "output_layer.weight" and bool(recipe.model.tie_embeddings)
            parameter.is_embedding = name == "embedding.word_embeddings.weight" or tied
        if recipe.parallel.distributed_optimizer:
            keep_padding(ddp)
        self.inner: MegatronOptimizer = get_megatron_optimizer(
            config,
            list(ddp),
            config_overrides={
                ParamKey(predicate=exempt): ParamGroupOverride(wd_mult=0.0)  # pyright: ignore[reportCallIssue]
            },
        )
        if self.cautious:
            (part,) = _parts(self.inner)  # several would each count but a part of a matrix
            part.optimizer.matrices = matrices = Matrices(recipe, ddp, space, _device())
            for piece, parameter, start in _pieces(part):
                matrices.describe(piece, parameter, start)

    def step(self, rate: float) -> float:
        """Clips, then updates. Returns the gradient norm before clipping (nan if megatron-core has none)."""
        # AdamC (arXiv 2506.02285): the decay of a step is rate * (weight_decay * rate / peak).
        decay = self.decay * (rate / self.peak if self.cautious and self.peak else 1.0)
        for group in self.inner.param_groups:
            group["lr"], group["weight_decay"] = rate, decay * group["wd_mult"]
            group["betas"], group["eps"] = self.betas, self.epsilon  # a checkpoint brings those it was made with
        outcome: Any = self.inner.step()
        _, norm, _ = outcome
        return float(norm) if norm is not None else float("nan")

    def state(self) -> Iterator[Tensor]:
        """The tensors of this rank that Adam updates, and those that it keeps for them."""
        for part in _parts(self.inner):
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter
                    yield from (v for v in part.optimizer.state[parameter].values() if isinstance(v, Tensor))


def choose_adam(cautious: bool) -> tuple[str, Callable[..., torch.optim.Optimizer], bool]:
    """(name, class, whether it keeps its state as torch's does): Transformer Engine's, apex's or torch's AdamW, the
    first there is. The cautious one is ours everywhere. Whether apex is NVIDIA's is seen by its module amp_C."""
    if cautious:
        return "Cautious AdamW of megatron_soda", _without_mode(CautiousAdamW), True
    if torch.cuda.is_available():
        for name, module, needed in (
            ("Transformer Engine's FusedAdam", "transformer_engine.pytorch.optimizers", "transformer_engine.pytorch"),
            ("apex's FusedAdam", "apex.optimizers", "amp_C"),
        ):
            try:
                importlib.import_module(needed)
                return name, importlib.import_module(module).FusedAdam, False
            except (ImportError, AttributeError):
                continue
    return "torch's AdamW", _without_mode(partial(torch.optim.AdamW, fused=True)), True


def _without_mode(adam: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, adam_w_mode=True, **kwargs: adam(*args, **kwargs)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _pieces(part: Any) -> Iterable[tuple[Any, Any, int]]:
    """(what Adam updates, the model's parameter it is of, where in it the piece begins): the parameter itself, its
    float32 copy, or a rank's share of either."""
    if isinstance(part, DistributedOptimizer):
        pairs = (
            (part.shard_fp32_from_float16_groups, part.model_float16_groups),
            (part.shard_fp32_groups, part.model_fp32_groups),
        )
    elif hasattr(part, "fp32_from_float16_groups"):
        pairs = (
            (part.fp32_from_float16_groups, part.float16_groups),
            (part.fp32_from_fp32_groups, part.fp32_from_fp32_groups),
        )
    else:
        groups = [group["params"] for group in part.optimizer.param_groups]
        pairs = ((groups, groups),)
    for ours, models in pairs:
        for our_group, model_group in zip(ours, models, strict=True):
            for piece, parameter in zip(our_group, model_group, strict=True):
                shared = isinstance(part, DistributedOptimizer)
                yield piece, parameter, part._get_model_param_range_map(parameter)["param"].start if shared else 0


def keep_padding(ddp: Iterable[DistributedDataParallel]) -> None:
    """For a checkpoint, megatron-core joins the state of a buffer's buckets without the padding after each of them, and
    then takes a parameter's state from where it is with the padding: after the first bucket, silently, from the wrong
    place. So no padding is declared."""
    for chunk in ddp:
        buffers: Any = chunk.buffers  # hides a method of torch's modules
        for buffer in buffers:
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()
            buffer.numel_unpadded = buffer.numel


def prepare_load(optimizer: MegatronOptimizer) -> None:
    """The distributed optimizer can only describe Adam's state once there is some."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._init_optimizer_states_with_dummy_values()


def finish_load(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter its own Adam step counter, and Adam its own settings.

    With torch's Adam under the distributed optimizer, megatron-core loads the counters as one tensor shared by all
    parameters and holding 1: training goes on, silently wrong. The true count is kept in the parameter groups. These
    are those of the Adam that wrote the checkpoint, and Transformer Engine's stops without a setting that torch's has
    not.
    """
    for part in _parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        for group in part.optimizer.param_groups:
            group.update(part.optimizer.defaults)
            if "step" in group:  # Transformer Engine's kernel refuses torch's, which is no int
                group["step"] = int(group["step"])
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter)
                if state and "step" in state and "step" in group:
                    state["step"] = torch.tensor(float(group["step"]), device=state["step"].device)


def _set_main_param_and_optimizer_states(self: Any, model_param: torch.nn.Parameter, tensors: dict) -> None:
    """megatron-core's method without its loop over `step`, which torch's Adam has and the checkpoint has not."""
    if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
        return _original(self, model_param, tensors)
    group, order = self.model_param_group_index_map[model_param]
    main = self.optimizer.param_groups[group]["params"][order]
    with torch.no_grad():
        for name, destination in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":
                destination.copy_(tensors[name])


_original = DistributedOptimizer._set_main_param_and_optimizer_states
DistributedOptimizer._set_main_param_and_optimizer_states = _set_main_param_and_optimizer_states
