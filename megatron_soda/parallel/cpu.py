"""Lets megatron-core run without CUDA: the one place that bends anything. `install()` does nothing where CUDA is.

megatron-core names CUDA in some forty places (device="cuda", torch.cuda.current_device(), Tensor.cuda(),
Tensor.type() == "torch.cuda.FloatTensor", the CUDA random state). Each goes through a public torch name, so each is
wrapped here, for calls that come from a `megatron.*` module alone; everyone else sees stock torch. Two functions of
megatron-core are replaced: `_set_cuda_rng_state`, which reaches into the CUDA generator, and the one that scales
gradients, which is slow.

Checked by tests/distributed against one process at every layout; run those after every change of the pin.
"""

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = ("zeros", "empty", "tensor", "ones", "full", "arange", "empty_like", "zeros_like")
_installed = False


def install() -> None:
    global _installed
    if torch.cuda.is_available() or _installed:
        return
    _installed = True
    _keep_freed_memory()
    replacements: dict[str, Callable[..., Any]] = {
        "current_device": lambda: _CPU,
        "synchronize": lambda *a, **k: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "current_stream": lambda *a, **k: _NoStream(),
        "default_stream": lambda *a, **k: _NoStream(),
        "stream": lambda *a, **k: contextlib.nullcontext(),
    }
    for name, replacement in replacements.items():
        _replace(torch.cuda, name, replacement)
    _replace(torch.cuda.random, "get_rng_state", replacements["get_rng_state"])
    # `with torch.device(..)` knows factories by identity. Its table is made once, at first use: make it now, while
    # they are torch's own, or models built under it (transformers does) would have uninitialised buffers.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        _wrap_factory(name)
    _wrap_tensor_methods()

    import megatron.core.distributed.param_and_grad_buffer as megatron_buffer
    import megatron.core.models.common.embeddings.rope_utils as megatron_rope
    import megatron.core.optimizer.clip_grads as megatron_clip
    import megatron.core.optimizer.optimizer as megatron_optimizer
    import megatron.core.tensor_parallel.random as megatron_random
    from megatron.core import utils

    from ..model import fused

    # Where Transformer Engine or apex is installed these are kernels for CUDA alone.
    megatron_clip.multi_tensor_applier = utils.local_multi_tensor_applier
    megatron_clip.l2_norm_impl = utils.local_multi_tensor_l2_norm
    megatron_clip.multi_tensor_scale_impl = _scale_in_place
    megatron_clip.multi_tensor_scale_tensor_impl = None  # pyright: ignore[reportAttributeAccessIssue]  0.19.2 has it
    megatron_optimizer.multi_tensor_applier = utils.local_multi_tensor_applier
    megatron_optimizer.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    megatron_buffer.dist_reduce_scatter_func = _reduce_scatter_in_place
    megatron_buffer.dist_all_gather_func = _all_gather_in_place
    megatron_buffer._coalescing_manager = _collected
    _replace(dist, "all_reduce", _noted(dist.all_reduce))
    megatron_rope.fused_apply_rotary_pos_emb = fused.rotate
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)


def _keep_freed_memory() -> None:
    """Has glibc keep large freed blocks: every step frees and takes the same ones, and giving the pages back and
    faulting them in again was a quarter of the time of a step. Elsewhere than on glibc nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Gives back what is free now, once. While the engine is made, the distributed optimizer copies all weights into a
    buffer of its own, and the pages of the first ones would stay with the process."""
    if _installed:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


class _Works(list[Any]):
    """Exchanges that go on."""

    def wait(self) -> None:
        for work in self:
            work.wait()


_begun: list[_Works] = []


@contextlib.contextmanager
def _collected(*_: Any, **__: Any) -> Iterator[_Works]:
    """What megatron-core waits for later, if it does not wait at once: the exchanges begun inside."""
    _begun.append(_Works())
    try:
        yield _begun[-1]
    finally:
        _begun.pop()


def _noted(exchange: Callable[..., Any]) -> Callable[..., Any]:
    """The same, and a work that it returns is known to _collected."""

    def call(*args: Any, **kwargs: Any) -> Any:
        work = exchange(*args, **kwargs)
        if work is not None and _begun:
            _begun[-1].append(work)
        return work

    return call


def _reduce_scatter_in_place(part: torch.Tensor, whole: torch.Tensor, op: Any, group: Any, async_op: bool) -> None:
    """For the distributed optimizer, where `part` is this rank's part of `whole`: gloo's own copies `whole`."""
    parts = whole.chunk(dist.get_world_size(group))
    assert part.data_ptr() == parts[dist.get_rank(group)].data_ptr()
    for rank, one in enumerate(parts):
        _noted(dist.reduce)(one, group_dst=rank, op=op, group=group, async_op=async_op)


def _all_gather_in_place(whole: torch.Tensor, part: torch.Tensor, group: Any, async_op: bool) -> None:
    """As above: gloo's own gathers into a copy of `whole`."""
    parts = whole.chunk(dist.get_world_size(group))
    assert part.data_ptr() == parts[dist.get_rank(group)].data_ptr()
    for rank, one in enumerate(parts):
        _noted(dist.broadcast)(one, group_src=rank, group=group, async_op=async_op)


def _scale_in_place(_chunk: int, _overflow: Any, tensors: list[list[torch.Tensor]], scale: Any) -> None:
    """For gradient clipping. megatron-core makes a scaled copy of every gradient first: a tenth of a step."""
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, scale, out=target)


class _NoStream:
    def wait_stream(self, *_: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def record_event(self, *_: Any) -> "_NoStream":
        return self


def _called_by_megatron() -> bool:
    """Whether the function that called our wrapper is megatron-core's (two frames up from here)."""
    return sys._getframe(2).f_globals.get("__name__", "").startswith("megatron.")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


def _replace(module: Any, name: str, replacement: Callable[..., Any]) -> None:
    original = getattr(module, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return (replacement if _called_by_megatron() else original)(*args, **kwargs)

    setattr(module, name, wrapper)


def _wrap_factory(name: str) -> None:
    original = getattr(torch, name)

    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if (_is_cuda(kwargs.get("device")) or kwargs.get("pin_memory")) and _called_by_megatron():
            kwargs["device"] = _CPU
            kwargs.pop("pin_memory", None)
        return original(*args, **kwargs)

    setattr(torch, name, wrapper)


def _wrap_tensor_methods() -> None:
    original_type, original_cuda, original_to = torch.Tensor.type, torch.Tensor.cuda, torch.Tensor.to

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if not args and not kwargs and not self.is_cuda and _called_by_megatron():
            return result.replace("torch.", "torch.cuda.", 1)  # the optimizer refuses any other name
        return result

    def cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if _called_by_megatron() else original_cuda(self, *args, **kwargs)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if _called_by_megatron():
            if args and _is_cuda(args[0]):
                args = (_CPU, *args[1:])
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = _CPU
        return original_to(self, *args, **kwargs)

    torch.Tensor.type, torch.Tensor.cuda, torch.Tensor.to = type_, cuda, to  # type: ignore[method-assign]
