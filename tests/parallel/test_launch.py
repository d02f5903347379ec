"""The pretraining recipes have the paper's numbers, and a wrong launch is a message within seconds."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.parallel.layout import check_layout
from megatron_soda.parallel.preflight import check_rendezvous
from tests.forked import forked
from tests.helpers import small_recipe

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "examples" / "pretrain"
BASE = {"135m": 4.243e-3, "600m": 4.243e-3, "1.7b": 3.0e-3, "4b": 2.683e-3}  # peak rates (paper, section 4)
SODA_MIX = {"yodas2-en": 0.5164, "emilia-yodas-en": 0.2878, "emilia-en": 0.1459, "nemotron": 0.05}


def start(command: list[str], **environment: str) -> subprocess.Popen:
    clean = {k: v for k, v in os.environ.items() if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.Popen(
        command, cwd=ROOT, env={**clean, "SODA_PYTHON": sys.executable, **environment}, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run(command: list[str], **environment: str) -> tuple[int, str]:
    process = start(command, **environment)
    out = process.communicate(timeout=300)[0]
    return process.returncode, out


# ---- recipes


@pytest.mark.parametrize("name", [p.stem for p in PRETRAIN.glob("*.yaml")])
def test_shares_sum_to_one_and_the_layout_fits(name):
    recipe = load_recipe(PRETRAIN / f"{name}.yaml")
    for stage in recipe.data.mix:
        assert sum(stage.shares.values()) == pytest.approx(1, abs=1e-6)
        assert set(stage.shares) == set(recipe.data.corpora)
    for devices in (1, 8, 16):
        assert check_layout(recipe, devices) == devices


@pytest.mark.parametrize("name", BASE)
def test_soda_base(name):
    recipe = load_recipe(PRETRAIN / f"{name}.yaml")
    t = recipe.training
    assert recipe.model.preset == name
    assert not recipe.model.tie_embeddings
    assert recipe.optimizer.learning_rate == pytest.approx(BASE[name], rel=2e-4)
    tokens_of_a_step = t.global_batch_size * recipe.data.sequence_length
    assert tokens_of_a_step == 512 * 4096
    assert 0 <= t.steps * tokens_of_a_step - 500e9 < tokens_of_a_step
    o, schedule = recipe.optimizer, recipe.schedule
    assert (o.name, schedule.name, recipe.precision.dtype) == ("cautious", "wsd", "bf16")
    assert (recipe.model.init, o.cautious_mask) == ("levanter", "stacked")
    assert (o.beta1, o.beta2, o.epsilon, o.weight_decay) == (0.98, 0.98, 1e-16, 0.033)
    assert (o.clip_grad, t.z_loss, schedule.warmup_share, schedule.decay_share) == (1.0, 1e-4, 0.1, 0.2)
    assert recipe.data.mix[0].shares == pytest.approx(SODA_MIX, abs=5e-5)


def test_the_other_recipes():
    ablation = load_recipe(PRETRAIN / "150m-ablation.yaml")
    assert (ablation.training.steps, ablation.optimizer.learning_rate) == (19_074, 1.5e-3)
    assert ablation.training.global_batch_size == 128
    assert ablation.model.tie_embeddings
    prelim = load_recipe(PRETRAIN / "600m-prelim.yaml")
    assert (prelim.model.head_dim, prelim.optimizer.learning_rate) == (64, 3.0e-3)
    weights = {"en": 0.3557, "es": 0.0738, "fr": 0.0350, "de": 0.0232}
    weights |= {"th": 0.00097, "hi": 0.00078, "ar": 0.00059, "zh": 0.00050}
    whole = sum(weights.values())
    shares = {f"yodas2-{language}": weight / whole for language, weight in weights.items()}
    assert prelim.data.mix[0].shares == pytest.approx(shares, abs=2e-6)
    decay = load_recipe(PRETRAIN / "135m-decay.yaml")
    assert decay.schedule.name == "decay"
    assert decay.training.branch_from.endswith("step_00190000")
    assert decay.training.steps - decay.data.mix[0].from_step == 50_000
    base = load_recipe(PRETRAIN / "135m.yaml")
    kept = base.checkpoint
    assert 190_000 % kept.save_every == 190_000 % kept.keep_every == 0  # so the checkpoint is there
    assert decay.optimizer.learning_rate == base.optimizer.learning_rate


# ---- preflight


PREFLIGHT = [sys.executable, "-m", "megatron_soda.parallel.preflight"]


@pytest.mark.parametrize(
    ("options", "environment", "message"),
    [
        (["--address", "nowhere.invalid"], {}, "MASTER_ADDR=nowhere.invalid does not resolve on host "),
        ([], {"MASTER_ADDR": "nowhere.invalid"}, "MASTER_ADDR=nowhere.invalid does not resolve on host "),
        ([], {}, "MASTER_ADDR is not set on host "),
        (["--address", "127.0.0.1", "--port", "70000"], {}, "MASTER_PORT=70000"),
        (["--address", "localhost", "--nodes", "2"], {}, "MASTER_ADDR=localhost is host "),
        (["--address", "localhost", "--nodes", "2", "--bind"], {}, "there are 2 nodes"),
        (["--address", "10.1.2.3", "--nodes", "2"], {"GLOO_SOCKET_IFNAME": "no0"}, "has no such interface; it has lo"),
    ],
)
def test_a_wrong_address_is_named_at_once(options, environment, message):
    began = time.monotonic()
    status, out = run([*PREFLIGHT, *options], **environment)
    assert status == 2
    assert out.startswith("error: ")
    assert message in out
    assert time.monotonic() - began < 10


def test_a_taken_port_is_named_with_its_process():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        options = ["--address", "127.0.0.1", "--port", str(port)]
        status, out = run([*PREFLIGHT, *options, "--bind"])
        assert status == 2
        assert f"MASTER_PORT={port} is taken on host {socket.gethostname()}" in out
        assert f"by process {os.getpid()} (" in out
        assert run([*PREFLIGHT, *options])[0] == 0  # only node 0 listens
    assert run([*PREFLIGHT, *options, "--bind"]) == (0, "")


def test_rendezvous_of_a_trainer(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SodaError, match="MASTER_ADDR is not set"):
        check_rendezvous()
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    with pytest.raises(SodaError, match=r"MASTER_ADDR=nowhere\.invalid does not resolve on host"):
        check_rendezvous()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_rendezvous()
    monkeypatch.setenv("MASTER_PORT", "none")
    with pytest.raises(SodaError, match="MASTER_PORT=none"):
        check_rendezvous()
    monkeypatch.setenv("WORLD_SIZE", "1")  # one process looks for nobody
    check_rendezvous()


def threads_given(wanted: dict[str, str]) -> int:
    import torch

    from megatron_soda.parallel import ranks

    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ.update(wanted)
    torch.set_num_threads(int(wanted.get("OMP_NUM_THREADS", "7")))  # as OpenMP does when torch is loaded
    os.sched_getaffinity = lambda _: {1, 3, 5, 7, 9, 11}
    ranks.init(small_recipe(Path("run"), Path("data")))
    return torch.get_num_threads()


def test_threads_are_the_users_or_the_cores_of_this_process():
    """torch itself would take every core of the machine, also those that a scheduler gave to others."""
    for wanted, given in (({"OMP_NUM_THREADS": "5"}, 5), ({}, 6), ({"LOCAL_WORLD_SIZE": "4"}, 1)):
        assert forked(threads_given, wanted) == given


# ---- launch.sh


LAUNCH = ["bash", str(PRETRAIN / "launch.sh")]
RECIPE = str(PRETRAIN / "135m.yaml")


@pytest.fixture
def fakes(tmp_path) -> Path:
    """A folder of programs: a `python` that writes down its arguments, and more that a test adds."""
    add(tmp_path, "python", 'case $1 in -c) echo 8 ;; *) echo "$NODE_RANK $MASTER_ADDR $*" >>"$LOG" ;; esac')
    return tmp_path


def add(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("arguments", "environment", "status", "message"),
    [
        (["--help"], {}, 0, "NNODES=2 NODE_RANK=0 MASTER_ADDR=node-a bash examples/pretrain/launch.sh"),
        ([], {}, 2, "error: which recipe?"),
        (["none.yaml"], {}, 2, "error: none.yaml: no such recipe; there are /"),
        ([RECIPE, RECIPE], {}, 2, "a second recipe"),
        ([RECIPE], {"NNODES": "2"}, 2, "set MASTER_ADDR to the name or address of node 0"),
        ([RECIPE], {"NNODES": "2", "MASTER_ADDR": "nowhere.invalid"}, 2, "nowhere.invalid does not resolve on host"),
        (["--smoke", RECIPE], {"NNODES": "2", "MASTER_ADDR": "a"}, 2, "--smoke is for one node"),
    ],
)
def test_launch_explains(arguments, environment, status, message):
    found, out = run([*LAUNCH, *arguments], **environment)
    assert found == status
    assert message in out
    assert "megatron_soda.train" not in out


def test_what_launch_starts(fakes):
    log = fakes / "log"
    settings = {"SODA_PYTHON": str(fakes / "python"), "LOG": str(log)}
    several = {"NNODES": "2", "MASTER_ADDR": "node-a", "MASTER_PORT": "1234"}
    assert run([*LAUNCH, RECIPE, "seed=7"], **settings)[0] == 0
    assert run([*LAUNCH, RECIPE], **settings, **several, NODE_RANK="1", NPROC_PER_NODE="3", MAX_RESTARTS="2")[0] == 0
    train, check_2, train_2 = log.read_text().splitlines()
    assert train.endswith(
        f"-m megatron_soda.parallel.one_node --nproc-per-node 8 --max-restarts 0 -m megatron_soda.train {RECIPE} seed=7"
    )
    assert check_2.endswith("--address node-a --port 1234 --nodes 2")
    assert (
        "-m torch.distributed.run --nnodes 2 --node-rank 1 --master-addr node-a --master-port 1234 "
        "--nproc-per-node 3 --max-restarts 2 -m megatron_soda.train "
    ) in train_2


@pytest.mark.full
@pytest.mark.parametrize("name", ["4b", "135m-decay"])  # the others have no key that these have not
def test_smoke(name):
    status, out = run([*LAUNCH, "--smoke", str(PRETRAIN / f"{name}.yaml")], NPROC_PER_NODE="2")
    assert status == 0, out
    assert '"step": 4' in (ROOT / "runs" / "smoke" / name / "metrics.jsonl").read_text()


# ---- Slurm


SBATCH = ["bash", str(PRETRAIN / "slurm.sbatch"), RECIPE, "seed=7"]
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}


def slurm(fakes: Path, srun: str, hostnames: str = "node-a\\nnode-b\\n") -> dict[str, str]:
    """Fake scontrol, scancel and srun; the environment to find them."""
    add(fakes, "scontrol", f"""if [ "$1" = show ]; then printf '{hostnames}'; else echo "scontrol $*" >>"$LOG"; fi""")
    add(fakes, "scancel", 'echo "scancel $*" >>"$LOG"; kill -TERM "$(cat "$LOG.srun")"')
    add(fakes, "srun", srun)
    path = f"{fakes}{os.pathsep}{os.environ['PATH']}"
    return {**JOB, "PATH": path, "SODA_PYTHON": str(fakes / "python"), "LOG": str(fakes / "log")}


def test_slurm_starts_every_node(fakes):
    environment = slurm(fakes, 'shift 2; for node in 0 1; do SLURM_NODEID=$node "$@"; done')
    assert run(SBATCH, **environment)[0] == 0
    trained = [line for line in (fakes / "log").read_text().splitlines() if "torch.distributed.run" in line]
    for node, line in enumerate(trained):
        assert line.startswith(f"{node} node-a -m torch.distributed.run --nnodes 2 --node-rank {node} ")
        assert "--master-addr node-a --master-port 29500 --nproc-per-node 8 " in line
        assert line.endswith(f"-m megatron_soda.train {RECIPE} seed=7")
    assert len(trained) == 2


def test_slurm_without_host_names_fails_at_once(fakes):
    status, out = run(SBATCH, **slurm(fakes, "echo started", hostnames=""))
    assert status == 2
    assert "named no node" in out
    assert "started" not in out


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_slurm_waits_for_the_trainers_and_queues_again(fakes, number):
    """USR1 (the time is up soon) stops the trainers and queues the job again; TERM is for Slurm to decide about."""
    wait = 'echo $$ >"$LOG.srun"; trap "exit 1" TERM; for i in {1..30}; do sleep 0.1; done; exit 3'
    process = start(SBATCH, **slurm(fakes, wait))
    while not (fakes / "log.srun").is_file():
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(number)
    out = process.communicate(timeout=20)[0]
    log = (fakes / "log").read_text() if (fakes / "log").is_file() else ""
    if number == signal.SIGUSR1:
        assert process.returncode == 0, out
        assert log == "scancel --signal=TERM 17\nscontrol requeue 17\n"
    else:
        assert process.returncode == 3  # srun's own end, waited for
        assert log == ""
