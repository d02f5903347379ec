"""AdamW and Cautious AdamW over 40 steps against numpy, at every way of cutting their state."""

import functools
import re
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import SPACE, deal, small_recipe

STEPS, PEAK, DECAY, BETA1, BETA2, EPSILON = 40, 1e-2, 0.1, 0.9, 0.95, 1e-16


def rate(step: int) -> float:
    return PEAK * min(1.0, (step + 1) / 8) * (1.0 if step < 24 else (STEPS - step) / 16)


@functools.cache
def draw(name: str, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    values = np.random.default_rng(zlib.crc32(f"{name}/{kind}".encode())).normal(size=shape) * 0.1
    return (values.astype(np.float32).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)  # fits bf16


def gradient(name: str, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """With a mean that stays, so that the moments say something; some steps are large enough to be clipped. The noise
    grows from row to row and differs between tensors, so the cautious mask keeps another share of each matrix."""
    large = 5.0 if step % 7 == 0 else 0.2
    rows = np.linspace(0.3, 3.0, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    noise = (1 + zlib.crc32(name.encode()) % 4) / 2 * rows
    return large * (noise * draw(name, str(step), shape) + draw(name, "mean", shape))


def matrices(name: str, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Of each matrix in a tensor: which rows are its own. The small recipe has 4 heads in 2 groups, of 16 each."""
    row = np.arange(shape[0])
    if name.endswith("linear_fc1.weight"):
        return {"gate": row < shape[0] // 2, "up": row >= shape[0] // 2}
    if not name.endswith("linear_qkv.weight"):
        return {"": row >= 0}
    place = row // 16 % 4  # in a query group: two queries, a key, a value
    return {"q": place < 2, "k": place == 2, "v": place == 3}


def expected(shapes: dict[str, tuple[int, ...]], cautious: str) -> dict[str, np.ndarray]:
    """All parameters after the steps, in float64, from the definition. `cautious`: "", "layer" or "stacked"."""
    of = {name: matrices(name, shape) for name, shape in shapes.items()}
    weights = {name: draw(name, "weight", shape) for name, shape in shapes.items()}
    first = {name: np.zeros(shape) for name, shape in shapes.items()}
    second = {name: np.zeros(shape) for name, shape in shapes.items()}
    for step in range(STEPS):
        gradients = {name: gradient(name, step, shape) for name, shape in shapes.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        updates, masks = {}, defaultdict(list)
        for name, g in gradients.items():
            g = g * min(1.0, 1.0 / (norm + 1e-6))
            first[name] = BETA1 * first[name] + (1 - BETA1) * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g**2
            update = first[name] / (1 - BETA1 ** (step + 1))
            update = update / (np.sqrt(second[name] / (1 - BETA2 ** (step + 1))) + EPSILON)
            updates[name] = update
            for part, own in of[name].items():
                masks[kind(name, part, cautious)].append((update * g > 0)[own].ravel())
                if cautious:
                    update[own] *= (update * g > 0)[own]
        for name, update in updates.items():
            decay = DECAY if update.ndim == 2 and not name.startswith("embedding.") else 0.0
            if cautious:
                decay *= rate(step) / PEAK
                for part, own in of[name].items():
                    update[own] /= np.concatenate(masks[kind(name, part, cautious)]).mean() + EPSILON
            weights[name] = weights[name] - rate(step) * (update + decay * weights[name])
    return weights


def kind(name: str, part: str, cautious: str) -> tuple[str, str]:
    """What the mean of the mask is taken over: a matrix, or all layers' matrices of that name."""
    return (re.sub(r"layers\.\d+", "layers", name) if cautious == "stacked" else name), part


def run_steps(folder: str, overrides: list[str], wanted: dict[str, np.ndarray] | None) -> Any:
    """On a rank of the pool: the largest difference of a parameter of this rank from what is wanted, and how many were
    compared; without anything wanted, the shapes of the whole model's parameters."""
    import torch
    from megatron.core import parallel_state

    from megatron_soda.model import gpt
    from megatron_soda.parallel import ranks
    from megatron_soda.training.step import Engine

    recipe = small_recipe(
        Path(folder), Path(folder), f"optimizer.weight_decay={DECAY}", f"optimizer.learning_rate={PEAK}",
        f"optimizer.beta1={BETA1}", f"optimizer.beta2={BETA2}", f"optimizer.epsilon={EPSILON}",
        "training.micro_batch_size=2", *overrides,
    )  # fmt: skip
    device = ranks.init(recipe)
    size, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()

    def named(model: Any):
        for name, parameter in model.named_parameters():
            name, shape = gpt.global_name(model, name), list(parameter.shape)
            if parameter.tensor_model_parallel:
                shape[parameter.partition_dim] *= size
            if name.startswith(("embedding.", "output_layer.")):
                shape[0] = SPACE.size
            yield name, parameter, tuple(shape)

    def cut(name: str, parameter: Any, whole: np.ndarray) -> torch.Tensor:
        full = torch.tensor(whole, dtype=torch.float32)
        if not parameter.tensor_model_parallel:
            return full
        axis, local = parameter.partition_dim, parameter.shape[parameter.partition_dim]
        if name.startswith(("embedding.", "output_layer.")):
            return torch.tensor(deal(whole, local, SPACE, size, rank), dtype=torch.float32)
        fused = full.chunk(2) if "linear_fc1" in name else (full,)  # a rank has a part of gate and one of up
        return torch.cat([matrix.chunk(size, axis)[rank] for matrix in fused])

    def initialise(model: Any, *_: Any) -> None:
        with torch.no_grad():
            for name, parameter, shape in named(model):
                parameter.copy_(cut(name, parameter, draw(name, "weight", shape)))

    kept, gpt.initialise = gpt.initialise, initialise
    try:
        engine = Engine(recipe, SPACE, device)
    finally:
        gpt.initialise = kept
    parameters = [entry for model in engine.models for entry in named(model)]
    if wanted is None:
        return {name: shape for name, _, shape in parameters}
    for step in range(STEPS):
        for name, parameter, shape in parameters:
            parameter.main_grad.copy_(cut(name, parameter, gradient(name, step, shape)))
        engine.optimizer.step(rate(step))
    half = recipe.precision.dtype == "bf16"
    worst = 0.0
    for name, parameter, _ in parameters:
        target = cut(name, parameter, wanted[name])
        difference = (parameter.detach().float().cpu() - target).abs()
        if half:  # the float32 weights behind are right if the bf16 ones are theirs, rounded
            difference = (difference - target.abs() / 256).clamp(min=0)
        worst = max(worst, float(difference.max()))
    return worst, len(parameters)


@pytest.fixture(scope="module")
def wanted(pool, tmp_path_factory):
    @functools.cache
    def weights(mask: str, tied: bool) -> dict[str, np.ndarray]:
        settings = [f"model.tie_embeddings={str(tied).lower()}"]
        (shapes,) = pool.run(1, run_steps, str(tmp_path_factory.mktemp("shapes")), settings, None)
        return expected(shapes, mask)

    return weights


@pytest.mark.parametrize("optimizer", ["adamw", "cautious layer", "cautious stacked"])
@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (1, ["precision.dtype=bf16"]),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (2, ["parallel.pipeline=2", "model.tie_embeddings=true"]),
        (2, ["parallel.distributed_optimizer=true"]),
        (2, ["parallel.distributed_optimizer=true", "precision.dtype=bf16"]),
        (4, ["parallel.distributed_optimizer=true"]),
        (4, ["parallel.distributed_optimizer=true", "parallel.tensor=2"]),
        (4, ["parallel.distributed_optimizer=true", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    ],
    ids=["one", "bf16", "tp2", "pp2", "pp2-tied", "dist", "dist-bf16", "dist4", "dist-tp2", "dist-vpp2"],
)
def test_against_numpy(pool, wanted, tmp_path, optimizer, world, overrides):
    name, _, mask = optimizer.partition(" ")
    of_mask = [f"optimizer.cautious_mask={mask}"] if mask else []
    settings = [f"optimizer.name={name}", *of_mask, *overrides]
    target = wanted(mask, "model.tie_embeddings=true" in overrides)
    for worst, count in pool.run(world, run_steps, str(tmp_path), settings, target):
        assert count > 5
        assert worst < 2e-5


def test_the_rows_of_a_piece():
    """Any piece of a tensor is runs of equal rows: each element is in one of them, with the matrix of its row."""
    import torch

    from megatron_soda.training.cautious import rows, runs_of

    matrix = torch.tensor([4, 4, 7, 5, 5])
    for length in (1, 3):
        of_element = matrix.repeat_interleave(length)
        for start in range(len(of_element)):
            for stop in range(start + 1, len(of_element) + 1):
                piece = torch.arange(start, stop)
                runs = list(rows(piece, runs_of(matrix, length, start, stop)))
                assert torch.equal(torch.cat([values.ravel() for values, _ in runs]), piece)
                for values, of_row in runs:
                    assert torch.equal(of_element[values], of_row[:, None].expand_as(values))


@pytest.fixture
def modules(monkeypatch):
    """Says which optional packages there are, on a machine with CUDA."""
    import sys
    import types

    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def install(**present: bool) -> None:
        class FusedAdam:
            pass

        for name, there in present.items():
            for part in ("", ".optimizers", ".pytorch", ".pytorch.optimizers"):
                module = types.ModuleType(name + part)
                module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name + part, module if there else None)

    return install


@pytest.mark.parametrize(
    ("present", "name"),
    [
        ({"transformer_engine": True, "apex": True, "amp_C": True}, "Transformer Engine's FusedAdam"),
        ({"transformer_engine": False, "apex": True, "amp_C": True}, "apex's FusedAdam"),
        (
            {"transformer_engine": False, "apex": True, "amp_C": False},
            "torch's AdamW",
        ),  # PyPI's apex is another project
        ({"transformer_engine": False, "apex": False, "amp_C": False}, "torch's AdamW"),
    ],
)
def test_whose_adam(modules, present, name):
    from megatron_soda.training.optimizer import choose_adam

    modules(**present)
    found, _, is_torch = choose_adam(cautious=False)
    assert found == name
    assert is_torch == name.startswith("torch")
    assert choose_adam(cautious=True)[0] == "Cautious AdamW of megatron_soda"


def test_the_choice_is_logged(pool, data, tmp_path):
    import json

    from tests.distributed.test_layouts import train

    pool.run(1, train, str(tmp_path), str(data), ["training.steps=1", "optimizer.name=cautious"])
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["optimizer"] == "Cautious AdamW of megatron_soda"
    assert environment["layers"] == "local"
    assert environment["speed"]["fuse_swiglu"] == environment["speed"]["fuse_rope"] == "torch"
    assert not environment["speed"]["overlap_gradients"]
    with pytest.raises(RuntimeError, match=r"precision\.dtype=fp8 needs Transformer Engine"):
        pool.run(1, train, str(tmp_path / "x"), str(data), ["precision.dtype=fp8"])
