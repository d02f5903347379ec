"""The model's logits: transformers' Qwen3 has the same, and one document's do not depend on another's."""

from pathlib import Path

import numpy as np
import pytest

from tests.helpers import SPACE, documents, small_recipe

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
    from megatron_soda.model.gpt import build_model, forward
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
        return forward(model, next(iterator), recipe, logits=True), lambda output, non_loss_data: output

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
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(results[0])[..., : SPACE.size]
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
    from megatron_soda.hf.export import write_model
    from megatron_soda.model.gpt import build_model
    from megatron_soda.parallel import ranks

    recipe = small_recipe(
        Path(folder), Path(folder), f"data.sequence_length={LENGTH}", "model.init_std=0.2", *overrides
    )
    model = build_model(recipe, SPACE, ranks.init(recipe))
    write_model(model.state_dict(), recipe, SPACE, Path(folder))


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
