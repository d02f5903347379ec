"""tools/bench/gpu.sh with a stand-in for python: what finished is not run again, its commands are understood, and the
report has the figures with their aims."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megatron_soda.config import load_recipe
from tests.forked import forked
from tests.helpers import TOOLS, run_tool

ROOT = TOOLS.parent
SCRIPT = TOOLS / "bench" / "gpu.sh"
STAND_IN = """#!/usr/bin/env bash
case "$*" in *"import xdist"*) exit 1 ;; *gpu_report.py*) exec "$REAL" "$@" ;; esac
printf '%s\\n' "$(printf '%q ' "$@")" >>"$CALLED"
case "$*" in *"$HANGS"*) echo $$ $PPID >"$CALLED.pids"; exec sleep 100 ;; esac
case "$*" in *"$FAILS"*) exit 3 ;; esac
echo '{"rows": {}}'
"""


class Run:
    def __init__(self, folder: Path) -> None:
        self.out, self.called, bin_ = folder / "out", folder / "called", folder / "bin"
        bin_.mkdir()
        for name in ("python", "compute-sanitizer"):
            (bin_ / name).write_text(STAND_IN)
            (bin_ / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{bin_}:{os.environ['PATH']}",
            "PYTHON": str(bin_ / "python"),
            "REAL": sys.executable,
            "CALLED": str(self.called),
            "PACK": str(folder / "pack"),
            "OUT": str(self.out),
        }

    def start(self, *parts: str, **environment: str) -> subprocess.Popen:
        found = self.environment | {"HANGS": "no such", "FAILS": "no such"} | environment
        command = ["bash", str(SCRIPT), *parts]
        return subprocess.Popen(
            command, env=found, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it in the background
        )  # fmt: skip

    def __call__(self, *parts: str, **environment: str) -> str:
        said, _ = self.start(*parts, **environment).communicate(timeout=60)
        return said

    def until_it_hangs(self, *parts: str, **environment: str) -> tuple[subprocess.Popen, list[int]]:
        """And the processes of the step."""
        process, until, pids = self.start(*parts, **environment), time.monotonic() + 60, Path(f"{self.called}.pids")
        while not (pids.exists() and pids.read_text().endswith("\n")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        return process, [int(pid) for pid in pids.read_text().split()]

    def calls(self) -> list[list[str]]:
        """Since the last time."""
        found = [shlex.split(line) for line in self.called.read_text().splitlines()] if self.called.exists() else []
        self.called.unlink(missing_ok=True)
        return found


@pytest.fixture
def run(tmp_path) -> Run:
    return Run(tmp_path)


def test_only_what_did_not_finish_is_run_again(run):
    said = run("head", "generate", FAILS="bench_head.py --preset 1.7b")
    assert [call[0] for call in run.calls()] == ["tools/bench/bench_head.py"] * 2 + ["tools/bench/bench_generate.py"]
    assert "== head-1.7b: exit 3" in said
    process, pids = run.until_it_hangs("head", "generate", HANGS="bench_head.py --preset 1.7b")
    for pid in (process.pid, *pids):
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert len(run.calls()) == 1
    run("head", "generate")
    assert [call[1:3] for call in run.calls()] == [["--preset", "1.7b"]]
    run("head", "generate")
    assert not run.calls()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_stopped_with_its_step(run, how):
    process, pids = run.until_it_hangs("head", HANGS="bench_head.py")
    process.send_signal(how)
    assert process.wait(10) == 130
    until = time.monotonic() + 10
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_new_pack_is_installed_in_place_of_the_old(run):
    folder = Path(run.environment["PACK"]) / "1"
    folder.mkdir(parents=True)
    for content in ("old", "new"):
        (folder / "some-1.0-py3-none-any.whl").write_text(content)
        for calls in (1, 0):
            run("setup")
            assert [call[:3] for call in run.calls()] == [["-m", "pip", "install"]] * calls


def test_a_rehearsal_skips_what_needs_a_gpu(run):
    said = run("--rehearse", "sanitizer", "train", "report")
    skipped = [line.split()[1] for line in said.splitlines() if "skipped: needs a GPU" in line]
    assert skipped == ["sanitizer:", *(f"train-{size}-fp8:" for size in ("135m", "135m-8", "600m", "1.7b", "4b-18"))]
    calls = run.calls()
    assert len(calls) == 5
    assert all(call[call.index("--preset") :].count("tiny") == 1 for call in calls)
    assert json.loads(said.splitlines()[-1])["failed"] == []
    assert "error: no part trian" in run("trian")


@pytest.mark.full
def test_its_commands_are_understood(run):
    said, commands, recipes = run(), {}, 0
    assert said.count(": exit 0,") == len(list(run.out.glob("*.done"))) > 30
    for file, *options in run.calls():
        if "bench_" in file or "compare_runs" in file:
            commands.setdefault(file, []).extend(options)  # of options given twice the last counts
        if options[:1] == ["megatron_soda.train"]:
            recipe = load_recipe(ROOT / options[1], options[2:])
            recipes += recipe.training.steps == 200 and not recipe.data.corpora
    assert recipes == 4
    assert len(commands) == 6
    for file, options in commands.items():
        status, _, warned = forked(run_tool, str(Path(file).relative_to("tools")), *options, "--help")
        assert status == 0, warned


def test_report(tmp_path):
    def training(speed: float, mfu: float, gib: float) -> dict:
        return {"rows": {"ours": {"tokens_per_second": speed, "mfu": mfu, "gib": gib}}}

    steps = {
        "versions": {"device": "H100", "gib": 79.0},
        "train-600m-bf16": training(90_000, 0.45, 57.5),
        "train-600m-fp8": training(99_000, 0.495, 80.5),
        "kernels": {
            "rows": [{"section": "unpack", "against": "device copy", "rate": 2037.0, "ratio": 0.61, "bar": 0.6}]
        },
    }
    rows = [{"step": "train-600m-bf16", "exit": 0, "result": training(1, 1, 1)}]  # of a run before
    rows += [{"step": name, "exit": 0, "result": result} for name, result in steps.items()]
    rows += [{"step": "codec-dac", "exit": 124, "result": {"times_faster": 9.0}}]
    rows += [{"step": "codec-mimi", "exit": None, "result": None}]  # no time was left for it
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "tests-cuda.log").write_text("..F\n1 failed, 17 passed, 1 skipped in 100 s\n")
    status, said, warned = forked(run_tool, "bench/gpu_report.py", tmp_path)
    assert status == 0, warned
    lines = said.splitlines()
    assert "| 600m, BF16 | **90,000 (100,000)** | **0.45 (0.5)** | 57.5 (at most 79) |  |  |" in lines
    assert "| 600m, FP8 | 99,000 | 0.495 | **80.5 (at most 79)** | 1.1 (1) |  |" in lines
    assert "| unpack | 2,037 | 0.61 (0.6) |" in lines
    assert "| dac | – | – (5) | – | – (1) | – |" in lines
    assert "| tests-cuda | 17 | **1 (at most 0)** | 1 |  |" in lines
    found = json.loads(lines[-1])
    assert found["machine"]["device"] == "H100"
    assert found["failed"] == ["codec-dac", "codec-mimi"]
    cells = {(one["row"], one["column"]): one for one in found["figures"]["Training"]}
    assert cells["600m, BF16", "MFU"] == {
        "row": "600m, BF16", "column": "MFU", "value": 0.45, "aim": 0.5, "most": False, "met": False
    }  # fmt: skip
    assert cells["600m, FP8", "x BF16"]["met"] is True
    assert cells["135m, BF16", "MFU"]["met"] is None
