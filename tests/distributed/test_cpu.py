"""The CPU module bends torch for megatron-core alone."""

import pytest
import torch


def outside() -> list[str]:
    """On a rank of the pool, where the module is installed: what our own code sees."""
    wrong = []
    with torch.device("meta"):
        for name in ("zeros", "empty", "ones", "arange"):
            if not getattr(torch, name)(3).is_meta:
                wrong.append(f"torch.{name} ignores torch.device")
        if not (torch.full((2,), 1.0).is_meta and torch.tensor([1.0]).is_meta):
            wrong.append("torch.full or torch.tensor ignores torch.device")
    if torch.zeros(1).type() != "torch.FloatTensor":
        wrong.append("Tensor.type lies")
    for call in (lambda: torch.zeros(1, device="cuda"), torch.cuda.current_device, lambda: torch.zeros(1).cuda()):
        try:
            call()
            wrong.append("CUDA is pretended")
        except (AssertionError, RuntimeError):
            pass
    return wrong


@pytest.mark.skipif(torch.cuda.is_available(), reason="the module does nothing where CUDA is")
def test_everyone_else_sees_stock_torch(pool):
    assert pool.run(1, outside) == [[]]
