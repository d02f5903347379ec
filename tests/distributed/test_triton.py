"""The Triton kernels, in Triton's interpreter on a CPU, against float64."""

import os
import subprocess
import sys

import pytest
import torch

from megatron_soda.model import head
from megatron_soda.model.legal_rows import Piece

pytest.importorskip("triton", reason="comes with PyTorch for CUDA")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
here = pytest.mark.skipif(not INTERPRETED, reason="runs inside test_in_the_interpreter")


@pytest.mark.skipif(INTERPRETED, reason="runs the others")
def test_in_the_interpreter():
    """Triton must not have been imported before the variable was set."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "16 passed" in done.stdout


@pytest.fixture
def kernels():
    from megatron_soda.model import kernels

    return kernels


def scores_of(rows: int, columns: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with NaN in the padding, and a label for each row, some of them another rank's."""
    generator = torch.Generator().manual_seed(columns)
    scores = (torch.randn(rows, width, generator=generator) * 5).to(dtype)
    scores[:, columns:] = torch.nan
    label = torch.randint(columns, (rows,), generator=generator)
    label[::3] = -1
    label[1], label[-1] = 0, columns - 1
    return scores, label


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "width"), [(1, 1), (5, 128), (8192, 8192), (8193, 8320), (20_001, 20_096)])
def test_against_float64(kernels, columns, width, dtype):
    scores, label = scores_of(6, columns, width, dtype)
    exact = scores[:, :columns].double()
    highest, total, of_label = kernels.statistics(scores, columns, label)
    assert torch.equal(highest.double(), exact.amax(1))
    torch.testing.assert_close(total.double(), (exact - exact.amax(1, keepdim=True)).exp().sum(1), rtol=1e-5, atol=0)
    picked = exact.gather(1, label.clamp(min=0)[:, None])[:, 0]
    assert torch.equal(of_label.double(), torch.where(label >= 0, picked, 0.0))
    factor, weight = torch.rand(6) + 0.1, torch.rand(6)
    shift = highest + 0.5  # another rank's highest
    wanted = factor[:, None].double() * (exact - shift[:, None]).exp()
    wanted[label >= 0, label[label >= 0]] -= weight[label >= 0].double()
    kernels.gradient_(scores, columns, label, shift, factor, weight)
    assert torch.equal(scores[:, columns:], torch.zeros(6, width - columns, dtype=dtype))
    close = (
        dict(rtol=1e-5, atol=1e-7) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-7)
    )  # one bit: the interpreter cuts off
    torch.testing.assert_close(scores[:, :columns].double(), wanted, **close)


def some_pieces() -> list[Piece]:
    """Rows in a range, with gaps, and with a sample of the others."""
    first, second, third = torch.arange(50).split([20, 13, 17])
    return [
        Piece(first, 30, 0, 30, others=torch.tensor([40, 90, 199]), one_in=16),
        Piece(second, 70, 0, 70, torch.tensor([31, 33, 69])),
        Piece(third, 200, 0, 200, others=torch.tensor([], dtype=torch.int64), one_in=16),
    ]


@here
@pytest.mark.parametrize("pieces", [None, some_pieces()], ids=["all rows", "legal rows"])
def test_the_whole_head(kernels, monkeypatch, pieces):
    """With padded rows, and chunks of which the last one is not full."""
    monkeypatch.setitem(head.CHUNK_BYTES, "cpu", 4 * 256 * 20)
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 8, generator=generator), torch.randn(256, 8, generator=generator)
    weight[200:] = 0
    labels = torch.randint(200 if pieces is None else 30, (50,), generator=generator)
    classes = torch.randint(3, (50,), generator=generator)
    of_label = torch.rand(50, generator=generator)
    found = []
    for scores in (head._TorchScores, head._TritonScores):
        monkeypatch.setattr(head, "_scores_class", lambda _, scores=scores: scores)
        x, gradient = hidden.clone().requires_grad_(), torch.zeros_like(weight)
        loss, sums = head.head_loss(
            x, weight, labels, of_label, classes, classes=3, rows=200, z_weight=0.1, weight_gradient=gradient,
            pieces=pieces,
        )  # fmt: skip
        loss.backward()
        found.append((loss.detach(), sums, x.grad, gradient))
    for torch_code, triton_code in zip(*found, strict=True):
        torch.testing.assert_close(triton_code, torch_code, rtol=1e-4, atol=1e-5)
    assert found[1][3][:200].abs().min(1).values.gt(0).any()
    assert pieces is None or found[1][3][[40, 90, 199]].all()
    assert not found[1][3][200:].any()


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [5, 1500])
def test_swiglu(kernels, width, dtype):
    generator = torch.Generator().manual_seed(width)
    # Neither lies in memory as it is read.
    both = (torch.randn(3, 2, 2 * width, generator=generator) * 3).to(dtype).transpose(0, 1)
    incoming = torch.randn(3, 2, width, generator=generator).to(dtype).transpose(0, 1)
    both.requires_grad_()
    exact = both.detach().double().requires_grad_()
    gate, up = exact.chunk(2, -1)
    wanted = torch.nn.functional.silu(gate) * up
    wanted.backward(incoming.double())
    found = kernels.swiglu(both)
    found.backward(incoming)
    close = dict(rtol=1e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=2**-7, atol=1e-6)  # one bit, as above
    torch.testing.assert_close(found.detach().double(), wanted.detach(), **close)
    torch.testing.assert_close(both.grad.double(), exact.grad, **close)
