"""Which modules a layer is made of: Transformer Engine's on CUDA, megatron-core's local ones elsewhere."""

import importlib.util
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from ..errors import SodaError


def choose_backend(wanted: str) -> str:
    """`training.backend` -> "transformer_engine" or "local". Raises SodaError if the wanted one cannot be had."""
    installed = importlib.util.find_spec("transformer_engine") is not None
    if wanted == "auto":
        return "transformer_engine" if installed and torch.cuda.is_available() else "local"
    if wanted == "transformer_engine" and not (installed and torch.cuda.is_available()):
        raise SodaError(
            "training.backend=transformer_engine needs a CUDA device and the package transformer-engine; "
            "training.backend=local runs without. `soda doctor` shows what is there."
        )
    return wanted


def layer_spec(backend: str) -> ModuleSpec:
    if backend == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    spec: Any = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = MaskedAttention
    return spec


class MaskedAttention(MegatronModule):
    """torch's scaled_dot_product_attention under a given mask, in the place of megatron-core's DotProductAttention.

    `attention_mask` is bool (batch, 1, length, length), True where a query may look: `block_mask` below.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **_: Any) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        """(length, batch, heads, head_dim) each -> (length, batch, heads * head_dim)."""
        length, batch = query.shape[:2]
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return context.permute(2, 0, 1, 3).reshape(length, batch, -1)


def block_mask(segment_id: Tensor) -> Tensor:
    """Segments (batch, length) -> bool (batch, 1, length, length): causal, and only inside one's own document."""
    length = segment_id.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segment_id.device).tril()
    return ((segment_id[:, :, None] == segment_id[:, None, :]) & causal)[:, None]
