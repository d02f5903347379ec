"""SwiGLU and rotary positions as one function are their formulas, which autograd differentiates in float64 here."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_soda.model import fused


def swiglu(both: Tensor) -> Tensor:
    gate, up = both.tensor_split(2, -1)
    return gate / (1 + (-gate).exp()) * up


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """As complex numbers, whose parts are the two halves."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angles), angles)[..., :half]
    return torch.cat([turned.real, turned.imag], -1)


def angles_of(length: int, batch: int, width: int) -> Tensor:
    half = torch.rand(length, batch, 1, width // 2, generator=torch.Generator().manual_seed(1)) * 100
    return torch.cat([half, half], -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("function", "formula", "shape", "more"),
    [
        (fused.swiglu, swiglu, (7, 2, 48), []),
        (fused.rotate, rotate, (7, 2, 4, 16), [angles_of(7, 1, 16)]),
        (fused.rotate, rotate, (7, 2, 4, 16), [angles_of(7, 2, 16)]),
    ],
    ids=["swiglu", "rope", "rope of each sequence"],
)
def test_values_and_gradients(
    function: Callable[..., Tensor],
    formula: Callable[..., Tensor],
    shape: tuple[int, ...],
    more: list[Tensor],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(0)
    given = (torch.randn(shape, generator=generator) * 3).to(dtype)
    found, expected = given.clone().requires_grad_(), given.double().requires_grad_()
    outputs = function(found, *more), formula(expected, *(x.double() for x in more))
    gradient = torch.randn(outputs[0].shape, generator=generator).to(dtype)
    for output in outputs:
        output.backward(gradient.to(output.dtype))
    assert found.grad is not None
    assert expected.grad is not None
    for a, b in ((outputs[0], outputs[1]), (found.grad, expected.grad)):
        assert a.dtype == dtype
        assert (a - b).abs().max() < (2e-5 if dtype == torch.float32 else 0.02) * b.abs().max()


def test_swiglu_keeps_its_input_alone() -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    both = torch.randn(5, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        fused.swiglu(both)
    assert [tensor.data_ptr() for tensor in kept] == [both.data_ptr()]
