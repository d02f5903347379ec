"""CUDA graphs of the layers' feed-forward parts (`training.cuda_graphs`), by megatron-core and Transformer Engine.

Attention is left out: documents begin elsewhere in every batch, so their offsets differ in number, and how long the
longest one is decides on kernels. The feed-forward part has the same shapes in every micro-batch.
"""

from typing import Any

from megatron.core import num_microbatches_calculator as calculator
from megatron.core import parallel_state
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper

from ..config import Recipe


def capture(recipe: Recipe, ddp: list[Any], optimizer: Any) -> None:
    """From now on forward and backward passes replay what is captured here; validation does not."""
    t, length = recipe.training, recipe.data.sequence_length
    (model,) = ddp
    replicas = parallel_state.get_data_parallel_world_size()
    calculator.unset_num_microbatches_calculator()  # megatron-core asks it how many steps were before
    calculator.init_num_microbatches_calculator(0, None, t.global_batch_size, t.micro_batch_size, replicas)
    helper = TECudaGraphHelper(
        model=ddp,
        config=model.config,
        seq_length=length * t.micro_batch_size,  # a micro-batch is one packed sequence
        micro_batch_size=1,
        optimizers=[optimizer],
    )
    waits = model.ddp_config.overlap_param_gather
    if waits:  # a graph has no hooks: they are called before it is replayed
        model.disable_forward_pre_hook(param_sync=False)
    model.train()
    helper.create_cudagraphs()
    if waits:
        model.enable_forward_pre_hook()
        helper.cuda_graph_set_manual_hooks()
