"""SwiGLU and rotary positions as one function each, in plain torch. Autograd through their formulas keeps more or
takes more passes over memory. For the CPU; CUDA has kernels (kernels.py, Transformer Engine's)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone; autograd would keep silu(gate), too."""

    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        ctx.save_for_backward(both)
        gate, up = both.chunk(2, -1)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        out = torch.empty_like(both)
        of_gate, of_up = out.chunk(2, -1)
        torch.mul(gradient, silu(gate), out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up; `both` (..., 2 * width) is the gate and then up -> (..., width)."""
    return _SwiGLU.apply(both)  # type: ignore[no-any-return]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, angles: Tensor) -> Tensor:
        half = angles.chunk(2, -1)[0]
        cos, sin = half.cos().to(x.dtype), half.sin().to(x.dtype)
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(x)
    (a, b), (first, second) = x.chunk(2, -1), out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out


def rotate(x: Tensor, angles: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary positions of (length, batch, heads, head_dim); angles (length, 1 or batch, 1, head_dim), whose two halves
    are the same. Called as Transformer Engine's function of this kind is; its other format is not ours."""
    assert not interleaved
    assert angles.shape[-1] == x.shape[-1]
    return _Rotate.apply(x, angles)  # type: ignore[no-any-return]
