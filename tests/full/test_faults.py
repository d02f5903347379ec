"""Ctrl-C, kill -9 and a full disk: a clear end, nothing lost, and the same command goes on."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.full.runs import losses, start, wait_for_step
from tests.voices import write_speech

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_interrupted_and_killed_training_goes_on_bit_for_bit(recipe, tmp_path, asynchronous):
    recipe.write_text(recipe.read_text().replace("save_every: 50", f"save_every: 50, async_save: {asynchronous}"))
    straight = start(recipe, f"run={tmp_path}/straight", f"data.path={tmp_path}/run/data")
    out = straight.communicate(timeout=300)[0]
    assert straight.returncode == 0, out
    expected = losses(tmp_path / "straight")

    first = start(recipe)
    wait_for_step(tmp_path / "run", 30, first)
    os.killpg(first.pid, signal.SIGINT)
    out = first.communicate(timeout=120)[0]
    assert "and saved. The same command resumes from there" in out
    assert first.returncode != 0
    stopped = max(losses(tmp_path / "run"))
    assert stopped < 900

    second = start(recipe)
    wait_for_step(tmp_path / "run", stopped + 30, second)
    torchrun = psutil.Process(second.pid)
    for process in [*torchrun.children(recursive=True), torchrun]:  # ranks have sessions of their own
        process.kill()
    second.communicate(timeout=60)
    assert max(losses(tmp_path / "run")) < 1000
    with (recipe.parent / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 999, "lo')  # what a kill can leave

    third = start(recipe)
    out = third.communicate(timeout=300)[0]
    assert third.returncode == 0, out
    assert losses(tmp_path / "run") == expected


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_full_disk_while_training(recipe, small_disk, tmp_path, asynchronous):
    """The checkpoint that does not fit is an error by name, the one before stays, and with room it goes on."""
    run = start(recipe, f"run={small_disk}/run", f"data.path={tmp_path}/run/data", "model.hidden_size=64",
                f"checkpoint.async_save={asynchronous}", processes=1)  # fmt: skip
    out = run.communicate(timeout=300)[0]
    assert run.returncode != 0
    assert "error: " in out
    assert "Free some space" in out
    found = sorted(p.name for p in (small_disk / "run" / "checkpoints").iterdir() if not p.name.startswith("."))
    assert found == [f"step_{50 * (i + 1):08d}" for i in range(len(found))]


def test_full_disk_while_preparing(small_disk, tmp_path, monkeypatch, capsys):
    """Whatever was being written when the disk was full (index, codec, units, tokenizer, parts, stores), the command
    says so, and with room it goes on."""
    from tests.commands.test_cli import soda

    speech = write_speech(tmp_path / "speech")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of some text\n" for i in range(3000)))
    (tmp_path / "r.yaml").write_text("name: small\n")
    command = [
        "prepare", str(tmp_path / "r.yaml"), f"prepare.speech={speech}", f"prepare.text=[{tmp_path}/text.txt]",
        "prepare.text_pieces=300", "prepare.workers=1", "prepare.entries=32", f"run={small_disk}/run",
    ]  # fmt: skip
    stopped_at = set()
    for room in (0, 8_000, 30_000, 60_000, 100_000, 160_000, 240_000, 350_000, 500_000, 800_000):
        shutil.rmtree(small_disk / "run", ignore_errors=True)
        (small_disk / "filler").write_bytes(b"0" * (3 * 1024 * 1024 - 4096 - room))
        status, said = soda(monkeypatch, *command), capsys.readouterr().err
        if not status:
            break
        assert status == 2
        assert "the disk is full" in said
        stopped_at.add(said.split("error: ")[1].split(": the disk")[0].removeprefix(str(small_disk)))
    assert not status, "the room was never enough"
    assert len(stopped_at) >= 5, stopped_at
    shutil.rmtree(small_disk / "run")
    (small_disk / "filler").write_bytes(b"0" * (3 * 1024 * 1024 - 4096 - room // 2))
    assert soda(monkeypatch, *command) == 2
    (small_disk / "filler").unlink()
    assert soda(monkeypatch, *command) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_interrupted_prepare_goes_on(tmp_path, number):
    speech = write_speech(tmp_path / "speech", 150)
    (tmp_path / "r.yaml").write_text(
        f"run: {tmp_path}/run\nprepare: {{speech: {speech}, text_pieces: 300, workers: 2, shard_size: 16}}\n"
    )
    command = [sys.executable, "-m", "megatron_soda.cli", "prepare", str(tmp_path / "r.yaml")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup, and a shell for what it starts, ignore some
    )  # fmt: skip
    units = tmp_path / "run" / "data" / "units"
    for _ in range(600):
        if list(units.rglob("part-*.parquet")) or process.poll() is not None:
            break
        time.sleep(0.1)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    out = process.communicate(timeout=60)[0]
    assert process.returncode == 130, out
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert "Run the same command again to resume" in out
    assert "Traceback" not in out
    kept = {p: p.stat().st_mtime_ns for p in units.rglob("part-*.parquet")}
    assert kept
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in kept} == kept


def test_kills_anywhere_change_no_byte(tmp_path):
    """`soda prepare` is killed again and again, later each time, and goes on; with one worker and with eight."""
    speech = write_speech(tmp_path / "speech", 60)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of some text\n" for i in range(300)))

    def command(run: str, workers: int) -> list[str]:
        return [
            sys.executable, "-m", "megatron_soda.cli", "prepare", str(tmp_path / "r.yaml"), f"run={tmp_path}/{run}",
            f"prepare.workers={workers}",
        ]  # fmt: skip

    (tmp_path / "r.yaml").write_text(
        f"prepare: {{speech: {speech}, text: [{text}], text_share: 0.1, text_pieces: 300, shard_size: 4}}\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command("straight", 1), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    subprocess.run(command("eight", 8), cwd=ROOT, env=environment, check=True, capture_output=True, timeout=300)
    kills, delay = 0, 2.0
    while True:
        process = subprocess.Popen(
            command("killed", 2), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            assert process.wait(timeout=delay) == 0
            break
        except subprocess.TimeoutExpired:
            for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                child.kill()
            process.wait()
            kills, delay = kills + 1, delay + 1.5
    assert kills >= 3
    for name in ("train", "valid", "test"):
        for suffix in ("bin", "idx", "json"):
            straight = (tmp_path / "straight" / "data" / f"{name}.{suffix}").read_bytes()
            for other in ("eight", "killed"):
                assert (tmp_path / other / "data" / f"{name}.{suffix}").read_bytes() == straight
