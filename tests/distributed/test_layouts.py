"""Every layout trains the same model: losses, gradient norms, and what comes after a save and a load."""

import json
from pathlib import Path

import pytest

from tests.helpers import small_recipe

LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2"]),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "dp2": (2, []),
    "dp2_distributed": (2, ["parallel.distributed_optimizer=true"]),
    "tp2dp2_distributed": (4, ["parallel.tensor=2", "parallel.distributed_optimizer=true"]),
    "sp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "sp2pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "sp2cp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]),
    "cp2pp2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
    "cp2dp2_distributed": (4, ["parallel.context=2", "parallel.distributed_optimizer=true"]),
    "vpp2dp2_distributed": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.distributed_optimizer=true"],
    ),
    "vpp2sp2": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2", "parallel.sequence=true"],
    ),
}


def train(run: str, data: str, overrides: list[str], broken: str = "") -> None:
    """On a rank of the pool. `broken` names a guard to take out, to see that it is needed."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_soda.training import checkpoint, loop, optimizer

    kept = checkpoint.finish_load, DistributedOptimizer._set_main_param_and_optimizer_states
    try:
        if broken == "finish_load":
            checkpoint.finish_load = lambda _: None
        if broken == "set_states":
            DistributedOptimizer._set_main_param_and_optimizer_states = optimizer._original
        loop.train(small_recipe(Path(run), Path(data), *overrides))
    finally:
        checkpoint.finish_load, DistributedOptimizer._set_main_param_and_optimizer_states = kept


def metrics(run: Path) -> list[dict]:
    return [row for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


@pytest.fixture(scope="module")
def reference(pool, data, tmp_path_factory) -> Path:
    """20 straight steps on one process."""
    run = tmp_path_factory.mktemp("reference")
    pool.run(1, train, str(run), str(data), [])
    return run


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_and_gradient_norms(pool, data, reference, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    pool.run(world, train, str(tmp_path), str(data), overrides)
    expected, found = metrics(reference), metrics(tmp_path)
    assert len(found) == len(expected) == 20
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1  # it learns, so equal losses mean something
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-4)
        for name, value in a["nll"].items():
            assert b["nll"][name] == pytest.approx(value, abs=3e-5)


@pytest.mark.parametrize("layout", ["one", "tp2", "pp2", "dp2_distributed"])
def test_resume_is_bitwise(pool, data, tmp_path, layout):
    world, overrides = LAYOUTS.get(layout, (1, []))
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    pool.run(world, train, str(straight), str(data), overrides)
    stopped = [*overrides, "training.warmup_share=0", "training.decay_share=0"]
    flat = tmp_path / "flat"
    pool.run(world, train, str(flat), str(data), stopped)
    pool.run(world, train, str(halves), str(data), [*stopped, "training.steps=10"])
    pool.run(world, train, str(halves), str(data), stopped)
    assert losses(halves) == losses(flat)
    assert [row["grad_norm"] for row in metrics(halves)] == [row["grad_norm"] for row in metrics(flat)]
    assert losses(straight) != losses(flat)  # the schedule matters, so the comparison above is no accident


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("tp2", "one"),
        ("tp2dp2_distributed", "dp2_distributed"),
        ("dp2_distributed", "tp2dp2_distributed"),
        ("one", "pp2"),
    ],
)
def test_resume_at_another_layout(pool, data, reference, tmp_path, first, then):
    flat = ["training.warmup_share=0", "training.decay_share=0"]
    kind = ["parallel.distributed_optimizer=true"] if "distributed" in first else []
    straight = tmp_path / "straight"
    pool.run(1, train, str(straight), str(data), [*flat, *kind])
    run = tmp_path / "run"
    world, overrides = LAYOUTS.get(first, (1, []))
    pool.run(world, train, str(run), str(data), [*overrides, *flat, "training.steps=10"])
    world, overrides = LAYOUTS.get(then, (1, []))
    pool.run(world, train, str(run), str(data), [*overrides, *flat])
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)


@pytest.mark.parametrize("guard", ["finish_load", "set_states"])
def test_guards_are_needed(pool, data, tmp_path, guard):
    """Without each repair of optimizer.py, resuming under the distributed optimizer is wrong, or does not run."""
    flat = ["parallel.distributed_optimizer=true", "training.warmup_share=0", "training.decay_share=0"]
    straight, run = tmp_path / "straight", tmp_path / "run"
    pool.run(2, train, str(straight), str(data), flat)
    pool.run(2, train, str(run), str(data), [*flat, "training.steps=10"])
    try:
        pool.run(2, train, str(run), str(data), flat, guard)
    except RuntimeError:
        return
    assert losses(run)[:10] == losses(straight)[:10]
    assert losses(run)[10:] != pytest.approx(losses(straight)[10:], abs=1e-4)
