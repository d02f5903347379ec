"""Transformer Engine's userbuffers: memory that tensor-parallel ranks write into during each other's matrix products
(`parallel.overlap_tensor`)."""

import importlib
from typing import Any

import torch

from ..config import Recipe


def start_userbuffers(recipe: Recipe) -> None:
    """For the layers of a model that is built after it. All ranks call it."""
    base: Any = importlib.import_module("transformer_engine.pytorch.module.base")
    modes, precision = base.UserBufferQuantizationMode, recipe.precision
    wanted = [modes.FP8 if precision.dtype == "fp8" else modes.NONE]
    if precision.bf16_layers:
        wanted.append(modes.NONE)
    tokens = recipe.data.sequence_length * recipe.training.micro_batch_size
    base.destroy_ub()  # those of a run before this one, in the same process
    base.initialize_ub(
        shape=[tokens, recipe.model.hidden_size],
        tp_size=recipe.parallel.tensor,
        quantization_modes=wanted,
        dtype=torch.bfloat16,
        bootstrap_backend="nccl",
    )
