"""The stages on a real Ray cluster of two nodes, of which one is killed on the way."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.voices import write_speech

pytestmark = pytest.mark.full
pytest.importorskip("ray", reason="Ray is not installed (the extra `full`)")

# In a process of its own: Ray's cluster and its logging stay out of the tests.
SCRIPT = """
import json, os, signal, sys, threading, time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from data_prep.prepare import prepare
from megatron_soda.config import load_recipe

speech, run = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
raylet = cluster.add_node(num_cpus=1).all_processes["raylet"][0].process.pid
ray.init(address=cluster.address, log_to_driver=False)
assert len([n for n in ray.nodes() if n["Alive"]]) == 2
killed = []

def kill_when_at_work():
    units = Path(run, "data", "units")
    while len(list(units.glob("part-*.parquet"))) < 3:
        time.sleep(0.05)
    os.kill(raylet, signal.SIGKILL)
    killed.append(len(list(units.glob("part-*.parquet"))))

killer = threading.Thread(target=kill_when_at_work, daemon=True)
killer.start()
settings = ["prepare.text_pieces=300", "prepare.shard_size=1", "prepare.valid_share=0.2", "prepare.test_share=0.2"]
prepare(load_recipe(None, [f"run={run}", f"prepare.speech={speech}", "prepare.executor=ray", *settings]))
killer.join(60)
for _ in range(600):
    alive = [n["NodeID"] for n in ray.nodes() if n["Alive"]]
    if len(alive) == 1:
        break
    time.sleep(0.1)
print(json.dumps({"killed_at": killed[0], "alive": len(alive)}), flush=True)
ray.shutdown()
cluster.shutdown()
"""


def test_a_killed_node_changes_no_byte(tmp_path):
    from data_prep.prepare import prepare
    from megatron_soda.config import load_recipe

    speech = write_speech(tmp_path / "speech", 80)
    settings = ["prepare.text_pieces=300", "prepare.shard_size=1", "prepare.valid_share=0.2", "prepare.test_share=0.2"]
    prepare(load_recipe(None, [f"run={tmp_path / 'local'}", f"prepare.speech={speech}", *settings]))
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(speech), str(tmp_path / "ray")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert 3 <= told["killed_at"] < 60  # in the middle
    assert told["alive"] == 1
    for name in ("train", "valid", "test"):
        for suffix in ("bin", "idx", "json"):
            one, other = (tmp_path / run / "data" / f"{name}.{suffix}" for run in ("local", "ray"))
            assert one.read_bytes() == other.read_bytes()
