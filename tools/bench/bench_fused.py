"""Measures SwiGLU and rotary positions as one function (model/fused.py) against autograd through their formulas, as in
megatron-core without fusions: CPU time of a forward and a backward pass, and what is kept between them. Run by hand.

    python tools/bench/bench_fused.py
    python tools/bench/bench_fused.py --preset 600m --precision bf16 --tokens 4096
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.parallel import ranks  # noqa: F401  # isort: skip  before megatron
from megatron.core.models.common.embeddings import rope_utils

from megatron_soda.config import choice, load_recipe
from megatron_soda.errors import run_tool
from megatron_soda.files import to_json
from megatron_soda.model import fused


def plain_swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def plain_rotate(x: Tensor, angles: Tensor) -> Tensor:
    return rope_utils._apply_rotary_pos_emb_bshd(x, angles)


def measure(function: Any, given: Tensor, *more: Tensor) -> tuple[float, float, float]:
    """Milliseconds forward and backward, and MiB that are kept, the input left out."""
    given = given.detach().requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in {given.data_ptr(), *(x.data_ptr() for x in more)}:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        began = time.process_time()
        made = function(given, *more)
        forward = time.process_time() - began
    gradient = torch.ones_like(made)
    began = time.process_time()
    made.backward(gradient)
    return 1e3 * forward, 1e3 * (time.process_time() - began), sum(kept.values()) / 2**20


def main(
    preset: Annotated[str, typer.Option(help="model.preset")] = "135m",
    precision: Annotated[str, typer.Option(help="fp32 | bf16")] = "fp32",
    tokens: Annotated[int, typer.Option(min=1)] = 1024,
    repeats: Annotated[int, typer.Option(min=1)] = 15,
) -> None:
    """Prints one JSON line: medians, in turns, on one thread."""
    choice("--precision", precision, ("fp32", "bf16"))
    torch.set_num_threads(1)
    model = load_recipe(None, [f"model.preset={preset}"]).model
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    half = torch.rand(tokens, 1, 1, model.head_dim // 2) * 100
    both = torch.randn(tokens, 1, 2 * model.ffn_hidden_size).to(dtype)
    query = torch.randn(tokens, 1, model.num_attention_heads, model.head_dim).to(dtype)
    angles = torch.cat([half, half], -1)
    cases: dict[str, tuple[Any, ...]] = {
        "swiglu": (fused.swiglu, both),
        "swiglu, formula": (plain_swiglu, both),
        "rope": (fused.rotate, query, angles),
        "rope, formula": (plain_rotate, query, angles),
    }
    results: dict[str, list[tuple[float, float, float]]] = {name: [] for name in cases}
    for _ in range(repeats + 2):
        for name, case in cases.items():
            results[name].append(measure(*case))
    keys = "forward_ms", "backward_ms", "kept_mib"
    found = {
        name: {key: round(statistics.median(run[i] for run in runs[2:]), 3) for i, key in enumerate(keys)}
        for name, runs in results.items()
    }
    print(to_json({"preset": preset, "precision": precision, "tokens": tokens, **found}))


if __name__ == "__main__":
    run_tool(main)
