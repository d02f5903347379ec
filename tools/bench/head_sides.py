"""Other projects' heads for bench_head.py, with what they have of ours: weighted labels, z-loss and sums by class.

Each has the losses of the tokens; what is left of a head's contract is done around them in torch. The weight's gradient
gets into main_grad by megatron-core's hook, as with every layer.
"""

import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Z_WEIGHT = 1e-4
PACKAGES = {"te": "transformer_engine", "liger": "liger_kernel", "cce": "cut_cross_entropy"}
Losses = Callable[[Tensor, Any, Tensor], tuple[Tensor, Tensor]]


def missing(side: str, device: str) -> str:
    """Why a side cannot be measured; "" if it can."""
    if device == "cpu" or not torch.cuda.is_available():
        return "needs a CUDA device"
    if importlib.util.find_spec(PACKAGES[side]) is None:
        return f"{PACKAGES[side]} is not installed"
    if side == "cce":
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

        if "return_lse" not in inspect.signature(linear_cross_entropy).parameters:
            return "this cut_cross_entropy has no return_lse, so no z-loss; that of its repository has"
    return ""


def losses_of(side: str) -> Losses:
    """A function of hidden (tokens, width), the head's layer and labels: NLL of each token, and what is minimised."""
    return {"te": _te, "liger": _liger, "cce": _cce}[side]


def _te(hidden: Tensor, layer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """All logits are there. No z-loss: it does not tell the logsumexp."""
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy  # pyright: ignore[reportMissingImports]

    logits, _ = layer(hidden[:, None])
    nll = parallel_cross_entropy(logits, labels[:, None], 0.0, False, None, -100, **_overwrites(parallel_cross_entropy))
    return nll.view(-1), nll.view(-1)


def _overwrites(function: Callable[..., Any]) -> dict[str, bool]:
    """Older versions always overwrite the logits by their gradient."""
    return {"overwrite_input": True} if "overwrite_input" in inspect.signature(function).parameters else {}


def _liger(hidden: Tensor, layer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of single tokens, which weights need, make it compute the logits again for the gradients."""
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports]
        liger_fused_linear_cross_entropy,
    )

    found = liger_fused_linear_cross_entropy(
        hidden,
        layer.weight,
        labels,
        reduction="none",
        lse_square_scale=Z_WEIGHT,
        return_z_loss=True,
        accum_dtype=torch.float32,
    )
    return found.loss.detach() - found.z_loss.detach(), found.loss


def _cce(hidden: Tensor, layer: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Exact: random weights give next to no token a probability that its filter of small gradients would keep."""
    from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]

    nll, lse = linear_cross_entropy(hidden, layer.weight, labels, reduction="none", return_lse=True, impl="cce_exact")
    return nll, nll + Z_WEIGHT * lse.square()
