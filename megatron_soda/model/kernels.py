"""Triton kernels: the softmax of the head's scores, and SwiGLU.

The head's scores are read twice and written once, in the dtype of the matrix product; torch's own operations would copy
them to float32 and pass over them seven times, which took longer than the three products of the head.
TRITON_INTERPRET=1 runs the kernels on a CPU, for tests.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false, reportCallIssue=false, reportArgumentType=false
# Triton comes with PyTorch for CUDA, and kernel[grid](...) is how its kernels are launched.

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

STATISTICS_BLOCK, GRADIENT_BLOCK, SWIGLU_BLOCK = 8192, 4096, 1024


@triton.jit
def _statistics_kernel(
    scores, label, highest, total, label_score, stride, columns: tl.constexpr, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0)
    base = scores + row.to(tl.int64) * stride
    at = tl.arange(0, BLOCK)
    top = float("-inf")
    sum_ = 0.0
    for first in range(0, columns, BLOCK):
        x = tl.load(base + first + at, mask=first + at < columns, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        sum_ = sum_ * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    mine = tl.load(label + row)
    tl.store(highest + row, top)
    tl.store(total + row, sum_)
    tl.store(label_score + row, tl.load(base + mine, mask=mine >= 0, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    scores, label, highest, factor, label_weight, stride, columns, width, BLOCK: tl.constexpr  # noqa: N803
):  # fmt: skip
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    where = scores + row.to(tl.int64) * stride + at
    x = tl.load(where, mask=at < columns, other=float("-inf")).to(tl.float32)
    gradient = tl.exp(x - tl.load(highest + row)) * tl.load(factor + row)
    gradient -= tl.where(at == tl.load(label + row), tl.load(label_weight + row), 0.0)
    tl.store(where, gradient.to(scores.dtype.element_ty), mask=at < width)


def statistics(scores: Tensor, columns: int, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first `columns` (one at least) of each row: the highest score, sum(exp(score - highest)), and the score of
    `label` (int64, -1 for none: 0 then). scores: (rows, width), rows contiguous. Returns float32 (rows,) each."""
    highest, total, label_score = torch.empty(3, len(scores), device=scores.device)
    _statistics_kernel[(len(scores),)](
        scores, label, highest, total, label_score, scores.stride(0), columns, BLOCK=STATISTICS_BLOCK, num_warps=16
    )  # fmt: skip
    return highest, total, label_score


def gradient_(scores: Tensor, columns: int, label: Tensor, highest: Tensor, factor: Tensor, weight: Tensor) -> None:
    """Scores become factor * exp(score - highest), less `weight` at the label; those from `columns` on become 0."""
    blocks = triton.cdiv(scores.shape[1], GRADIENT_BLOCK)
    _gradient_kernel[(len(scores), blocks)](
        scores, label, highest, factor, weight, scores.stride(0), columns, scores.shape[1], BLOCK=GRADIENT_BLOCK,
        num_warps=8,
    )  # fmt: skip


@triton.jit
def _swiglu_kernel(both, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(both + 2 * row * width + at, mask=at < width).to(tl.float32)
    up = tl.load(both + (2 * row + 1) * width + at, mask=at < width).to(tl.float32)
    tl.store(out + row * width + at, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=at < width)


@triton.jit
def _swiglu_gradient_kernel(gradient, both, out, width, BLOCK: tl.constexpr):  # noqa: N803
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, second = 2 * row * width + at, (2 * row + 1) * width + at
    gate = tl.load(both + first, mask=at < width).to(tl.float32)
    up = tl.load(both + second, mask=at < width).to(tl.float32)
    incoming = tl.load(gradient + row * width + at, mask=at < width).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    of_gate = incoming * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(out + first, of_gate.to(out.dtype.element_ty), mask=at < width)
    tl.store(out + second, (incoming * gate * sigmoid).to(out.dtype.element_ty), mask=at < width)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        both = both.contiguous()
        ctx.save_for_backward(both)
        width = both.shape[-1] // 2
        out = both.new_empty(*both.shape[:-1], width)
        grid = out.numel() // width, triton.cdiv(width, SWIGLU_BLOCK)
        _swiglu_kernel[grid](both, out, width, BLOCK=SWIGLU_BLOCK)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (both,) = ctx.saved_tensors
        out = torch.empty_like(both)
        grid = gradient.numel() // gradient.shape[-1], triton.cdiv(gradient.shape[-1], SWIGLU_BLOCK)
        _swiglu_gradient_kernel[grid](gradient.contiguous(), both, out, gradient.shape[-1], BLOCK=SWIGLU_BLOCK)
        return out


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up; `both` (..., 2 * width) is the gate and then up -> (..., width). Computed in float32; only
    `both` is kept for the backward pass."""
    return _SwiGLU.apply(both)  # type: ignore[no-any-return]
