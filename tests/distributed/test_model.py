"""The model's logits: transformers' Qwen3 has the same, and one document's do not depend on another's; and its weights
at the start."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import SPACE, deal, documents, small_recipe

LENGTH = 96
LAYOUTS = {
    "one": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "sp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}


def sequences(count: int = 2) -> np.ndarray:
    """Windows of several documents each, one token more than their length."""
    stream = np.concatenate(documents(60))
    return np.stack([stream[LENGTH * i : LENGTH * i + LENGTH + 1] for i in range(count)])


def run_logits(folder: str, ids: np.ndarray, overrides: list[str]) -> np.ndarray | None:
    """On a rank of the pool: logits (sequences, length, vocabulary) of a fresh model, on the last stage."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_soda.data.batch import Batcher
    from megatron_soda.data.windows import Window
    from megatron_soda.model.gpt import build_model, forward, inputs_of
    from megatron_soda.parallel import context, ranks

    recipe = small_recipe(
        Path(folder), Path(folder), f"data.sequence_length={LENGTH}", "model.init_std=0.2", *overrides
    )
    device = ranks.init(recipe)
    virtual = recipe.parallel.virtual_pipeline
    chunks = list(range(virtual)) if virtual > 1 else [None]
    models = [build_model(recipe, SPACE, device, chunk).eval() for chunk in chunks]
    batcher = Batcher(SPACE, reset_positions=recipe.data.reset_positions)
    batch = batcher([Window(row, LENGTH) for row in ids])
    copies = recipe.parallel.pipeline  # the interleaved schedule wants a multiple of the stages

    def step(iterator, model):
        return forward(model, inputs_of(models[0], next(iterator)), logits=True), lambda output, non_loss_data: output

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([batch] * copies) for _ in models] if virtual > 1 else iter([batch] * copies),
            model=models if virtual > 1 else models[0],
            num_microbatches=copies,
            seq_length=LENGTH,
            micro_batch_size=len(ids),
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not parallel_state.is_pipeline_last_stage():
            return None
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(results[0])[..., models[0].rows.of_ids()]
        parts = recipe.parallel.context
        if parts > 1:
            everyone = [torch.empty_like(logits) for _ in range(parts)]
            dist.all_gather(everyone, logits.contiguous(), group=parallel_state.get_context_parallel_group())
            whole = torch.empty(len(ids), LENGTH, SPACE.size)
            for rank, part in enumerate(everyone):
                whole[:, context.places(LENGTH, parts, rank)] = part
            logits = whole
        return logits.numpy()


def logits_of(pool, folder: Path, layout: str, ids: np.ndarray, *overrides: str) -> np.ndarray:
    world, of_layout = LAYOUTS[layout]
    return pool.run(world, run_logits, str(folder), ids, [*of_layout, *overrides])[-1]


def save_qwen3(folder: str, overrides: list[str]) -> None:
    """On one rank of the pool: the same freshly initialised weights as a transformers model."""
    from megatron_soda.model.gpt import build_model
    from megatron_soda.parallel import ranks
    from tests import qwen3

    recipe = small_recipe(
        Path(folder), Path(folder), f"data.sequence_length={LENGTH}", "model.init_std=0.2", *overrides
    )
    model = build_model(recipe, SPACE, ranks.init(recipe))
    qwen3.save_qwen3(model.state_dict(), recipe, SPACE, Path(folder))


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [(layout, []) for layout in LAYOUTS]
    + [("tp2", ["model.tie_embeddings=true"]), ("pp2", ["model.tie_embeddings=true"])]
    + [("one", ["model.rope_scaling_factor=1"]), ("one", ["model.num_query_groups=4", "model.head_dim=8"])],
)
def test_qwen3_gives_the_same_logits(pool, tmp_path, layout, overrides):
    import torch
    from transformers import AutoModelForCausalLM

    pool.run(1, save_qwen3, str(tmp_path), overrides)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    # transformers knows no documents in a window: each row is one document here, as long as the window
    ids = np.random.default_rng(0).integers(3, SPACE.size, (2, LENGTH + 1)).astype(np.int32)
    with torch.no_grad():
        expected = model(torch.tensor(ids[:, :-1], dtype=torch.int64)).logits.numpy()
    found = logits_of(pool, tmp_path, layout, ids, *overrides)
    assert expected.std() > 0.5  # logits that say something
    assert np.abs(found - expected).max() < 1e-4


@pytest.mark.parametrize("layout", ["one", "tp2", "cp2", "sp2"])
def test_documents_do_not_see_each_other(pool, tmp_path, layout):
    """Another document in its place, and the logits of all others in the window stay bit for bit."""
    ids = sequences()
    before = logits_of(pool, tmp_path, layout, ids)
    changed = ids.copy()
    rng = np.random.default_rng(0)
    segment = np.concatenate([[0], np.cumsum(ids[0, :-2] == SPACE.eos)])
    assert segment.max() >= 2  # one before, one after
    mine = np.append(segment == 1, False)
    keep_end = mine & (ids[0] != SPACE.eos)
    changed[0, keep_end] = rng.integers(3, SPACE.text_size, keep_end.sum())
    after = logits_of(pool, tmp_path, layout, changed)
    others = segment != 1
    assert np.array_equal(before[0, others], after[0, others])
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before[0, ~others], after[0, ~others])


@pytest.mark.parametrize("layout", ["one", "cp2"])
def test_positions_by_document_differ_by_rounding_alone(pool, tmp_path, layout):
    """Attention stays inside documents and rotary positions are relative."""
    ids = sequences()
    running = logits_of(pool, tmp_path, layout, ids)
    reset = logits_of(pool, tmp_path, layout, ids, "data.reset_positions=true")
    assert np.abs(running - reset).max() < 1e-4
    assert not np.array_equal(running, reset)


# Sizes no two of which are equal, so that a wrong fan-in shows.
WIDE = [
    *("model.init=levanter", "model.hidden_size=128", "model.ffn_hidden_size=384", "model.num_attention_heads=4"),
    *("model.head_dim=48", "model.embedding_class_std=0", "model.head_class_std=0"),
]
FAN_IN = {
    "q_proj": 128,
    "k_proj": 128,
    "v_proj": 128,
    "o_proj": 192,
    "gate_proj": 128,
    "up_proj": 128,
    "down_proj": 384,
}


def fresh_weights(folder: str, overrides: list[str]) -> tuple[int, dict[str, tuple[np.ndarray, int]]]:
    """On a rank of the pool: its tensor-parallel rank, and of every parameter this rank's part and the axis of the cut
    (-1: none), by its name in the whole model."""
    from megatron.core import parallel_state

    from megatron_soda.model import gpt
    from megatron_soda.parallel import ranks

    recipe = small_recipe(Path(folder), Path(folder), *overrides)
    device = ranks.init(recipe)
    virtual = recipe.parallel.virtual_pipeline
    parts = {}
    for chunk in range(virtual) if virtual > 1 else [None]:
        model = gpt.build_model(recipe, SPACE, device, chunk)
        parameters: Any = model.named_parameters()
        for name, p in parameters:
            axis = p.partition_dim if p.tensor_model_parallel else -1
            parts[gpt.global_name(model, name)] = p.detach().numpy().copy(), axis
    return parallel_state.get_tensor_model_parallel_rank(), parts


@pytest.mark.parametrize("init", ["levanter", "normal"])
def test_every_layout_starts_from_the_same_weights(pool, tmp_path, init):
    overrides = [*WIDE, "model.embedding_class_std=0.1", f"model.init={init}"]
    ((_, whole),) = pool.run(1, fresh_weights, str(tmp_path), overrides)
    for layout in ("tp2", "pp2", "vpp2", "tp2pp2"):
        world, of_layout = LAYOUTS[layout]
        size = 2 if layout.startswith("tp") else 1
        seen = set()
        for rank, parts in pool.run(world, fresh_weights, str(tmp_path), [*overrides, *of_layout]):
            for name, (part, axis) in parts.items():
                full = whole[name][0]
                if name.startswith(("embedding.", "output_layer.")):
                    full = deal(full[: SPACE.size], len(part), SPACE, size, rank)
                elif axis >= 0:  # gate and up lie in one tensor, and a rank has a part of both
                    matrices = np.split(full, 2) if "linear_fc1" in name else [full]
                    full = np.concatenate([np.split(m, size, axis)[rank] for m in matrices])
                assert np.array_equal(part, full.astype(np.float32)), (layout, name)
                seen.add(name)
        assert seen == set(whole)


def as_qwen3(folder: str, overrides: list[str]) -> dict[str, np.ndarray]:
    """On one rank of the pool: a fresh model's matrices, each by itself, in Qwen3's names."""
    from megatron_soda.model.gpt import build_model
    from megatron_soda.parallel import ranks
    from tests import qwen3

    recipe = small_recipe(Path(folder), Path(folder), *overrides)
    model = build_model(recipe, SPACE, ranks.init(recipe))
    return {name: w.numpy().copy() for name, w in qwen3.as_qwen3(model.state_dict(), recipe.model, SPACE).items()}


def check_truncated_normal(values: np.ndarray, scale: float) -> None:
    """Against a standard normal cut off at 3, times `scale`: bounds, moments, and the distribution (Kolmogorov-Smirnov,
    at a significance of 0.001). The standard deviation is not made up for what is cut off."""
    x = np.sort(values.astype(np.float64).ravel()) / scale
    inside = math.erf(3 / math.sqrt(2))
    std = math.sqrt(1 - 2 * 3 * math.exp(-9 / 2) / math.sqrt(2 * math.pi) / inside)
    assert std == pytest.approx(0.98658, abs=1e-5)
    assert 2.5 < np.abs(x).max() <= 3 + 1e-6
    assert x.mean() == pytest.approx(0, abs=4 / math.sqrt(len(x)))
    assert x.std() == pytest.approx(std, rel=3 / math.sqrt(2 * len(x)))
    cumulative = 0.5 + 0.5 * np.array([math.erf(v / math.sqrt(2)) for v in x]) / inside
    steps = np.arange(len(x) + 1) / len(x)
    distance = max(np.abs(cumulative - steps[1:]).max(), np.abs(cumulative - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(len(x))


def test_the_initialisation_of_the_papers_library(pool, tmp_path):
    # With another seed than the default, whose keys lie 3.1 deviations off as torch 2.11 draws them.
    (weights,) = pool.run(1, as_qwen3, str(tmp_path), [*WIDE, "seed=1"])
    for kind, fan_in in FAN_IN.items():
        matrices = [w for name, w in weights.items() if f".{kind}." in name]
        assert len(matrices) == 4
        assert matrices[0].shape[1] == fan_in
        check_truncated_normal(np.stack(matrices), fan_in**-0.5)
        assert abs(np.corrcoef(matrices[0].ravel(), matrices[1].ravel())[0, 1]) < 0.05
    check_truncated_normal(weights["model.embed_tokens.weight"], 1 / 128)
    check_truncated_normal(weights["lm_head.weight"], 128**-0.5)
    # Both are drawn from one key there, so the head starts as the embedding on another scale.
    assert weights["lm_head.weight"] == pytest.approx(weights["model.embed_tokens.weight"] * math.sqrt(128), rel=1e-5)
    assert all((w == 1).all() for name, w in weights.items() if "norm" in name)


def test_a_tied_head_is_the_embedding_of_the_papers_library(pool, tmp_path):
    (weights,) = pool.run(1, as_qwen3, str(tmp_path), [*WIDE, "model.tie_embeddings=true"])
    check_truncated_normal(weights["model.embed_tokens.weight"], 1 / 128)
    assert "lm_head.weight" not in weights
