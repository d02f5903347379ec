"""The life of a job's processes: attempts, locks, stopped ranks, signals, and that nothing outlives its parent."""

import os

import pytest

from tests.full.runs import losses, start, trainer, wait_for_step

pytestmark = pytest.mark.full


def test_a_second_attempt_goes_on_bit_for_bit(recipe, tmp_path):
    """One store for all attempts: `launch.sh` uses torchrun's static rendezvous, `--standalone` the c10d one."""
    straight = start(recipe, f"run={tmp_path}/straight", f"data.path={tmp_path}/run/data", "training.steps=120")
    assert straight.wait(timeout=300) == 0, straight.communicate()[0]
    expected = losses(tmp_path / "straight")
    for how in (["--standalone"], ["--master-addr", "127.0.0.1", "--master-port", "29517"]):
        run = tmp_path / how[0]
        launcher = start(
            recipe, f"run={run}", f"data.path={tmp_path}/run/data", "training.steps=120",
            torchrun=[*how, "--max-restarts", "1"],
        )  # fmt: skip
        wait_for_step(run, 60, launcher)
        trainer(launcher, 1).kill()
        out = launcher.communicate(timeout=300)[0]
        assert launcher.returncode == 0, out
        assert "from step 50" in out
        assert losses(run) == expected


def test_a_run_folder_belongs_to_one_job(recipe):
    """A second launch is refused with who has it; a lock of a killed process holds nobody up."""
    run = recipe.parent / "run"
    first = start(recipe)
    wait_for_step(run, 5, first)
    trainers = trainer(first, 0), trainer(first, 1)
    second = start(recipe)
    out = second.communicate(timeout=120)[0]
    assert second.returncode == 1
    assert f"{run}: another soda is at work on it (process {trainers[0].pid} on {os.uname().nodename})" in out
    reached = max(losses(run))
    wait_for_step(run, reached + 5, first)  # the first goes on
    for process in trainers:
        process.kill()
    first.communicate(timeout=60)
    third = start(recipe, f"training.steps={max(losses(run)) + 5}")
    out = third.communicate(timeout=120)[0]
    assert third.returncode == 0, out
