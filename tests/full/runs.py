"""Training under torchrun, for tests that do something to it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """\
run: {run}
data: {{sequence_length: 32}}
model: {{num_layers: 4, hidden_size: 32, ffn_hidden_size: 64, head_dim: 16}}
training:
  {{steps: 1000, global_batch_size: 8, micro_batch_size: 2, save_every: 50, valid_every: 500, log_every: 1,
    epsilon: 1.0e-8}}
"""
TORCHRUN = [sys.executable, "-m", "megatron_soda.parallel.one_node"]


def start(
    recipe: Path,
    *overrides: str,
    processes: int = 2,
    torchrun: Sequence[str] = (),
    module: str = "megatron_soda.train",
    **more,
) -> subprocess.Popen:
    """torchrun, with all that it prints in a pipe. `more` is environment, or settings of Popen in small letters."""
    command = [*TORCHRUN, "--nproc-per-node", str(processes), *torchrun, "-m", module, str(recipe), *overrides]
    return _start(command, recipe, **more)


def launch(recipe: Path, *overrides: str, script: str = "examples/pretrain/launch.sh", **more) -> subprocess.Popen:
    """The same by launch.sh, two processes."""
    environment = {"SODA_PYTHON": sys.executable, "NPROC_PER_NODE": "2"}
    return _start(["bash", script, str(recipe), *overrides], recipe, **environment, **more)


def _start(command: list[str], recipe: Path, **more) -> subprocess.Popen:
    environment = {name: value for name, value in more.items() if name.isupper()}
    settings = {
        "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True,
        **{name: value for name, value in more.items() if not name.isupper()},
    }  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TEST_RECIPE": str(recipe), **environment}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **settings)


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for line in lines if "loss" in (row := json.loads(line))}


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    for _ in range(2400):
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        if launcher.poll() is not None:
            break
        time.sleep(0.05)
    launcher.kill()
    raise AssertionError(f"step {step} did not come:\n{launcher.communicate()[0]}")


def trainer(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in psutil.Process(launcher.pid).children():
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank}")


def alive(recipe: Path) -> list[psutil.Process]:
    """All processes that were started for a recipe, by whatever parent."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_RECIPE") == str(recipe) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def survivors(recipe: Path, seconds: float) -> list[str]:
    """What is still there after so many seconds; it is killed."""
    until = time.monotonic() + seconds
    while (left := alive(recipe)) and time.monotonic() < until:
        time.sleep(0.1)
    lines = []
    for process in left:
        try:
            lines.append(f"{process.pid} of {process.ppid()}: {' '.join(process.cmdline())}")
            process.kill()
        except psutil.Error:
            continue
    return lines
