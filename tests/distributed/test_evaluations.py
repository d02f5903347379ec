"""Evaluation while training gives what `soda evaluate` gives for the checkpoint, at any layout, and changes no step."""

import functools
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_soda.evaluation.run import evaluate
from megatron_soda.evaluation.suite import figures_of
from megatron_soda.files import read_json, write_json
from megatron_soda.registry import SUITES
from tests.distributed.test_export import real_text_data  # noqa: F401  a fixture
from tests.distributed.test_layouts import metrics, train
from tests.exported import FakeCodec
from tests.helpers import small_recipe

LONG = 900  # seconds: new processes start slowly on a busy machine
EVERY = ["evaluate.every=3", "evaluate.documents=6"]
LAYOUTS = {"one": (1, []), "tp2": (2, ["parallel.tensor=2"])}  # few: every measurement is a new process


@pytest.fixture(scope="module")
def data(real_text_data, tmp_path_factory) -> Path:  # noqa: F811
    from megatron_soda.codecs.description import CodecDescription

    folder = tmp_path_factory.mktemp("described") / "data"
    shutil.copytree(real_text_data, folder)
    write_json(folder / "codec.json", CodecDescription.of(FakeCodec(), {"spec": "embedded"}).to_dict())
    return folder


@pytest.fixture(scope="module")
def evaluated(pool, data, tmp_path_factory) -> Callable[[str], Path]:
    """A run at a layout, evaluated twice."""

    @functools.cache
    def run_at(layout: str) -> Path:
        world, overrides = LAYOUTS[layout]
        run = tmp_path_factory.mktemp(layout)
        pool.run(world, train, str(run), str(data), [*overrides, *EVERY], timeout=LONG)
        return run

    return run_at


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["evaluation"] for line in lines if "evaluation" in line}


def export_of(run: str, data: str, checkpoint: str, to: str) -> None:
    """On a rank of the pool."""
    from megatron_soda.hf.export import export

    export(small_recipe(Path(run), Path(data)), Path(checkpoint), Path(to))


def figures(result: dict) -> dict[str, float]:
    return figures_of(SUITES["nll"], result["nll"])


def test_it_is_what_evaluate_says_of_the_checkpoint(pool, data, evaluated, tmp_path):
    run = evaluated("tp2")
    assert list(evaluations(run)) == [3, 6]
    for step, found in evaluations(run).items():
        name, to = f"step_{step:08d}", tmp_path / f"{step}"
        pool.run(1, export_of, str(tmp_path / "run"), str(data), str(run / "checkpoints" / name), str(to))
        result = evaluate(small_recipe(tmp_path / "run", data, "evaluate.suite=[nll]", "evaluate.documents=6"), to)
        assert found == figures(result)
        assert found == figures(read_json(run / "evaluations" / name / "eval.json"))
        assert not [path for path in (run / "evaluations" / name).rglob("*") if "safetensors" in path.name]
    assert evaluations(run)[3] != evaluations(run)[6]


@pytest.mark.full
def test_it_is_the_same_at_every_layout(evaluated):
    expected = evaluations(evaluated("one"))
    for run in map(evaluated, LAYOUTS):
        for step, found in evaluations(run).items():
            assert found == pytest.approx(expected[step], abs=1e-5)


@pytest.mark.parametrize("layout", [pytest.param("one", marks=pytest.mark.full), "tp2"])
def test_no_step_is_another_for_it(pool, data, evaluated, tmp_path, layout):
    world, overrides = LAYOUTS[layout]
    pool.run(world, train, str(tmp_path), str(data), overrides)
    for expected, found in zip(metrics(tmp_path), metrics(evaluated(layout)), strict=True):
        for key in ("loss", "grad_norm", "nll"):
            assert found[key] == expected[key]


def train_unchecked(run: str, data: str, overrides: list[str]) -> None:
    """On a rank of the pool: a training whose suites are known to be suitable."""
    from unittest import mock

    from megatron_soda.training import trainer

    with mock.patch.object(trainer, "check_suites"):
        trainer.train(small_recipe(Path(run), Path(data), *overrides))


def stopped(run: str, data: str, overrides: list[str]) -> list[int | None]:
    """On a rank of the pool: the last rank is asked to stop while the checkpoint of step 3 is measured, which would
    never end. Returns how the processes that measured it ended."""
    import subprocess
    import sys
    from unittest import mock

    import torch.distributed as dist

    from megatron_soda.training import evaluations, trainer

    started = []

    def endless(*_: object) -> subprocess.Popen:
        started.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1e6)"]))
        return started[-1]

    class Asked(evaluations.Evaluation):
        def __enter__(self):
            if dist.get_rank() == dist.get_world_size() - 1:
                mock.patch("megatron_soda.training.stop.Stop.asked", True).start()
            return super().__enter__()

    try:
        with (
            mock.patch.object(trainer, "check_suites"),
            mock.patch.object(evaluations, "_start", endless),
            mock.patch.object(trainer, "Evaluation", Asked),
        ):
            assert not trainer.train(small_recipe(Path(run), Path(data), *overrides))
    finally:
        mock.patch.stopall()
    return [process.returncode for process in started]


@pytest.mark.full
def test_a_stop_ends_it_and_it_is_made_up_for(pool, data, evaluated, tmp_path):
    world, overrides = LAYOUTS["tp2"]
    arguments = str(tmp_path), str(data), [*overrides, *EVERY]
    assert pool.run(world, stopped, *arguments, timeout=LONG) == [[-signal.SIGKILL], []]
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["step_00000003"]
    assert evaluations(tmp_path) == {}
    pool.run(world, train_unchecked, *arguments, timeout=LONG)
    assert evaluations(tmp_path) == evaluations(evaluated("tp2"))


@pytest.mark.full
def test_a_resumed_run_measures_what_is_owed(pool, data, evaluated, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(evaluated("one"), run)
    results = [run / "evaluations" / f"step_{step:08d}" / "eval.json" for step in (3, 6)]
    times = [path.stat().st_mtime_ns for path in results]
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    for kill in (False, True):  # then: as if the run had been killed while its last checkpoint was measured
        if kill:
            lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
            assert "evaluation" in lines.pop()
            (run / "metrics.jsonl").write_text("".join(lines))
        pool.run(1, train_unchecked, str(run), str(data), EVERY, timeout=LONG)
        assert evaluations(run) == evaluations(evaluated("one"))
        before, times = times, [path.stat().st_mtime_ns for path in results]
        assert times[0] == before[0]
        assert times[1] > before[1]
    pool.run(1, train_unchecked, str(run), str(data), EVERY, timeout=LONG)
    assert [path.stat().st_mtime_ns for path in results] == times


@pytest.mark.full
def test_one_that_fails_is_told_of_and_training_goes_on(pool, data, evaluated, tmp_path):
    run = tmp_path / "run"
    said = pool.run(1, failing, str(run), str(data), timeout=LONG)[0]
    assert "step 6 could not be evaluated, training goes on: " in said
    assert f"{run}/checkpoints/step_00000006" in said
    assert evaluations(run) == {6: {}}
    assert len(metrics(run)) == len(metrics(evaluated("one")))


def failing(run: str, data: str) -> str:
    """On a rank of the pool: the checkpoint is gone when it is to be measured. Returns the warnings."""
    from unittest import mock

    from megatron_soda.log import log
    from megatron_soda.training import evaluations, trainer

    recipe, said, start = small_recipe(Path(run), Path(data), "evaluate.every=6"), [], evaluations._start

    def without(arguments, output):
        (Path(arguments[1]) / "manifest.json").write_text("{}")
        return start(arguments, output)

    with (
        mock.patch.object(trainer, "check_suites"),
        mock.patch.object(evaluations, "_start", without),
        mock.patch.object(log, "warning", said.append),
    ):
        trainer.train(recipe)
    return "\n".join(said)


def test_what_cannot_be_measured_is_refused_before_the_first_step(pool, data, tmp_path):
    with pytest.raises(RuntimeError, match=r"evaluate\.during_training=\[nll,gain\]: .*test\.parquet: no such file"):
        pool.run(
            1,
            train,
            str(tmp_path),
            str(data),
            ["evaluate.every=3", "evaluate.during_training=[nll,gain]"],
            timeout=LONG,
        )
    assert not (tmp_path / "metrics.jsonl").exists()
    assert "test.parquet" in (tmp_path / "evaluations" / "check.txt").read_text()


def test_soda_validate_refuses_it_too(data, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from megatron_soda.cli import app

    monkeypatch.setattr("megatron_soda.data.validate.validate", lambda *_: True)  # these stores have duplicates
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{path: {data}, sequence_length: 32}}\ncheckpoint: {{save_every: 3}}\n")
    for suite in ("nll", "gain"):
        done = CliRunner().invoke(app, ["validate", str(recipe), "evaluate.every=3", f"during_training=[{suite}]"])
        if suite == "nll":
            assert done.exit_code == 0, done.output
        else:
            assert "evaluate.during_training=[gain]" in str(done.exception)
