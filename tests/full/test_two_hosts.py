"""Two hosts, for as much as torch can tell: network namespaces with names of their own and a cable between them."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.helpers import write_data

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["bash", str(ROOT / "examples" / "pretrain" / "launch.sh")]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]


def ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """What to put before a command, to run it on host node-0 and on host node-1. Their interface is soda0."""
    if not (shutil.which("ip") and shutil.which("unshare")):
        pytest.skip("needs the programs ip and unshare")
    names = [f"soda-{os.getpid()}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "soda0", "netns", names[0], "type", "veth", "peer", "name", "soda0", "netns", names[1])
        except RuntimeError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "soda0")
            for link in ("lo", "soda0"):
                ip("-n", name, "link", "set", link, "up")
        yield [
            ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", f'hostname node-{i}; exec "$@"', "sh"]
            for i, name in enumerate(names)
        ]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)  # the interfaces go with it


@pytest.fixture
def recipe(tmp_path) -> Path:
    data = write_data(tmp_path / "data")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run: {tmp_path}/run\ndata: {{path: {data}, sequence_length: 32}}\n"
        "model: {num_layers: 2, hidden_size: 32, ffn_hidden_size: 64, head_dim: 16}\n"
        "parallel: {distributed_optimizer: true}\n"
        "training: {steps: 5, global_batch_size: 8, micro_batch_size: 2, log_every: 1, epsilon: 1.0e-8}\n"
    )
    return path


def start(before: list[str], recipe: Path, *overrides: str, **environment: str) -> subprocess.Popen:
    settings = {
        **os.environ,
        "SODA_PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "MASTER_PORT": "29511",
        **environment,
    }
    return subprocess.Popen(
        [*before, *LAUNCH, str(recipe), *overrides], env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """What they printed; ends what does not end by itself."""
    try:
        return [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                whole = psutil.Process(process.pid)
                for child in [*whole.children(recursive=True), whole]:  # trainers have sessions of their own
                    child.kill()


def start_both(
    hosts: list[list[str]], recipe: Path, on_second: list[str], *overrides: str, **environment: str
) -> list[subprocess.Popen]:
    shared = {"NNODES": "2", "MASTER_ADDR": ADDRESSES[0], "NPROC_PER_NODE": "1", **environment}
    return [
        start(host, recipe, *overrides, *(on_second if rank else []), NODE_RANK=str(rank), **shared)
        for rank, host in enumerate(hosts)
    ]


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_two_hosts_train_as_one(hosts, recipe, tmp_path):
    processes = start_both(hosts, recipe, [], GLOO_SOCKET_IFNAME="soda0")
    said = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert "2 ranks on 2 hosts" in said[0]
    alone = start([], recipe, f"run={tmp_path}/alone", NPROC_PER_NODE="2")
    (out,) = finish([alone])
    assert alone.returncode == 0, out
    together = losses(tmp_path / "run")
    assert len(together) == 5
    assert together == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


def test_sigterm_on_one_host_stops_both_and_the_same_command_goes_on(hosts, recipe, tmp_path):
    metrics = tmp_path / "run" / "metrics.jsonl"
    flat = ["schedule.warmup_share=0", "schedule.decay_share=0"]  # so that the rate is the same whatever the steps
    processes = start_both(hosts, recipe, [], "training.steps=5000", *flat, GLOO_SOCKET_IFNAME="soda0")
    for _ in range(1200):
        if (metrics.is_file() and '"step": 20,' in metrics.read_text()) or processes[0].poll() is not None:
            break
        time.sleep(0.1)
    processes[1].terminate()
    first, _ = finish(processes)
    assert "and saved. The same command resumes from there" in first
    stopped = len(losses(tmp_path / "run"))
    assert 20 <= stopped < 5000
    assert (tmp_path / "run" / "checkpoints" / f"step_{stopped:08d}").is_dir()
    processes = start_both(hosts, recipe, [], f"training.steps={stopped + 2}", *flat, GLOO_SOCKET_IFNAME="soda0")
    first, _ = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], first
    assert f"from step {stopped}" in first
    assert len(losses(tmp_path / "run")) == stopped + 2


def test_hosts_that_were_started_otherwise_are_named(hosts, recipe):
    """Another layout on the second: without the check, making the groups would hang."""
    processes = start_both(hosts, recipe, ["parallel.tensor=2"], GLOO_SOCKET_IFNAME="soda0")
    first, _ = finish(processes)
    assert 0 not in [process.returncode for process in processes]
    assert "parallel.tensor: 1 on rank 0 (node-0), 2 on rank 1 (node-1)" in first


def test_a_host_that_gloo_could_not_name_is_an_error(hosts, recipe):
    processes = start_both(hosts, recipe, [])
    said = finish(processes)
    assert [process.returncode for process in processes] == [2, 2]
    for rank, text in enumerate(said):
        assert f"error: host node-{rank} knows its own name only as a loopback address" in text
        assert "Set GLOO_SOCKET_IFNAME (and NCCL_SOCKET_IFNAME) to the interface that leads to them: soda0." in text


UNNAMED = ["unshare", "--uts", "sh", "-c", 'hostname no-such-host && exec "$@"', "sh"]


@pytest.mark.skipif(subprocess.run([*UNNAMED, "true"], capture_output=True).returncode != 0, reason="needs unshare")
def test_a_host_whose_name_does_not_resolve(recipe, tmp_path):
    """torchrun --standalone would wait forever."""
    process = start(UNNAMED, recipe, NPROC_PER_NODE="2")
    (said,) = finish([process])
    assert process.returncode == 0, said
    assert "no-such-host" in said  # in the map of the ranks
    assert len(losses(tmp_path / "run")) == 5
