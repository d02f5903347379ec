"""Labels with weights of their own: the same loss and gradient at every layout, and that of float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.test_layouts import LAYOUTS
from tests.helpers import SPACE, documents, small_recipe

LENGTH = 32
TOKENS = np.concatenate(documents(60))


def take_steps(run: str, overrides: list[str], weighted: bool) -> Any:
    """On a rank of the pool: loss, gradient norm and weights of two steps; before the first, the loss in float64."""
    import torch

    from megatron_soda.data.windows import Window
    from megatron_soda.model.gpt import forward, inputs_of
    from megatron_soda.parallel import ranks
    from megatron_soda.training.step import Engine

    class Weighted:
        """A third of the labels count nothing, others up to double; every fifth window has no weights."""

        def __getitem__(self, sample: int) -> Window:
            at = sample * LENGTH % (len(TOKENS) - LENGTH)
            rng = np.random.default_rng(sample)
            own = (rng.random(LENGTH) * 2 * (rng.random(LENGTH) > 1 / 3)).astype(np.float32)
            return Window(TOKENS[at : at + LENGTH + 1], LENGTH, own if weighted and sample % 5 else None)

    recipe = small_recipe(Path(run), Path(run), "training.micro_batch_size=2", *overrides)
    engine = Engine(recipe, SPACE, ranks.init(recipe))
    alone, expected = torch.distributed.get_world_size() == 1, None
    if alone:
        batch = engine.batcher([Weighted()[i] for i in range(recipe.training.global_batch_size)])
        with torch.no_grad():
            model = engine.models[0]
            logits = forward(model, inputs_of(model, batch), logits=True)[..., : SPACE.size].double()
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none")
        weight = batch.loss_weight.flatten().double()
        expected = float((nll * weight).sum() / weight.sum()), float(weight.sum())
    steps = [engine.train_step(Weighted(), 8 * step, 1e-3) for step in range(2)]
    return expected, [(step.loss, step.grad_norm, float(step.sums[1].sum())) for step in steps]


def test_the_loss_is_that_of_float64(pool, tmp_path):
    ((expected, steps),) = pool.run(1, take_steps, str(tmp_path), [], True)
    loss, _, weight = steps[0]
    assert (loss, weight) == pytest.approx(expected, rel=1e-5)
    ((plain, _),) = pool.run(1, take_steps, str(tmp_path), [], False)
    assert plain[1] == 8 * LENGTH
    assert abs(loss - plain[0]) > 1e-3  # the weights say something


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2_distributed", "cp2"])
def test_the_same_at_every_layout(pool, tmp_path, layout):
    ((_, expected),) = pool.run(1, take_steps, str(tmp_path), [], True)
    world, overrides = LAYOUTS[layout]
    for _, found in pool.run(world, take_steps, str(tmp_path), overrides, True):
        for a, b in zip(expected, found, strict=True):
            assert b == pytest.approx(a, abs=1e-5, rel=1e-5)
