"""Every layout trains the same model: losses, gradient norms, and what comes after a save and a load."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import small_recipe

SMALL = ["training.micro_batch_size=2"]  # several micro-batches a step: gradients add up, pipelines get going
LAYOUTS = {
    "tp2": (2, ["parallel.tensor=2"]),
    "pp2": (2, ["parallel.pipeline=2", *SMALL]),
    "tp2pp2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
    "dp2": (2, []),
    "dp2_distributed": (2, ["parallel.distributed_optimizer=true", *SMALL]),
    "tp2dp2_distributed": (4, ["parallel.tensor=2", "parallel.distributed_optimizer=true"]),
    "dp2_overlap": (2, ["parallel.overlap_gradients=true", *SMALL]),
    "dp2_distributed_overlap": (2, ["parallel.overlap_gradients=true", "parallel.distributed_optimizer=true", *SMALL]),
    "tp2dp2_overlap": (4, ["parallel.overlap_gradients=true", "parallel.tensor=2", *SMALL]),
    "dp2_gather": (2, ["parallel.overlap_parameters=true", "parallel.distributed_optimizer=true", *SMALL]),
    "tp2dp2_gather": (
        4,
        ["parallel.overlap_parameters=true", "parallel.distributed_optimizer=true", "parallel.tensor=2", *SMALL],
    ),
    "cp2_overlap": (2, ["parallel.overlap_gradients=true", "parallel.context=2"]),
    "unfused": (1, ["training.fuse_swiglu=false", "training.fuse_rope=false"]),
    "sp2": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "cp2": (2, ["parallel.context=2"]),
    "vpp2": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2", *SMALL]),
    "sp2pp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=2"]),
    "sp2cp2": (4, ["parallel.tensor=2", "parallel.sequence=true", "parallel.context=2"]),
    "cp2pp2": (4, ["parallel.context=2", "parallel.pipeline=2"]),
    "cp2dp2_distributed": (4, ["parallel.context=2", "parallel.distributed_optimizer=true"]),
    "vpp2dp2_distributed": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.distributed_optimizer=true", *SMALL],
    ),
    "vpp2sp2": (
        4,
        ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "parallel.tensor=2", "parallel.sequence=true", *SMALL],
    ),
}


def train(run: str, data: str, overrides: list[str], broken: str = "") -> None:
    """On a rank of the pool. `broken` names a guard to take out, to see that it is needed."""
    import contextlib
    import dataclasses
    import functools
    from unittest import mock

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    from megatron_soda.model import gpt
    from megatron_soda.training import checkpoint, optimizer, step, trainer

    with contextlib.ExitStack() as patches:
        small = functools.partial(step.DistributedDataParallelConfig, bucket_size=4000)  # so that the head has its own
        if {"parallel.overlap_gradients=true", "parallel.overlap_parameters=true"} & set(overrides):
            patches.enter_context(mock.patch.object(step, "DistributedDataParallelConfig", small))
        if broken == "finish_load":
            patches.enter_context(mock.patch.object(checkpoint, "finish_load"))
        if broken == "keep_padding":
            patches.enter_context(mock.patch.object(optimizer, "keep_padding"))
        if broken == "set_states":
            original = optimizer._original
            patches.enter_context(
                mock.patch.object(DistributedOptimizer, "_set_main_param_and_optimizer_states", original)
            )
        settings, loss = gpt.transformer_config, step.Engine._loss
        if broken == "p2p":  # batched messages in the interleaved schedule
            changes = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
            patches.enter_context(
                mock.patch.object(gpt, "transformer_config", lambda r: dataclasses.replace(settings(r), **changes))
            )
        if broken == "rank_mean":  # each rank's mean in the place of sums that are divided by the global weight

            def mean_loss(self, model, batch, hidden):
                total, _, sums = loss(self, model, batch, hidden)
                return total / sums[1].sum(), sums

            def finalize(self, model, _count, pg_collection=None, **kwargs):
                step.finalize_model_grads(model, None, pg_collection, **kwargs)

            changes = {"calculate_per_token_loss": False}
            patches.enter_context(
                mock.patch.object(gpt, "transformer_config", lambda r: dataclasses.replace(settings(r), **changes))
            )
            patches.enter_context(mock.patch.object(step.Engine, "_loss", mean_loss))
            patches.enter_context(mock.patch.object(step.Engine, "_finalize", finalize))
        trainer.train(small_recipe(Path(run), Path(data), *overrides))


def metrics(run: Path) -> list[dict]:
    return [row for line in (run / "metrics.jsonl").read_text().splitlines() if "loss" in (row := json.loads(line))]


def validated(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["valid_loss"] for row in rows if "valid_loss" in row]


def same(expected: list[dict], found: list[dict]) -> bool:
    assert len(found) == len(expected)
    for a, b in zip(expected, found, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], abs=1e-4)
        for name, value in a["nll"].items():
            assert b["nll"][name] == pytest.approx(value, abs=3e-5)
    return True


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run)]


FLAT = ["schedule.warmup_share=0", "schedule.decay_share=0", "optimizer.learning_rate=2e-3"]
CAUTIOUS = ["optimizer.name=cautious"]
BF16 = ["precision.dtype=bf16"]
LEGAL = ["training.head_rows=legal"]
TIED = ["model.tie_embeddings=true"]
LONG = ["training.steps=20"]  # with --full


@pytest.fixture(scope="module")
def straight(pool, data, tmp_path_factory) -> Callable[..., Path]:
    """Runs at a flat rate, by layout and settings: each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(layout: str = "one", extra: list[str] | None = None) -> Path:
        key = (layout, *(extra or []))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("straight")
            world, overrides = LAYOUTS.get(layout, (1, []))
            pool.run(world, train, str(made[key]), str(data), [*overrides, *FLAT, *(extra or [])])
        return made[key]

    return run


# Of four ranks, mixtures of what others show two by two.
FULL = ("sp2pp2", "cp2pp2", "vpp2dp2_distributed", "tp2dp2_overlap", "tp2dp2_gather")


@pytest.mark.parametrize(
    ("layout", "extra"),
    [pytest.param(name, LONG, marks=pytest.mark.full) if name in FULL else (name, []) for name in LAYOUTS],
)
def test_same_losses_and_gradient_norms(straight, layout, extra):
    expected, found = metrics(straight("one", extra)), metrics(straight(layout, extra))
    assert len(found) == (20 if extra else 6)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.1  # it learns, so equal losses mean something
    assert same(expected, found)
    assert validated(straight(layout, extra)) == pytest.approx(validated(straight("one", extra)), abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        ("one", []),
        ("pp2", []),
        ("dp2_distributed", []),
        ("cp2", []),
        ("tp2", CAUTIOUS),
        ("vpp2", CAUTIOUS),
        ("dp2_distributed", CAUTIOUS),
        ("dp2_overlap", []),
        ("dp2_distributed_overlap", CAUTIOUS),
        ("dp2_gather", []),
        pytest.param("tp2dp2_gather", TIED, marks=pytest.mark.full),
        ("sp2", BF16),
        ("sp2", LEGAL),
        ("tp2dp2_distributed", LEGAL),
    ],
)
def test_resume_is_bitwise(pool, data, straight, tmp_path, layout, extra):
    world, overrides = LAYOUTS.get(layout, (1, []))
    for steps in (3, 6):
        pool.run(world, train, str(tmp_path), str(data), [*overrides, *FLAT, *extra, f"training.steps={steps}"])
    expected = straight(layout, extra)
    assert losses(tmp_path) == losses(expected)
    assert [row["grad_norm"] for row in metrics(tmp_path)] == [row["grad_norm"] for row in metrics(expected)]


@pytest.mark.parametrize(
    ("first", "then", "extra"),
    [
        ("tp2", "one", []),
        ("one", "pp2", []),
        ("vpp2", "sp2", []),
        ("sp2cp2", "vpp2", []),
        ("tp2dp2_distributed", "dp2_distributed", []),
        ("dp2_distributed", "tp2dp2_distributed", []),
        ("dp2_distributed_overlap", "dp2_distributed", []),
        pytest.param("dp2_gather", "dp2_distributed", [], marks=pytest.mark.full),
        ("unfused", "one", []),
        pytest.param("cp2dp2_distributed", "vpp2dp2_distributed", [], marks=pytest.mark.full),
        ("tp2", "one", CAUTIOUS),
        pytest.param("vpp2dp2_distributed", "dp2_distributed", CAUTIOUS, marks=pytest.mark.full),
    ],
)
def test_resume_at_another_layout(pool, data, straight, tmp_path, first, then, extra):
    for layout, steps in ((first, 3), (then, 6)):
        world, overrides = LAYOUTS.get(layout, (1, []))
        pool.run(world, train, str(tmp_path), str(data), [*overrides, *FLAT, *extra, f"training.steps={steps}"])
    assert losses(tmp_path) == pytest.approx(losses(straight("one", extra)), abs=1e-5)


@pytest.mark.parametrize(
    ("layout", "extra"), [("tp2pp2", []), pytest.param("cp2dp2_distributed", LONG, marks=pytest.mark.full)]
)
def test_the_cautious_optimizer_is_the_same_at_every_layout(straight, layout, extra):
    """It applies an element's update in full or not at all, depending on a sign: rounding shows after some steps."""
    found, expected = (losses(straight(name, [*CAUTIOUS, *extra])) for name in (layout, "one"))
    assert found == pytest.approx(expected, abs=1e-4)
    assert found[:4] == pytest.approx(expected[:4], abs=1e-5)


@pytest.mark.parametrize(
    ("guard", "layout"),
    [
        ("finish_load", "dp2_distributed"),
        ("set_states", "dp2_distributed"),
        ("keep_padding", "dp2_distributed_overlap"),
    ],
)
def test_repairs_of_the_distributed_optimizer_are_needed(pool, data, straight, tmp_path, guard, layout):
    """Without each repair of optimizer.py, resuming under the distributed optimizer is wrong, or does not run."""
    world, overrides = LAYOUTS[layout]
    pool.run(world, train, str(tmp_path), str(data), [*overrides, *FLAT, "training.steps=3"], guard)
    try:
        pool.run(world, train, str(tmp_path), str(data), [*overrides, *FLAT], guard)
    except RuntimeError:
        if guard == "keep_padding":  # without it resuming does run
            raise
        return
    expected, found = losses(straight(layout)), losses(tmp_path)
    assert found[:3] == expected[:3]
    assert found[3:] != pytest.approx(expected[3:], abs=1e-4)


def reductions(run: str, data: str, overrides: list[str]) -> list[str]:
    """On a rank of the pool: what happens in the last step, when gradients begin to be reduced and backward passes
    end."""
    from unittest import mock

    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.pipeline_parallel import schedules

    from megatron_soda.training import step

    happened: list[str] = []
    begin, backward, take = _ParamAndGradBucketGroup.start_grad_sync, schedules.backward_step, step.Engine.train_step

    def begins(self, *args, **kwargs):
        happened.append("reduces")
        return begin(self, *args, **kwargs)

    def ends(*args, **kwargs):
        result = backward(*args, **kwargs)
        happened.append("backward")
        return result

    def takes(self, *args):
        happened.clear()
        return take(self, *args)

    with (
        mock.patch.object(_ParamAndGradBucketGroup, "start_grad_sync", begins),
        mock.patch.object(schedules, "backward_step", ends),
        mock.patch.object(step.Engine, "train_step", takes),
    ):
        train(run, data, [*overrides, "training.steps=2"])
    return happened


@pytest.mark.parametrize("layout", ["dp2_distributed_overlap", "cp2_overlap"])
def test_gradients_are_reduced_during_the_last_backward_pass_alone(pool, data, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    for happened in pool.run(world, reductions, str(tmp_path), str(data), overrides):
        assert happened[0] == happened[-1] == "backward"
        assert happened.count("backward") == 2  # micro-batches
        assert happened.count("reduces") > 3


def fused_calls(run: str, data: str, overrides: list[str]) -> list[bool]:
    """On a rank of the pool: are the fused functions called?"""
    from unittest import mock

    import megatron.core.models.common.embeddings.rope_utils as megatron_rope

    from megatron_soda.model import fused

    rope = "fused_apply_rotary_pos_emb"
    with (
        mock.patch.object(fused, "swiglu", wraps=fused.swiglu) as swiglu,
        mock.patch.object(megatron_rope, rope, wraps=getattr(megatron_rope, rope)) as rotate,
    ):
        train(run, data, [*overrides, "training.steps=1"])
    return [swiglu.called, rotate.called]


@pytest.mark.parametrize(("layout", "called"), [("one", True), ("unfused", False)])
def test_functions_are_fused_unless_they_are_not_to_be(pool, data, tmp_path, layout, called):
    world, overrides = LAYOUTS.get(layout, (1, []))
    assert pool.run(world, fused_calls, str(tmp_path), str(data), overrides) == [[called, called]]


def gathers(run: str, data: str, overrides: list[str]) -> tuple[list[str], list[list[float]]]:
    """On a rank of the pool: what happens in the second step, when parameters begin to be gathered and parts of the
    model to compute; and sums of the parameters before and after they are checked for a checkpoint."""
    from unittest import mock

    import torch
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from megatron_soda.training import step

    happened: list[str] = []
    sums: list[list[float]] = []
    gather, layer, loss = _ParamAndGradBucketGroup.start_param_sync, TransformerLayer.forward, step.Engine._loss
    take, check = step.Engine.train_step, step.Engine.is_finite

    def noting(what, original):
        def call(*args, **kwargs):
            happened.append(what)
            return original(*args, **kwargs)

        return call

    def takes(self, *args):
        happened.clear()
        result = take(self, *args)
        sums.append([float(p.double().sum()) for p in self.models[0].parameters()])
        return result

    def checks(self):
        finite = check(self)
        assert all(group.param_gather_handle is None for group in self.ddp[0].bucket_groups)  # none is on its way
        sums.append([float(p.double().sum()) for p in self.models[0].parameters()])
        return finite

    with (
        mock.patch.object(_ParamAndGradBucketGroup, "start_param_sync", noting("gathers", gather)),
        mock.patch.object(TransformerLayer, "forward", noting("layer", layer)),
        mock.patch.object(step.Engine, "_loss", noting("head", loss)),
        mock.patch.object(step.Engine, "train_step", takes),
        mock.patch.object(step.Engine, "is_finite", checks),
        mock.patch.object(step.Engine, "validate", lambda self, *_: torch.ones(2, len(self.space.class_names))),
    ):
        train(run, data, [*overrides, "training.steps=2"])
        return happened, sums[-2:]


def test_parameters_are_gathered_during_the_first_forward_pass_alone(pool, data, tmp_path):
    """And before they are read for a checkpoint."""
    world, overrides = LAYOUTS["dp2_gather"]
    found = pool.run(world, gathers, str(tmp_path), str(data), overrides)
    for happened, _ in found:
        first, last = (at for at, what in enumerate(happened) if what == "head")
        assert happened[:first].count("layer") == 4
        assert happened[happened.index("layer") : first].count("gathers") > 3
        assert happened[first + 1 : last] == ["layer"] * 4
    (_, one), (_, other) = found
    assert one[0] != other[0]  # after a step, each rank has its own share of the new ones
    assert one[1] == other[1]


def test_separate_messages_are_needed_in_the_interleaved_schedule(pool, data, straight, tmp_path):
    """Batched, they are mixed up between two stages: no error, but other gradients."""
    world, overrides = LAYOUTS["vpp2"]
    pool.run(world, train, str(tmp_path), str(data), [*overrides, "training.steps=2"], "p2p")
    assert metrics(tmp_path)[0]["grad_norm"] != pytest.approx(metrics(straight())[0]["grad_norm"], rel=0.01)


def test_means_by_rank_are_noticed_under_context_parallelism(pool, data, tmp_path):
    """megatron-core multiplies such a loss by the context-parallel size. That doubles gradients, which Adam and
    clipping hide. The head, which has taken its gradient already, sees that it is to be scaled."""
    world, overrides = LAYOUTS["cp2"]
    with pytest.raises(RuntimeError, match="cannot be scaled"):
        pool.run(world, train, str(tmp_path), str(data), [*overrides, "training.steps=2"], "rank_mean")


WEIGHTS = ["training.loss_weights={text: 0.5, semantic: 2, acoustic_1: 0}"]


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ["training.micro_batch_size=1"]),
        (2, ["training.micro_batch_size=1"]),
        (2, ["parallel.context=2", "training.micro_batch_size=2"]),
        (2, ["parallel.pipeline=2", "training.micro_batch_size=2", "training.recompute=true"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "training.recompute=true"]),
    ],
    ids=["one", "dp2", "cp2", "pp2-recompute", "sp2-recompute"],
)
def test_how_a_batch_is_split_changes_nothing(pool, data, weighted, tmp_path, world, overrides):
    """Nor do weights by class, whose sums differ between micro-batches: they are divided by the sum over all."""
    pool.run(world, train, str(tmp_path), str(data), [*WEIGHTS, *overrides])
    assert same(metrics(weighted), metrics(tmp_path))
    assert "acoustic_1" not in metrics(tmp_path)[0]["nll"]


@pytest.fixture(scope="module")
def weighted(pool, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("weighted")
    pool.run(1, train, str(run), str(data), WEIGHTS)
    return run


def test_validation_is_the_same_at_every_layout(pool, data, tmp_path):
    """Over windows that fill no whole number of micro-batches, too."""
    found = []
    for index, (world, overrides) in enumerate([(1, []), (2, []), LAYOUTS["vpp2"]]):
        run = tmp_path / str(index)
        extra = ["training.valid_windows=3", "training.valid_every=1", "training.steps=1"]
        pool.run(world, train, str(run), str(data), [*overrides, *extra])
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        found.append(next(row["valid_loss"] for row in rows if "valid_loss" in row))
    assert found[1:] == pytest.approx(found[:1] * 2, abs=1e-5)


@pytest.mark.parametrize("layout", ["one", "dp2_distributed", "sp2", "pp2"])
def test_bf16_stays_near_fp32(straight, layout):
    """With float32 master weights; at several layouts they agree better than with float32."""
    found, expected = losses(straight(layout, BF16)), losses(straight())
    assert found == pytest.approx(expected, abs=0.02)
    assert found != expected


@pytest.mark.parametrize("optimizer", ["adamw", "cautious"])
def test_a_rate_that_makes_nan_ends_with_its_name(pool, data, tmp_path, optimizer):
    with pytest.raises(RuntimeError, match=r"step \d+: loss (nan|inf).*a lower optimizer\.learning_rate"):
        pool.run(
            1, train, str(tmp_path), str(data),
            ["optimizer.learning_rate=1e30", f"optimizer.name={optimizer}", "optimizer.clip_grad=0"],
        )  # fmt: skip
