"""The life of a job's processes: attempts, locks, stopped ranks, signals, and that nothing outlives its parent."""

import fcntl
import os
import pty
import re
import signal
import termios
import threading
import time
from pathlib import Path

import psutil
import pytest

from tests.full.runs import RECIPE, alive, launch, losses, start, survivors, trainer, wait_for_step
from tests.helpers import write_data

pytestmark = pytest.mark.full
STEPS = "training.steps=400"
SAVE = "checkpoint.save_every=20"
TRACEBACK = 'megatron_soda/train.py", line'  # of a trainer; torchrun ends with one of its own
STARTERS = {"torchrun": start, "launch.sh": launch}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> dict[int, float]:
    """The losses of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("straight")
    path = folder / "recipe.yaml"
    path.write_text(RECIPE.format(run=folder / "run"))
    write_data(folder / "run" / "data")
    run = start(path, STEPS)
    out = run.communicate(timeout=300)[0]
    assert run.returncode == 0, out
    return losses(folder / "run")


@pytest.fixture
def run(recipe):
    """The run folder of the recipe; in the end nothing is left that was started for it."""
    yield recipe.parent / "run"
    survivors(recipe, 0)


def goes_on(recipe: Path, run: Path, straight: dict[int, float], step: int) -> None:
    """The same command goes on from `step`, and the losses are those of a run without a stop."""
    again = start(recipe, STEPS, SAVE)
    out = again.communicate(timeout=300)[0]
    assert again.returncode == 0, out
    assert f"from step {step}\n" in out
    assert losses(run) == straight


def test_a_second_attempt_goes_on_bit_for_bit(recipe, tmp_path, run, straight):
    """One store serves all attempts."""
    again = tmp_path / "again"
    data = f"data.path={run}/data"
    launcher = start(recipe, f"run={again}", data, STEPS, torchrun=["--max-restarts", "1"])
    wait_for_step(again, 60, launcher)
    trainer(launcher, 1).kill()
    out = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, out
    assert "from step 50" in out
    assert losses(again) == straight


def test_a_run_folder_belongs_to_one_job(recipe, run):
    """A second launch is refused with who has it; a lock of a killed process holds nobody up."""
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


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(recipe, run, rank):
    """gloo would wait for half an hour."""
    launcher = start(recipe, "training.steps=100000", SODA_WATCH_SECONDS="15")
    wait_for_step(run, 20, launcher)
    stopped, other = trainer(launcher, rank), trainer(launcher, 1 - rank)
    stopped.suspend()
    began = time.monotonic()
    other.wait(timeout=120)
    assert time.monotonic() - began < 60  # 15, and what a busy machine adds
    stopped.kill()  # torchrun does, after another half minute
    out = launcher.communicate(timeout=60)[0]
    assert launcher.returncode == 1
    host = re.escape(os.uname().nodename)
    said = (
        rf"error on rank {1 - rank} \({host}\): rank {rank} \({host}, process {stopped.pid}\) has given no sign of life"
    )
    assert len(re.findall(f"^{said}", out, re.MULTILINE)) == 1, out
    assert re.search(rf"Rank {1 - rank} \({host}\) is at step \d+, \w+, waiting in \w+ \(\w+\.py:\d+, \w+\)", out), out
    assert re.search(f"traceback : {said}", out), out  # torchrun's table has it, too
    assert TRACEBACK not in out


def test_a_rank_that_is_continued_in_time_goes_on(recipe, run):
    launcher = start(recipe, STEPS, SODA_WATCH_SECONDS="15")
    wait_for_step(run, 20, launcher)
    both = [trainer(launcher, rank) for rank in (0, 1)]
    both[1].suspend()
    time.sleep(5)
    both[1].resume()
    wait_for_step(run, 40, launcher)
    for process in both:  # the whole job, for longer than a rank alone may be
        process.suspend()
    time.sleep(20)
    for process in both:
        process.resume()
    out = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, out


def test_a_host_that_is_gone_with_the_store(recipe, run):
    """torchrun alone may be stopped (Ctrl-Z): its trainers go on. With rank 0 it is a host that is gone."""
    launcher = start(recipe, "training.steps=100000", SODA_WATCH_SECONDS="4")
    wait_for_step(run, 20, launcher)
    first, second = trainer(launcher, 0), trainer(launcher, 1)
    os.kill(launcher.pid, signal.SIGSTOP)
    time.sleep(8)
    wait_for_step(run, max(losses(run)) + 20, launcher)
    first.suspend()
    for _ in range(300):
        if second.status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    first.kill()
    os.kill(launcher.pid, signal.SIGCONT)
    out = launcher.communicate(timeout=60)[0]
    said = r"rank 1 \(.*\): node 0 \(\S+\) has not answered for \d+ s, and nothing is progressing here"
    assert re.search(f"traceback : error on {said}", out), out


def test_a_dead_disk_is_not_taken_for_a_stopped_rank(recipe, run):
    """All ranks live, and nothing goes on: a warning names the one that waits for no other."""
    launcher = start(recipe, "training.steps=100000", module="tests.full.frozen", SODA_WATCH_SECONDS="2")
    wait_for_step(run, 5, launcher)
    out = launcher.communicate(timeout=120)[0]
    assert launcher.returncode == 1
    host = os.uname().nodename
    place = (
        r"nothing has progressed for \d+ s\. "
        rf"Rank 1 \({host}\): step \d+, data, in frozen_read \(windows\.py:\d+, __getitem__\)\. Rank 0 \({host}\): step"
    )
    assert re.search(rf"warning: {place} \d+, \w+, waiting in ", out, re.MULTILINE), out
    assert re.search(rf"^error on rank 0 \({host}\): {place}", out, re.MULTILINE), out
    assert "no sign of life" not in out


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("starter", STARTERS)
def test_sigterm_after_a_periodic_save(recipe, run, straight, starter, asynchronous):
    """torchrun signals the whole process group of each rank, with what a save has started in it."""
    launcher = STARTERS[starter](recipe, STEPS, SAVE, f"checkpoint.async_save={str(asynchronous).lower()}")
    wait_for_step(run, 45, launcher)
    launcher.terminate()
    out = launcher.communicate(timeout=120)[0]
    assert launcher.returncode != 0  # torchrun's own, for a signal
    assert "SIGTERM: stopping after this step. Wait for the checkpoint." in out
    assert "error: " not in out
    assert "error on" not in out
    reached = max(losses(run))
    assert 45 <= reached < 400
    assert f"Stopped at step {reached} and saved. The same command resumes from there." in out
    assert (run / "checkpoints" / f"step_{reached:08d}" / "manifest.json").is_file()
    assert survivors(recipe, 5) == []
    goes_on(recipe, run, straight, reached)


def test_slurm_warns_before_the_time_is_up(recipe, run, straight, tmp_path):
    """scancel signals every process of the step: torchrun, its trainers, and what they have started."""
    signal_all = (
        "import os, psutil, signal\n"
        "for p in psutil.process_iter():\n"
        "    try:\n"
        "        if p.environ().get('STEP_OF') == os.environ['LOG']: p.send_signal(signal.SIGTERM)\n"
        "    except psutil.Error: pass\n"
    )
    (tmp_path / "all.py").write_text(signal_all)
    programs = {
        "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "scontrol $*" >>"$LOG"; fi',
        "scancel": f'echo "scancel $*" >>"$LOG"; "$SODA_PYTHON" {tmp_path}/all.py',
        "srun": 'shift 2; export STEP_OF=$LOG SLURM_NODEID=0; exec "$@"',
    }
    for name, script in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node-a", "SLURM_JOB_NUM_NODES": "1"}
    batch = launch(
        recipe, STEPS, SAVE, script="examples/pretrain/slurm.sbatch", LOG=str(tmp_path / "log"),
        PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **job,
    )  # fmt: skip
    wait_for_step(run, 45, batch)
    batch.send_signal(signal.SIGUSR1)
    out = batch.communicate(timeout=120)[0]
    assert batch.returncode == 0, out
    assert (tmp_path / "log").read_text() == "scancel --signal=TERM 17\nscontrol requeue 17\n"
    reached = max(losses(run))
    assert f"Stopped at step {reached} and saved." in out, out
    assert survivors(recipe, 5) == []
    goes_on(recipe, run, straight, reached)


def test_a_second_signal_does_not_break_the_save(recipe, run, straight):
    launcher = start(recipe, STEPS, SAVE)
    wait_for_step(run, 45, launcher)
    ranks = [trainer(launcher, rank) for rank in (0, 1)]
    launcher.send_signal(signal.SIGINT)
    for pause in (0.1, 0.1, 0.2, 0.4):
        time.sleep(pause)
        for process in ranks:
            if process.is_running():
                process.send_signal(signal.SIGINT)
    out = launcher.communicate(timeout=120)[0]
    reached = max(losses(run))
    assert f"Stopped at step {reached} and saved." in out, out
    goes_on(recipe, run, straight, reached)


def test_a_terminal_that_is_closed(recipe, run, straight):
    ours, theirs = pty.openpty()
    launcher = start(
        recipe, STEPS, SAVE, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=False,
        preexec_fn=lambda: (  # nohup ignores the signal
            os.setsid(), fcntl.ioctl(0, termios.TIOCSCTTY, 0), signal.signal(signal.SIGHUP, signal.SIG_DFL)
        ),
    )  # fmt: skip
    os.close(theirs)
    reader = threading.Thread(target=drain, args=(ours,), daemon=True)
    reader.start()
    wait_for_step(run, 45, launcher)
    ranks = [trainer(launcher, rank) for rank in (0, 1)]
    os.close(ours)
    launcher.wait(timeout=120)
    psutil.wait_procs(ranks, timeout=60)
    assert survivors(recipe, 5) == []
    goes_on(recipe, run, straight, max(losses(run)))


def drain(terminal: int) -> None:
    try:
        while os.read(terminal, 1 << 16):
            pass
    except OSError:
        pass


def test_sigterm_while_it_starts(recipe, run):
    launcher = start(recipe)
    while len(psutil.Process(launcher.pid).children()) < 2:
        time.sleep(0.05)
    time.sleep(3)  # Python, and some of torch
    assert not (run / "metrics.jsonl").exists()
    launcher.terminate()
    out = launcher.communicate(timeout=60)[0]
    assert "SIGTERM: stopped before the first step; nothing was changed." in out
    assert TRACEBACK not in out
    assert survivors(recipe, 5) == []


@pytest.mark.parametrize("asynchronous", [False, True])
def test_trainers_of_a_killed_torchrun_save_and_end(recipe, run, straight, asynchronous):
    launcher = start(recipe, STEPS, SAVE, f"checkpoint.async_save={str(asynchronous).lower()}")
    wait_for_step(run, 25, launcher)
    launcher.kill()
    assert survivors(recipe, 60) == []
    out = launcher.communicate(timeout=10)[0]
    assert "torchrun is gone: stopping after this step." in out
    reached = max(losses(run))
    assert reached < 400, out
    goes_on(recipe, run, straight, reached)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_nothing_outlives_a_killed_trainer(recipe, run, asynchronous, number):
    """Killed soon after a save, and killed inside one."""
    for inside in (False, True):
        setting = f"checkpoint.async_save={str(asynchronous).lower()}"
        launcher = start(recipe, "training.steps=100000", "checkpoint.save_every=3" if inside else SAVE, setting)
        wait_for_step(run, (max(losses(run)) if inside else 0) + 25, launcher)
        helpers = [p for p in alive(recipe) if p.pid != launcher.pid]
        victim = trainer(launcher, 1)
        if inside:
            until = time.monotonic() + 20
            while not list((run / "checkpoints").glob(".step_*")) and time.monotonic() < until:
                pass
        victim.send_signal(number)
        out = launcher.communicate(timeout=60)[0]
        assert launcher.returncode == 1
        assert survivors(recipe, 5) == [], helpers
        assert f"Signal {number.value} ({number.name}) received by PID {victim.pid}" in out
        assert TRACEBACK not in out
