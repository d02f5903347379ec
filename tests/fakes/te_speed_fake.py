"""A part of the fake Transformer Engine (transformer_engine_fake.py): userbuffers, which exchange nothing, and CUDA
graphs, whose replays are calls."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor

used: Counter[str] = Counter()  # how often

# --- transformer_engine.pytorch.module.base


class UserBufferQuantizationMode(Enum):
    NONE = "none"
    FP8 = "fp8"


buffers: dict[str, Any] = {}  # what they were made with


def initialize_ub(
    shape: list,
    tp_size: int,
    use_fp8: bool = False,
    quantization_modes: list[UserBufferQuantizationMode] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ub_cfgs: Any = None,
    bootstrap_backend: Any = None,
    with_cublasmp: bool = False,
) -> None:
    if buffers:
        raise RuntimeError("UB communicators are already initialized.")
    buffers.update(shape=shape, tp_size=tp_size, modes=quantization_modes, dtype=dtype)


def destroy_ub() -> None:
    buffers.clear()


def check_buffers(whole: Tensor, fp8: bool) -> None:
    """Of a product whose exchange of `whole` (tokens of all ranks, features) is to be overlapped."""
    used["buffers"] += 1
    if not buffers:
        raise RuntimeError("UB manager is not initialized.")
    if UserBufferQuantizationMode.FP8 if fp8 else UserBufferQuantizationMode.NONE not in buffers["modes"]:
        raise KeyError(f"UB with use_fp8={fp8} is not registered.")
    if list(whole.flatten(0, -2).shape) != buffers["shape"] or whole.dtype != buffers["dtype"]:
        raise RuntimeError(f"userbuffers of {buffers} for {list(whole.shape)}, {whole.dtype}")


# --- transformer_engine.pytorch.graph

replaying = False


def make_graphed_callables(
    modules: Any,
    sample_args: Any,
    num_warmup_iters: int = 3,
    allow_unused_input: bool = False,
    sample_kwargs: Any = None,
    fp8_enabled: Any = None,
    fp8_calibrating: bool | None = None,
    fp8_recipe: Any = None,
    fp8_group: Any = None,
    fp8_weight_caching: bool | None = None,
    enabled: Any = None,
    calibrating: bool | None = None,
    recipe: Any = None,
    amax_reduction_group: Any = None,
    cache_quantized_params: bool | None = None,
    _order: list[int] | None = None,
    _num_layers_per_chunk: list[int] | None = None,
    pool: Any = None,
    retain_graph_in_backward: bool = False,
    _reuse_graph_input_output_buffers: bool = False,
    clone_param_grads_on_return: bool = True,
    pre_warmup_hook: Callable[..., Any] | None = None,
    post_warmup_hook: Callable[..., Any] | None = None,
    capture_time_hooks: Any = None,
) -> tuple[Callable[..., Any], ...]:
    """For megatron-core, with one micro-batch on its way. What is captured runs forward and backward here as well."""
    assert _order == [1, -1]
    assert _num_layers_per_chunk == [len(modules)] == [len(sample_args)]
    assert not any(sample_kwargs)
    graphs = []
    for module, (given,) in zip(modules, sample_args, strict=True):
        if module._forward_pre_hooks or module._forward_hooks:
            raise RuntimeError("Modules must not have hooks registered at the time they are passed.")
        (made,) = module(given)
        made.sum().backward()
        for parameter in module.parameters():
            parameter.grad = None
        graphs.append(_graph(module, given))
    return tuple(graphs)


def _graph(module: Any, sample: Tensor) -> Callable[..., Any]:
    def replay(given: Tensor, is_first_microbatch: bool) -> Any:
        global replaying
        if given.shape != sample.shape or given.dtype != sample.dtype:
            raise RuntimeError(f"captured with {sample.shape}, {sample.dtype}, not {given.shape}, {given.dtype}")
        used["graphs"] += 1
        replaying = True
        hooks = {part: part._forward_pre_hooks for part in module.modules()}
        for part in hooks:  # a graph calls none
            part._forward_pre_hooks = OrderedDict()
        try:
            return module._te_cuda_graph_capture(given)
        finally:
            replaying = False
            for part, own in hooks.items():
                part._forward_pre_hooks = own

    return replay


MODULES: dict[str, dict[str, Any]] = {
    "transformer_engine.pytorch.graph": {
        "make_graphed_callables": make_graphed_callables,
        **{name: lambda *_: None for name in ("save_fp8_tensors", "restore_fp8_tensors")},
        **{name: lambda: None for name in ("set_capture_start", "set_capture_end")},
    },
    "transformer_engine.pytorch.utils": {"make_weak_ref": lambda tensor: tensor},
}
