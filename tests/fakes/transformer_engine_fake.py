"""A Transformer Engine 2.20 of plain torch, as far as megatron-core asks for it, to run on a CPU.

`install()` puts it into sys.modules, before megatron is imported and in a process of its own. It has the names, the
signatures, the parameters, the extra state and the refusals of the real one, so what it accepts the real one should.
Products are in the given precision: an FP8 context is only noted. What megatron-core imports inside a `try`, and a
dense decoder does not use, is left out.
"""

import os
import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import Enum
from importlib.machinery import ModuleSpec
from itertools import pairwise
from math import prod
from types import ModuleType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor
from torch.nn import functional

from tests.fakes import te_speed_fake

VERSION = "2.20.2"


# --- transformer_engine.common.recipe


class Format(Enum):
    E4M3 = (448, 448)
    E5M2 = (57344, 57344)
    HYBRID = (448, 57344)


class Recipe:
    """Keywords that are no fields are dropped, as by pydantic's dataclasses: megatron-core passes some."""

    fields: ClassVar[dict[str, Any]] = {}

    def __init__(self, **settings: Any) -> None:
        for name, default in self.fields.items():
            setattr(self, name, settings.get(name, default))


class DelayedScaling(Recipe):
    fields: ClassVar = {
        "margin": 0,
        "fp8_format": Format.HYBRID,
        "amax_history_len": 1024,
        "amax_compute_algo": "max",
        "scaling_factor_compute_algo": None,
        "reduce_amax": True,
        "fp8_dpa": False,
        "fp8_mha": False,
    }


class Float8CurrentScaling(Recipe):
    fields: ClassVar = {"fp8_format": Format.HYBRID, "fp8_dpa": False, "fp8_mha": False}


class Float8BlockScaling(Recipe):
    fields: ClassVar = {"fp8_format": Format.E4M3, "fp8_dpa": False, "fp8_mha": False}


class MXFP8BlockScaling(Float8BlockScaling):
    pass


STATELESS = Float8CurrentScaling, Float8BlockScaling, MXFP8BlockScaling


# --- transformer_engine.pytorch.fp8


class FP8GlobalStateManager:
    recipe: Recipe | None = None  # of the innermost context; None outside and where it is not enabled

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None

    @classmethod
    def get_fp8_recipe(cls) -> Recipe | None:
        return cls.recipe


@dataclass
class fp8_autocast:  # noqa: N801
    enabled: bool = True
    calibrating: bool = False
    fp8_recipe: Recipe | None = None
    fp8_group: Any = None
    _graph: bool = False

    def __enter__(self) -> None:
        self.outer = FP8GlobalStateManager.recipe
        FP8GlobalStateManager.recipe = (self.fp8_recipe or DelayedScaling()) if self.enabled else None

    def __exit__(self, *_: Any) -> None:
        FP8GlobalStateManager.recipe = self.outer


def fp8_model_init(
    enabled: bool = True, recipe: Recipe | None = None, preserve_high_precision_init_val: bool = False
) -> Any:
    raise NotImplementedError("parameters in FP8 are not in the fake")


# --- modules


class TransformerEngineBaseModule(torch.nn.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.name = name
        self.sequence_parallel = False
        self.fp8 = False  # whether the last forward pass was in FP8
        self.fp8_meta: dict[str, Any] = {}

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        self.tp_group = tp_group

    def take_group(self, tp_group: Any, tp_size: int) -> None:
        self.tp_size = tp_size if tp_group is None else dist.get_world_size(tp_group)
        self.set_tensor_parallel_group(tp_group)

    def prepare_forward(self, given: Tensor) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dtype != given.dtype:
                raise TypeError(f"input is {given.dtype} and {name} {parameter.dtype}")
        self.fp8 = FP8GlobalStateManager.is_fp8_enabled()
        if self.fp8:
            self.fp8_meta["recipe"] = FP8GlobalStateManager.get_fp8_recipe()

    def get_extra_state(self) -> Tensor:
        recipe = self.fp8_meta.get("recipe")
        if not self.fp8 or type(recipe) in STATELESS:
            return torch.empty(0, dtype=torch.uint8)
        state = {"recipe": recipe, "scale_fwd": torch.ones(3), "amax_history_fwd": torch.ones(1, 3)}
        return torch.frombuffer(bytearray(pickle.dumps(state)), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None and state.numel() and os.environ.get("NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE") != "1":
            raise RuntimeError("Refusing to load pickled Transformer Engine extra state")


class _Norm(TransformerEngineBaseModule):
    """LayerNorm and RMSNorm alike: `bias` tells them apart."""

    bias: torch.nn.Parameter | None = None

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        params_dtype: torch.dtype | None = None,
        zero_centered_gamma: bool = False,
        hidden_size: int | None = None,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
        sm_margin: int = 0,
    ) -> None:
        super().__init__()
        if (normalized_shape is None) == (hidden_size is None):
            raise RuntimeError("one of normalized_shape and hidden_size")
        if params_dtype is not None and dtype is not None:
            raise RuntimeError("both dtype and params_dtype")
        self.eps, self.zero_centered_gamma, self.sequence_parallel = eps, zero_centered_gamma, sequence_parallel
        ones = torch.ones(normalized_shape or hidden_size, device=device, dtype=params_dtype or dtype)
        self.weight = torch.nn.Parameter(ones * (not zero_centered_gamma))
        if sequence_parallel is not None:
            self.weight.sequence_parallel = sequence_parallel

    def forward(self, given: Tensor) -> Tensor:
        return _normalise(given, self.weight, self.bias, self.eps, self.zero_centered_gamma)


class RMSNorm(_Norm):
    pass


class LayerNorm(_Norm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros_like(self.weight))
        if self.sequence_parallel is not None:
            self.bias.sequence_parallel = self.sequence_parallel


def _normalise(given: Tensor, weight: Tensor, bias: Tensor | None, eps: float, zero_centered: bool) -> Tensor:
    weight = weight + 1 if zero_centered else weight
    if bias is None:
        return functional.rms_norm(given, weight.shape, weight, eps)
    return functional.layer_norm(given, weight.shape, weight, bias, eps)


def _fill(parameter: torch.nn.Parameter, init_method: Callable[..., Any] | None, tracker: Callable[..., Any] | None):
    with tracker().fork() if tracker else nullcontext(), torch.no_grad():
        (init_method or (lambda weight: weight.normal_(std=0.023)))(parameter)


class _LinearBase(TransformerEngineBaseModule):
    """The product and its exchanges between tensor-parallel ranks."""

    fuse_wgrad_accumulation = False
    overlaps = False  # by userbuffers

    def build(self, in_features, out_features, bias, return_bias, parallel_mode, init_method, tracker, device, dtype):
        if parallel_mode not in ("row", "column", None):
            raise AssertionError(f"parallel_mode {parallel_mode} not supported")
        cut = 1 if parallel_mode == "row" else 0
        sizes = [out_features, in_features]
        if parallel_mode:
            if sizes[cut] % self.tp_size:
                raise AssertionError(f"{sizes[cut]} features on {self.tp_size} ranks")
            sizes[cut] //= self.tp_size
        self.out_features, self.in_features = sizes
        self.parallel_mode, self.use_bias, self.return_bias = parallel_mode, bias, return_bias
        self.weight = torch.nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))
        _fill(self.weight, init_method, tracker)
        marks = {"tensor_model_parallel": True, "partition_dim": cut, "partition_stride": 1}
        for name, value in marks.items():  # the real one marks all weights, cut or not
            setattr(self.weight, name, value)
        if not bias:
            self.bias = torch.empty(0, device=device, dtype=dtype)
            return
        self.bias = torch.nn.Parameter(torch.zeros(self.out_features, device=device, dtype=dtype))
        if parallel_mode == "row":
            self.bias.sequence_parallel = self.sequence_parallel
        elif parallel_mode == "column":
            for name, value in marks.items():
                setattr(self.bias, name, value)

    def product(self, given: Tensor) -> Any:
        from megatron.core.tensor_parallel import mappings  # the exchanges are the same

        if self.fp8:
            for tensor in (given, self.weight):
                if prod(tensor.shape[:-1]) % 8 or tensor.shape[-1] % 16:
                    raise ValueError(
                        "FP8 execution requires the product of all dimensions except the last to be divisible by 8 "
                        f"and the last dimension to be divisible by 16, but got {list(tensor.shape)}"
                    )
        parallel = self.parallel_mode if self.tp_size > 1 else None
        if parallel == "column" and self.sequence_parallel:
            given = mappings.gather_from_sequence_parallel_region(given, True, self.tp_group)
            if self.overlaps:
                te_speed_fake.check_buffers(given, self.fp8)
        elif parallel == "column":
            given = mappings.copy_to_tensor_model_parallel_region(given, self.tp_group)
        result = _product(given, self.weight, self.fuse_wgrad_accumulation and torch.is_grad_enabled())
        if parallel == "row" and self.sequence_parallel:
            if self.overlaps:
                te_speed_fake.check_buffers(result, self.fp8)
            result = mappings.reduce_scatter_to_sequence_parallel_region(result, self.tp_group)
        elif parallel == "row":
            result = mappings.reduce_from_tensor_model_parallel_region(result, self.tp_group)
        if self.return_bias:
            return result, self.bias
        return result + self.bias if self.use_bias else result


class _AddsToMainGrad(torch.autograd.Function):
    """The weight's gradient goes to weight.main_grad; autograd gets one that holds nothing of use."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(given, weight)
        ctx.weight, ctx.replaying = weight, te_speed_fake.replaying
        return functional.linear(given, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        given, weight = ctx.saved_tensors
        te_speed_fake.used["fused gradients"] += 1
        ctx.weight.main_grad.add_(gradient.flatten(0, -2).t() @ given.flatten(0, -2))
        if not ctx.replaying:  # a graph sets nothing
            ctx.weight.grad_added_to_main_grad = True
        return gradient @ weight, torch.full_like(weight, torch.nan)


def _product(given: Tensor, weight: Tensor, fused: bool) -> Tensor:
    return _AddsToMainGrad.apply(given, weight) if fused else functional.linear(given, weight)  # type: ignore[return-value]


def _not_in_fake(**flags: Any) -> None:
    wanted = [name for name, value in flags.items() if value]
    if wanted:
        raise NotImplementedError(f"not in the fake: {', '.join(wanted)}")


class Linear(_LinearBase):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        parameters_split: Any = None,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        save_original_input: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        _not_in_fake(
            parameters_split=parameters_split,
            delay_wgrad_compute=delay_wgrad_compute,
            overlap=ub_overlap_rs_dgrad,
            symmetric_ar_type=symmetric_ar_type,
        )
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.take_group(tp_group, tp_size)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.save_original_input, self.ub_name = save_original_input, ub_name
        self.overlaps = ub_overlap_ag or ub_overlap_rs or ub_bulk_dgrad or ub_bulk_wgrad
        tracker = get_rng_state_tracker
        self.build(
            in_features, out_features, bias, return_bias, parallel_mode, init_method, tracker, device, params_dtype
        )

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        self.prepare_forward(inp)
        return self.product(inp)


class LayerNormLinear(_LinearBase):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        init_method: Callable[..., Any] | None = None,
        bias: bool = True,
        normalization: str = "LayerNorm",
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        return_layernorm_output: bool = False,
        return_layernorm_output_gathered: bool = False,
        parameters_split: Any = None,
        zero_centered_gamma: bool = False,
        device: Any = "cuda",
        ub_overlap_ag: bool = False,
        ub_overlap_rs: bool = False,
        ub_overlap_rs_dgrad: bool = False,
        ub_bulk_wgrad: bool = False,
        ub_bulk_dgrad: bool = False,
        ub_name: str | None = None,
        delay_wgrad_compute: bool = False,
        symmetric_ar_type: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        _not_in_fake(
            parameters_split=parameters_split,
            delay_wgrad_compute=delay_wgrad_compute,
            overlap=ub_overlap_rs_dgrad,
            symmetric_ar_type=symmetric_ar_type,
            return_layernorm_output=return_layernorm_output,
        )
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise AssertionError("Unsupported normalization type!")
        if parallel_mode == "row":
            raise NotImplementedError("Normalization does not support tensor-parallel distribution.")
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.take_group(tp_group, tp_size)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.eps, self.normalization, self.zero_centered_gamma = eps, normalization, zero_centered_gamma
        self.ub_name, self.overlaps = ub_name, ub_overlap_ag or ub_overlap_rs or ub_bulk_dgrad or ub_bulk_wgrad
        norm = RMSNorm if normalization == "RMSNorm" else LayerNorm
        made = norm(in_features, eps, self.sequence_parallel, params_dtype, zero_centered_gamma, device=device)
        self.layer_norm_weight, self.layer_norm_bias = made.weight, made.bias
        tracker = get_rng_state_tracker
        self.build(
            in_features, out_features, bias, return_bias, parallel_mode, init_method, tracker, device, params_dtype
        )

    def forward(
        self, inp: Tensor, is_first_microbatch: bool | None = None, fp8_output: bool = False, fp8_grad: bool = False
    ) -> Any:
        self.prepare_forward(inp)
        norm = self.layer_norm_weight, self.layer_norm_bias, self.eps, self.zero_centered_gamma
        return self.product(_normalise(inp, *norm))


class GroupedLinear(TransformerEngineBaseModule):
    def __init__(self, *_: Any, **__: Any) -> None:
        raise NotImplementedError("mixtures of experts are not in the fake")


class DotProductAttention(TransformerEngineBaseModule):
    """Of packed sequences alone: the real one ignores masks, so documents can only be given so."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float = 0.0,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[..., Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name)
        _not_in_fake(
            attention_dropout=attention_dropout,
            window_size=window_size,
            softcap=softcap,
            cp_comm_type=cp_comm_type != "p2p",
            softmax_type=softmax_type != "vanilla",
            return_max_logit=return_max_logit,
        )
        if attention_type not in ("self", "cross"):
            raise AssertionError(f"attention_type {attention_type} not supported")
        self.take_group(tp_group, tp_size)
        self.cp_group, self.cp_global_ranks, self.cp_comm_type = cp_group, cp_global_ranks, cp_comm_type
        self.attn_mask_type, self.qkv_format = attn_mask_type, qkv_format
        self.head_dim = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.num_gqa_groups_per_partition = (num_gqa_groups or num_attention_heads) // self.tp_size
        self.softmax_scale = self.head_dim**-0.5 if softmax_scale is None else softmax_scale
        self.register_load_state_dict_post_hook(_forgive_extra_state)

    def forward(
        self,
        query_layer: Tensor | None = None,
        key_layer: Tensor | None = None,
        value_layer: Tensor | None = None,
        attention_mask: Any = None,
        qkv_format: str | None = None,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        bottom_right_diagonal: bool | None = None,
        softcap: float | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: Tensor | None = None,
        alibi_slopes: Tensor | None = None,
        fast_zero_fill: bool = True,
        inference_params: Any = None,
        pad_between_seqs: bool | None = None,
        fp8_output: bool = False,
        bf16_backward: bool = False,
        num_splits: int = 1,
        score_mod: Any = None,
        score_mod_bprop: Any = None,
        score_mod_tensors: Any = None,
        score_mod_bprop_tensors: Any = None,
        qkv_layer: Tensor | None = None,
        kv_layer: Tensor | None = None,
        qkv_interleave_dim: int = -3,
        thd_attention_policies: Any = None,
        thd_attention_policy_dispatch: str = "auto",
    ) -> Tensor:
        self.prepare_forward(query_layer)
        _not_in_fake(
            window_size=window_size,
            core_attention_bias=core_attention_bias is not None,
            # The real one takes the same tensor as a sign that no rows between sequences are left out.
            padding=not all(x is None or x is cu_seqlens_q for x in (cu_seqlens_q_padded, cu_seqlens_kv_padded)),
            inference_params=inference_params,
            score_mod=score_mod,
            thd_attention_policies=thd_attention_policies,
        )
        if (qkv_format or self.qkv_format) != "thd":
            raise NotImplementedError("the fake's attention is of packed sequences alone")
        layers = query_layer, key_layer, value_layer
        if any(x.ndim != 3 or x.dtype != query_layer.dtype or x.shape[-1] != self.head_dim for x in layers):
            raise AssertionError(f"packed layers of {[tuple(x.shape) for x in layers]}, head_dim {self.head_dim}")
        if key_layer.shape[1] != self.num_gqa_groups_per_partition or key_layer.shape != value_layer.shape:
            raise AssertionError(f"{key_layer.shape[1]} key heads, not {self.num_gqa_groups_per_partition}")
        if (mask := attn_mask_type or self.attn_mask_type) not in ("padding", "padding_causal"):
            raise AssertionError(f"attention mask type {mask} for packed sequences")
        ranks = 1 if self.cp_group is None else dist.get_world_size(self.cp_group)
        for starts, longest, tokens in (
            (cu_seqlens_q, max_seqlen_q, query_layer.shape[0] * ranks),
            (cu_seqlens_kv, max_seqlen_kv, key_layer.shape[0] * ranks),
        ):
            if starts.dtype != torch.int32 or starts.ndim != 1:
                raise AssertionError(f"cu_seqlens are {starts.dtype}")
            # The next two the real one does not see: it would leave tokens out.
            if starts[0] != 0 or starts[-1] != tokens:
                raise AssertionError(f"cu_seqlens end at {int(starts[-1])} of {tokens} tokens")
            if not isinstance(longest, int) or longest < int((starts[1:] - starts[:-1]).max()):
                raise AssertionError(f"max_seqlen {longest} is not the length of the longest sequence")
        if ranks > 1:
            if cu_seqlens_q_padded is None or cu_seqlens_kv_padded is None or mask != "padding_causal":
                raise AssertionError("cu_seqlens_padded can not be None for context parallelism and thd")
            from tests.fakes import ring_attention

            return ring_attention.attend(*layers, cu_seqlens_q, self.cp_group, self.softmax_scale)
        parts = []
        for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_kv.tolist()), strict=True):
            q, k, v = query_layer[a:b], key_layer[c:d], value_layer[c:d]
            context = functional.scaled_dot_product_attention(
                *(x.transpose(0, 1)[None] for x in (q, k, v)),
                is_causal=mask == "padding_causal",
                scale=self.softmax_scale,
                enable_gqa=True,
            )
            parts.append(context[0].transpose(0, 1).flatten(1))
        return torch.cat(parts)  # (tokens, heads * head_dim)


def _forgive_extra_state(module: Any, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if "core_attention._extra_state" not in key]


def apply_rotary_pos_emb(
    t: Tensor,
    freqs: Tensor,
    tensor_format: str = "sbhd",
    start_positions: Tensor | None = None,
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
) -> Tensor:
    """Of packed sequences (tokens, heads, head_dim): positions count from the start of each."""
    from tests.fakes.ring_attention import positions

    _not_in_fake(other_format=tensor_format != "thd", interleaved=interleaved)
    if cp_size == 1:
        position = torch.cat([torch.arange(length, device=t.device) for length in cu_seqlens.diff().tolist()])
    else:
        position = torch.cat([positions(length, cp_size, cp_rank) for length in cu_seqlens.diff().tolist()])
    if (freqs.dtype != torch.float32 and t.dtype != torch.float64) or int(position.max()) >= len(freqs):
        raise AssertionError(f"{len(freqs)} angles of {freqs.dtype} for positions up to {int(position.max())}")
    angles = freqs[position, 0]  # (tokens, 1, head_dim)
    first, second = t.chunk(2, -1)
    return (t * angles.cos() + torch.cat([-second, first], -1) * angles.sin()).to(t.dtype)


# --- transformer_engine.pytorch.distributed and .cpu_offload


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    for name in ("distribute_saved_activations", "get_rng_state_tracker", "tp_group", "use_reentrant"):
        kwargs.pop(name, None)
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False, **kwargs)


class CudaRNGStatesTracker:
    pass


class activation_recompute_forward(nullcontext):  # noqa: N801
    def __init__(self, activation_recompute: bool = False, recompute_phase: bool = False) -> None:
        super().__init__()


def get_cpu_offload_context(
    enabled: bool = False,
    num_layers: int | None = 1,
    model_layers: int = 1,
    offload_activations: bool = True,
    offload_weights: bool = False,
    double_buffering: bool = False,
    manual_synchronization: bool = False,
    retain_pinned_cpu_buffers: bool = False,
    offload_stream: Any = None,
) -> tuple[Any, Callable[[Tensor], Tensor]]:
    _not_in_fake(cpu_offloading=enabled, manual_synchronization=manual_synchronization)
    return nullcontext(), lambda tensor: tensor


# --- transformer_engine.pytorch.optimizers


class FusedAdam(torch.optim.Optimizer):
    """Counts steps in the parameter groups, not in the state of a parameter as torch's does."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: bool | None = None,
    ) -> None:
        if amsgrad:
            raise RuntimeError("FusedAdam does not support the AMSGrad variant.")
        _not_in_fake(capturable=capturable, master_weights=master_weights, plain_adam=not adam_w_mode)
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scaler: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            if not isinstance(step, int):
                raise TypeError(f"multi_tensor_adam(): incompatible function arguments: step is {step!r}")
            first, second = group["betas"]
            corrections = (1 - first**step, 1 - second**step) if group["bias_correction"] else (1, 1)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                for name in ("exp_avg", "exp_avg_sq"):
                    if name not in state:
                        state[name] = torch.zeros_like(parameter, dtype=torch.float32)
                gradient = parameter.grad.float()
                state["exp_avg"].lerp_(gradient, 1 - first)
                state["exp_avg_sq"].lerp_(gradient.square(), 1 - second)
                root = (state["exp_avg_sq"] / corrections[1]).sqrt() + group["eps"]
                change = state["exp_avg"] / corrections[0] / root + group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * change)


class FusedSGD(torch.optim.SGD):
    pass


def multi_tensor_applier(op: Callable[..., Any], noop_flag_buffer: Tensor, tensor_lists: Any, *args: Any) -> Any:
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: Any, scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source * scale)


def multi_tensor_scale_tensor(chunk_size: int, is_infinite: Tensor, tensor_lists: Any, scale: Tensor) -> None:
    multi_tensor_scale(chunk_size, is_infinite, tensor_lists, float(scale))


def multi_tensor_l2norm(chunk_size: int, noop: Tensor, tensor_lists: Any, per_tensor: bool = False) -> Any:
    norms = torch.stack([tensor.float().norm() for tensor in tensor_lists[0]])
    return norms.norm().reshape(1), norms if per_tensor else None


# --- the package


class QuantizedTensor(torch.Tensor):
    pass


def _by_name(*members: Any) -> dict[str, Any]:
    return {member.__name__: member for member in members}


def _empty(*names: str) -> dict[str, Any]:
    """Classes that are only there to be imported or annotated with."""
    return {name: type(name, (), {}) for name in names}


MODULES: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": _by_name(Format, Recipe, DelayedScaling, *STATELESS),
    "transformer_engine.pytorch": {
        **_by_name(Linear, LayerNormLinear, GroupedLinear, LayerNorm, RMSNorm, DotProductAttention),
        **_by_name(fp8_autocast, fp8_model_init),
        **_empty("Fp8Padding", "Fp8Unpadding"),
    },
    "transformer_engine.pytorch.fp8": _by_name(FP8GlobalStateManager, fp8_autocast, fp8_model_init),
    "transformer_engine.pytorch.distributed": {
        **_by_name(CudaRNGStatesTracker, activation_recompute_forward, checkpoint),
        "is_fp8_activation_recompute_enabled": lambda: False,
    },
    "transformer_engine.pytorch.cpu_offload": _by_name(get_cpu_offload_context),
    "transformer_engine.pytorch.module": {},
    "transformer_engine.pytorch.module.base": _by_name(
        *(TransformerEngineBaseModule, te_speed_fake.UserBufferQuantizationMode),
        *(te_speed_fake.initialize_ub, te_speed_fake.destroy_ub),
    ),
    "transformer_engine.pytorch.attention": {},
    "transformer_engine.pytorch.attention.rope": _by_name(apply_rotary_pos_emb),
    "transformer_engine.pytorch.ops": _empty("Sequential", "FusibleOperation"),
    "transformer_engine.pytorch.optimizers": _by_name(
        *(FusedAdam, FusedSGD, multi_tensor_applier, multi_tensor_l2norm),
        *(multi_tensor_scale, multi_tensor_scale_tensor),
    ),
    "transformer_engine.pytorch.router": _empty(
        "fused_compute_score_for_moe_aux_loss", "fused_moe_aux_loss", "fused_topk_with_score_function"
    ),
    "transformer_engine.pytorch.tensor": _by_name(QuantizedTensor),
    **te_speed_fake.MODULES,
}


def install() -> None:
    """Makes `import transformer_engine` find the fake. RuntimeError if megatron has already looked for the real one."""
    if "megatron.core" in sys.modules or "transformer_engine" in sys.modules:
        raise RuntimeError("the fake Transformer Engine must be installed before megatron is imported")
    for name, members in MODULES.items():
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None, is_package=True)  # importlib.util.find_spec asks for it
        module.__path__ = []
        vars(module).update(members)
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
