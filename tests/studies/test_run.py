"""A study's runs: done once, resumed, named when they fail, and the same in a shared process as alone."""

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_soda import cli
from megatron_soda.config import load_recipe, save_recipe
from megatron_soda.errors import SodaError
from megatron_soda.files import locked
from megatron_soda.isoflop.plan import Plan, make_plan
from megatron_soda.isoflop.results import read_results
from megatron_soda.isoflop.study import load_study
from megatron_soda.model.size import training_tokens
from megatron_soda.studies import records
from megatron_soda.studies.records import CLAIMS, RESULT, collect, recipe_hash, result_of, state_of
from megatron_soda.studies.run import run_study
from tests.forked import forked
from tests.helpers import small_recipe, write_data

ROOT = Path(__file__).resolve().parents[2]


def tiny_study(folder: Path, **changes: Any) -> Path:
    """Two budgets of two widths, a few steps each."""
    write_data(folder / "data")
    save_recipe(small_recipe(folder / "x", folder / "data", "checkpoint.save_every=2"), folder / "recipe.yaml")
    values = {
        "recipe": "recipe.yaml",
        "name": "tiny",
        "folder": str(folder / "study"),
        "budgets": [{"flops": 1e8, "widths": [16, 32]}, {"flops": 3e8, "widths": [16, 32]}],
        "rules": {"head_dim": 8, "width_per_layer": 32, "most_steps": 8, "rate_limit": 0, "smallest_batch": 1,
                  "tolerance": 0.3, "rate_constant": 0.1},
        **changes,
    }  # fmt: skip
    (folder / "study.yaml").write_text(yaml.safe_dump(values))
    return folder / "study.yaml"


def plan_of(path: Path) -> Plan:
    return make_plan(load_study(path))


def kinds(plan: Plan) -> list[str]:
    return [state_of(plan, run, plan.recipe_of(run)).kind for run in plan.runs]


def last_loss(run: str | Path) -> float:
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return next(line["valid_loss"] for line in reversed(lines) if "valid_loss" in line)


# ---- in one process


def _threads() -> int:
    return len(os.listdir("/proc/self/task"))


def share_a_process(path: Path) -> dict[str, Any]:
    """A study whose second run fails at first, and whose third is interrupted at its third step."""
    from megatron_soda.studies import worker
    from megatron_soda.training import stop, trainer

    plan = plan_of(path)
    second, third = (plan.recipe_of(run) for run in plan.runs[1:3])
    train, train_step = trainer.train, trainer.Trainer.train_step
    trained: list[str] = []
    troubles = {"fail", "interrupt"}

    def recorded(recipe: Any) -> bool:
        trained.append(Path(recipe.run).name)
        if recipe.run == second.run and "fail" in troubles:
            troubles.remove("fail")
            raise SodaError("step 1: loss nan")
        return train(recipe)

    def interrupted(self: Any) -> Any:
        result = train_step(self)
        if self.recipe.run == third.run and self.step == 3 and "interrupt" in troubles:
            troubles.remove("interrupt")
            assert stop._current is not None
            stop._current.ask("SIGTERM")
        return result

    alone = replace(plan.recipe_of(plan.runs[3]), run=str(path.parent / "alone"))
    train(alone)
    trainer.train, trainer.Trainer.train_step = recorded, interrupted
    first = worker.work(plan), list(trained), kinds(plan)
    threads = _threads()
    again = worker.work(plan), trained[len(first[1]) :], kinds(plan)
    threads_after, count = _threads(), len(trained)
    folder = Path(plan.study.folder)
    (folder / "runs" / plan.runs[0].id / RESULT).unlink()
    with locked(folder / CLAIMS / plan.runs[0].id):
        elsewhere = worker.work(plan), trained[count:]
    return {
        "first": first,
        "again": again,
        "elsewhere": elsewhere,
        "threads": (threads, threads_after),
        "alone": last_loss(alone.run),
    }


def test_failures_interruptions_and_repetitions(tmp_path):
    path = tiny_study(tmp_path)
    plan = plan_of(path)
    ids = [run.id for run in plan.runs]
    found = forked(share_a_process, path)
    assert found["first"] == (130, ids[:3], ["done", "failed", "stopped", "waiting"])
    assert found["again"] == (0, ids[1:], ["done"] * 4)
    assert found["elsewhere"] == (0, []), "another process has that run"
    before, after = found["threads"]
    assert after <= before + 4, "a run leaves threads behind"
    steps = [json.loads(line)["step"] for line in (tmp_path / "study" / "runs" / ids[2] / "metrics.jsonl").open()]
    assert sorted(set(steps)) == list(range(1, plan.runs[2].steps + 1))
    assert last_loss(tmp_path / "study" / "runs" / ids[3]) == found["alone"], "not what the run gives by itself"

    (result, *_) = collect(plan, [plan.recipe_of(run) for run in plan.runs])
    run = plan.runs[0]
    assert result["loss"] == last_loss(tmp_path / "study" / "runs" / run.id)
    assert result["tokens"] == run.tokens == run.steps * run.batch_size * 32
    assert result["flops"] == run.flops_per_token * run.tokens
    assert result["passes"] == pytest.approx(run.tokens / training_tokens(plan.recipe))
    assert result["recipe_hash"] == recipe_hash(plan.recipe_of(run))
    assert set(result["nll"]) >= {"text", "semantic", "acoustic_1"}
    assert 0 < result["device_seconds"] < result["wall_seconds"]
    read = read_results(tmp_path / "study" / "results.csv", "semantic", ids, "tiny")
    assert not read.notes
    assert [row.loss for row in read.rows if row.run == run.id] == [result["nll"]["semantic"]]


# ---- the command


def soda(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["soda", "isoflop", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize("command", ["plan", "run", "fit", "plot"])
def test_help_has_examples(monkeypatch, capsys, command):
    assert soda(monkeypatch, command, "--help") == 0
    assert f"soda isoflop {command} " in capsys.readouterr().out.split("Examples:")[1]


@pytest.mark.full
def test_the_command(monkeypatch, capsys, tmp_path):
    path = tiny_study(tmp_path, budgets=[{"flops": 1e8, "widths": [16, 32]}])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert soda(monkeypatch, "run", path) == 0
    out = capsys.readouterr().out
    assert "2 of 2 runs are done" in out
    with (tmp_path / "study" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["1e08-d16-s1234", "1e08-d32-s1234"]

    def no_process(*_: object, **__: object) -> None:
        raise AssertionError("a worker was started, and nothing was left to do")

    monkeypatch.setattr(subprocess, "Popen", no_process)
    written = (tmp_path / "study" / "runs" / rows[0]["run"] / "result.json").stat().st_mtime_ns
    assert soda(monkeypatch, "run", path) == 0
    assert (tmp_path / "study" / "runs" / rows[0]["run"] / "result.json").stat().st_mtime_ns == written
    assert soda(monkeypatch, "fit", path) == 2
    err = capsys.readouterr().err
    assert "no fit is possible" in err
    assert "2 sizes, and a parabola needs 3" in err

    # the same ids with other settings
    text = path.read_text().replace("rate_constant: 0.1", "rate_constant: 0.2")
    path.write_text(text)
    assert soda(monkeypatch, "run", path, "--collect") == 2
    assert "holds a run of another recipe" in capsys.readouterr().err


def test_a_failure_is_forgotten_while_it_is_read(monkeypatch, tmp_path):
    """A worker deletes the file when it tries the run again: that must not end the process that shows the runs."""
    plan = plan_of(tiny_study(tmp_path))
    run, recipe = plan.runs[0], plan.recipe_of(plan.runs[0])
    failed = Path(recipe.run) / records.FAILED
    failed.parent.mkdir(parents=True)
    failed.write_text('{"error": "no room"}')
    assert state_of(plan, run, recipe).told == "no room"
    plain = records.read_json
    monkeypatch.setattr(records, "read_json", lambda path, kind: path.unlink() or plain(path, kind))
    assert state_of(plan, run, recipe).kind == "waiting"


def test_runs_trained_by_other_means_are_collected(tmp_path):
    """launch.sh trains the recipe as it is, at another layout."""
    plan = plan_of(tiny_study(tmp_path))
    run, recipe = plan.runs[0], plan.recipe_of(plan.runs[0])
    folder = Path(recipe.run)
    folder.mkdir(parents=True)
    layout = ["parallel.distributed_optimizer=true", "training.micro_batch_size=1"]
    save_recipe(recipe, tmp_path / "planned.yaml")
    save_recipe(load_recipe(tmp_path / "planned.yaml", layout), folder / "recipe.yaml")
    point = {"step": run.steps, "valid_loss": 3.0, "valid_nll": {"text": 4.0, "semantic": 2.0}}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n" + json.dumps(point) + "\n")
    (folder / "timings.json").write_text('{"train": {"seconds": 5}}')
    (folder / "environment.json").write_text('{"device": "cpu"}')
    recipes = [plan.recipe_of(run) for run in plan.runs]
    assert [found["run"] for found in collect(plan, recipes)] == [run.id]
    assert kinds(plan) == ["done", "waiting", "waiting", "waiting"]

    (folder / "result.json").unlink()
    save_recipe(load_recipe(tmp_path / "planned.yaml", ["seed=5"]), folder / "recipe.yaml")
    assert collect(plan, recipes) == []

    point["step"] -= 1
    (folder / "metrics.jsonl").write_text(json.dumps(point))
    assert result_of(plan, run, recipe) is None


def test_a_worker_that_dies_is_reported(monkeypatch, tmp_path):
    plan = plan_of(tiny_study(tmp_path))
    start = subprocess.Popen

    def dying(_: list[str], **options: Any) -> subprocess.Popen:
        return start([sys.executable, "-c", "print('out of luck'); raise SystemExit(1)"], **options)

    monkeypatch.setattr(subprocess, "Popen", dying)
    with pytest.raises(SodaError, match=r"a worker ended \(out of luck\)"):
        run_study(plan, [], jobs=2)


def test_bits_of_a_second_of_sound(tmp_path):
    """16 frames a second, each of 3 + 5 nats."""
    plan = plan_of(tiny_study(tmp_path))
    run, recipe = plan.runs[0], plan.recipe_of(plan.runs[0])
    folder = Path(recipe.run)
    folder.mkdir(parents=True)
    point = {"step": run.steps, "valid_loss": 3.0, "valid_nll": {"text": 9.0, "semantic": 3.0, "acoustic_1": 5.0}}
    (folder / "metrics.jsonl").write_text(json.dumps(point))
    found = result_of(plan, run, recipe)
    assert found is not None
    assert found["bits_per_audio_second"] is None
    codec = {"name": "c", "fingerprint": "f", "codebooks": 2, "entries": 16, "sample_rate": 16000, "arguments": {}}
    (tmp_path / "data" / "codec.json").write_text(json.dumps({**codec, "samples_per_frame": 1000}))
    found = result_of(plan, run, recipe)
    assert found is not None
    assert found["bits_per_audio_second"] == pytest.approx(16 * 8 / 0.6931471805599453)


# ---- Slurm


def test_an_array_job_trains_its_run(tmp_path):
    runs = tmp_path / "runs.txt"
    runs.write_text("a.yaml\nb.yaml\n")
    script = ROOT / "examples" / "isoflop" / "slurm.sbatch"
    checkout = tmp_path / "checkout"
    (checkout / "examples" / "pretrain").mkdir(parents=True)
    (checkout / "examples" / "pretrain" / "slurm.sbatch").write_text('echo "job $*"\n')
    for task, status, said in (("1", 0, "job b.yaml seed=7"), ("2", 2, "has no line 3"), ("", 2, "not a job array")):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": task}
        made = subprocess.run(
            ["bash", str(script), str(runs), "seed=7"], cwd=checkout, env=environment, capture_output=True, text=True
        )
        assert (made.returncode, said in made.stdout + made.stderr) == (status, True), made
