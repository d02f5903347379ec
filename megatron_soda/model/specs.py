"""Which modules a layer is made of: Transformer Engine's on CUDA, megatron-core's local ones elsewhere."""

import importlib.util
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from ..parallel.megatron import mlp_submodules
from . import fused


def layer_spec(backend: str, config: TransformerConfig, chunk: int | None = None) -> Any:
    """What megatron-core's GPTModel is to build. `chunk`: of this pipeline stage, if it has several."""
    if backend == "transformer_engine":
        spec: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
        mlp_submodules(spec).activation_func = SwiGLU  # if use_te_activation_func
        attention = spec.submodules.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
        return spec
    layer: Any = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    mlp_submodules(layer).activation_func = SwiGLU
    attention = layer.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = MaskedAttention
    layers: list[ModuleSpec] = [layer] * get_num_layers_to_build(config, chunk)
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def accumulate_in_place(model: torch.nn.Module) -> None:
    """Transformer Engine's products add a weight's gradient to its main_grad themselves. Only with megatron-core's
    DistributedDataParallel around the model, which makes main_grad. The setting for it in megatron-core's config would
    ask apex's kernel of the layers that are not Transformer Engine's."""
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            setattr(module, "fuse_wgrad_accumulation", True)  # noqa: B010  not an attribute of every module


class SwiGLU(MegatronModule):
    """As one function. Transformer Engine's own goes through its fuser of operations, which takes longer on the host
    than the kernel does on the device; so do its RMSNorms, and attention's norms are torch's fused ones."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config=config)

    def forward(self, both: Tensor) -> Tensor:
        """(..., 2 * ffn_hidden_size), the gate first -> (..., ffn_hidden_size)."""
        if both.is_cuda and importlib.util.find_spec("triton"):
            from .kernels import swiglu

            return swiglu(both)
        return fused.swiglu(both)


class RMSNorm(torch.nn.RMSNorm):
    """torch's, marked for sequence parallelism: there each rank sees a part of the tokens, and the gradients of the
    weight must be summed. megatron-core's own wrapper of torch's norms refuses sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class MaskedAttention(MegatronModule):
    """torch's scaled_dot_product_attention under a given mask, in the place of megatron-core's DotProductAttention.

    `attention_mask` is bool (batch, 1, queries, keys), True where a query may look: `parallel/context.py` makes it.
    Context-parallel ranks hold queries of their own and gather everyone's keys and values.
    """

    def __init__(self, config: TransformerConfig, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.context_parallel = config.context_parallel_size > 1

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """(length, batch, heads, head_dim) each -> (length, batch, heads * head_dim)."""
        length, batch = query.shape[:2]
        if self.context_parallel:  # backward sums the gradients of a key over the ranks whose queries saw it
            group = parallel_state.get_context_parallel_group()
            key, value = (tensor_parallel.gather_from_sequence_parallel_region(x, True, group) for x in (key, value))
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        grouped = q.shape[1] != k.shape[1]
        if grouped and q.is_cuda:  # torch's memory-efficient kernel takes a mask, but no groups
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            grouped = False
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, scale=self.softmax_scale, enable_gqa=grouped
        )
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)
