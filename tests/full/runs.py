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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


def start(
    recipe: Path, *overrides: str, processes: int = 2, torchrun: Sequence[str] = ("--standalone",), **environment: str
) -> subprocess.Popen:
    command = [*TORCHRUN, "--nproc-per-node", str(processes), *torchrun, "-m", "megatron_soda.train", str(recipe)]
    return subprocess.Popen(
        [*command, *overrides], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def losses(run: Path) -> dict[int, float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {row["step"]: row["loss"] for line in lines if "loss" in (row := json.loads(line))}


def wait_for_step(run: Path, step: int, launcher: subprocess.Popen) -> None:
    path = run / "metrics.jsonl"
    for _ in range(1200):
        if path.is_file() and f'"step": {step},' in path.read_text():
            return
        if launcher.poll() is not None:
            break
        time.sleep(0.1)
    launcher.kill()
    raise AssertionError(f"step {step} did not come:\n{launcher.communicate()[0]}")


def trainer(launcher: subprocess.Popen, rank: int) -> psutil.Process:
    """The process of a rank."""
    for process in psutil.Process(launcher.pid).children():
        if process.environ().get("RANK") == str(rank):
            return process
    raise AssertionError(f"no process of rank {rank}")
