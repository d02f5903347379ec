"""Signals to a training process: while it starts, while it takes steps, and afterwards."""

import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STARTS = """
import threading
from megatron_soda.training.stop import listening
with listening() as stop:
    print("ready", flush=True)
    lock = threading.Lock(); lock.acquire(); lock.acquire()  # deep in C, as in a collective
"""
STEPS = """
import sys, time
from megatron_soda.training.stop import listening
with listening() as stop, listening() as same:
    stop.phase = "stepping"
    print("ready", flush=True)
    while not stop.asked:
        time.sleep(0.02)
    print("saving", flush=True)
    open(sys.argv[1], "w").write("half")
    time.sleep(float(sys.argv[2]))
    open(sys.argv[1], "w").write("whole" if same is stop else "two")
    stop.phase = "over"
    print("saved", flush=True)
    time.sleep(0.3)
"""


def start(script: str, *arguments: str, before: tuple[str, ...] = (), **more) -> subprocess.Popen:
    command = [*before, sys.executable, "-c", script, *arguments]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL), **more,  # the tests may run under nohup
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_starts(number):
    process = start(STARTS)
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert said == f"{number.name}: stopped before the first step; nothing was changed.\n"


def test_a_process_with_many_descriptors_hears_signals():
    """As one of many ranks has, by its connections: select() refuses numbers from 1024 on."""
    many = "import os, resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))\n"
    many += "while os.dup(0) < 1024: pass\n"
    process = start(many + STARTS)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=10)
    assert process.returncode == 130
    assert said == "SIGTERM: stopped before the first step; nothing was changed.\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_it_takes_steps_and_a_second_while_it_saves(tmp_path, number):
    process = start(STEPS, str(tmp_path / "saved"), "0.5")
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)  # a late one, of a torchrun that stops all ranks when one has ended
    _, said = process.communicate(timeout=10)
    assert process.returncode == 0
    assert (tmp_path / "saved").read_text() == "whole"
    assert said == f"{number.name}: stopping after this step. Wait for the checkpoint.\n"


def test_nohup_is_heeded_unless_torchrun_passes_the_signal_on(tmp_path):
    for environment, stopped in (({}, False), ({"TORCHELASTIC_RUN_ID": "1"}, True)):
        process = start(STEPS, str(tmp_path / "x"), "0", before=("nohup",), env={**os.environ, **environment})
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        assert (tmp_path / "x").exists() == stopped
        process.terminate()
        process.communicate(timeout=10)


def test_when_torchrun_is_gone(tmp_path):
    launcher = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', *sys.argv[1:]], start_new_session=True)\n"
        "time.sleep(60)"
    )
    process = start(launcher, STEPS, str(tmp_path / "saved"), "0", env={**os.environ, "TORCHELASTIC_RUN_ID": "1"})
    process.kill()
    out, said = process.communicate(timeout=10)  # until its child has closed them, too
    assert out == "saving\nsaved\n"
    assert said == "torchrun is gone: stopping after this step. Wait for the checkpoint.\n"
    assert (tmp_path / "saved").read_text() == "whole"


def test_a_terminal_that_is_closed(tmp_path):
    """Its processes get SIGHUP, and what they print from then on is an error: they save all the same."""
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", STEPS, str(tmp_path / "saved"), "0.2"])
    said = b""
    while not said.endswith(b"\n"):  # it may come in parts
        said += os.read(terminal, 100)
    assert said == b"ready\r\n"
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert (tmp_path / "saved").read_text() == "whole"
