"""AdamW on megatron-core's optimizers, plain or distributed, and two repairs that its checkpoints need."""

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, ParamGroupOverride, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate

from ..config import Recipe


def build_optimizer(recipe: Recipe, model: DistributedDataParallel) -> MegatronOptimizer:
    """AdamW; norms and the input embedding are not decayed (Levanter's default mask, paper code, section 4)."""
    t = recipe.training
    config = OptimizerConfig(
        optimizer="adam",
        lr=t.learning_rate,
        weight_decay=t.weight_decay,
        adam_beta1=t.beta1,
        adam_beta2=t.beta2,
        adam_eps=t.epsilon,
        clip_grad=t.clip_grad,
        bf16=t.precision == "bf16",
        params_dtype=torch.bfloat16 if t.precision == "bf16" else torch.float32,
        use_distributed_optimizer=recipe.parallel.distributed_optimizer,
    )
    undecayed = ParamKey(
        name="*embedding.word_embeddings.weight",
        predicate=ParamPredicate(name="one dimension", fn=lambda parameter: parameter.ndim == 1),
    )
    return get_megatron_optimizer(
        config,
        [model],
        config_overrides={
            undecayed: ParamGroupOverride(wd_mult=0.0)  # pyright: ignore[reportCallIssue]
        },
    )


def set_learning_rate(optimizer: MegatronOptimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def prepare_load(optimizer: MegatronOptimizer) -> None:
    """The distributed optimizer can only describe Adam's state once there is some."""
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            part._init_optimizer_states_with_dummy_values()


def finish_load(optimizer: MegatronOptimizer) -> None:
    """Gives every parameter its own Adam step counter.

    With torch's Adam under the distributed optimizer, megatron-core 0.16.1 loads the counters as one tensor shared by
    all parameters and holding 1: training goes on, silently wrong. The true count is kept in the parameter groups.
    """
    for part in _parts(optimizer):
        if not isinstance(part, DistributedOptimizer):
            continue
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                state = part.optimizer.state.get(parameter)
                if state and "step" in state and "step" in group:
                    state["step"] = torch.tensor(float(group["step"]))


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
