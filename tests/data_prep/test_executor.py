"""Jobs that end early end their workers with them."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from data_prep.executor import run_jobs

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Nap:
    seconds: int


NAPS = [Nap(0), *[Nap(600)] * 5]


def sleep(job: Nap) -> Nap:
    time.sleep(job.seconds)
    return job


def test_who_stops_early_does_not_wait_for_the_workers():
    began = time.monotonic()
    jobs = run_jobs(sleep, NAPS, workers=2)
    assert next(jobs) == Nap(0)
    jobs.close()
    assert time.monotonic() - began < 60
    assert not [p for p in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(p.cmdline())]


def main() -> None:
    """What the next test runs: a command with two workers that never end."""
    from megatron_soda import cli

    @cli.app.command()
    def wait() -> None:
        for _ in run_jobs(sleep, NAPS, workers=2):
            print("working", flush=True)

    sys.argv = ["soda", "wait"]
    cli.main()


@pytest.mark.parametrize(
    ("number", "group"),
    [(signal.SIGTERM, False), pytest.param(signal.SIGHUP, True, marks=pytest.mark.full)],
    ids=["alone", "its whole group"],
)
def test_a_signal_ends_the_workers_too(number, group):
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.data_prep.test_executor import main; main()"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: (  # a shell has the one ignored, nohup the other
            signal.signal(signal.SIGINT, signal.default_int_handler),
            signal.signal(signal.SIGHUP, signal.SIG_DFL),
        ),
    )  # fmt: skip
    assert process.stdout
    assert process.stdout.readline() == "working\n"
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    (os.killpg if group else os.kill)(process.pid, number)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert "Interrupted after" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(workers, timeout=10)[1]
