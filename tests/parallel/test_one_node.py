"""A job of one machine can be reached from nowhere else: neither torchrun's store nor gloo listens beyond loopback."""

import json
import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RANK = """
import json, os, sys
import psutil
import torch.distributed as dist
from megatron_soda.config import load_recipe
from megatron_soda.parallel import ranks

ranks.init(load_recipe(None, ["parallel.tensor=" + os.environ.get("WORLD_SIZE", "1")]))
dist.barrier()
if dist.get_rank() == 0:
    me = psutil.Process()
    job = [me.parent(), *me.parent().children()] if dist.get_world_size() > 1 else [me]
    found = [c for one in job for c in one.net_connections("inet") if c.status == psutil.CONN_LISTEN or not c.raddr]
    print(json.dumps([c.laddr.ip for c in found]))
dist.barrier()
ranks.watch.stop()
dist.destroy_process_group()
"""


# gloo of every rank, and the store
@pytest.mark.parametrize(("processes", "fewest"), [(1, 1), pytest.param(2, 3, marks=pytest.mark.full)])
def test_nothing_listens_beyond_loopback(tmp_path, processes, fewest):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    launcher = ["-m", "megatron_soda.parallel.one_node", "--nproc-per-node", "2"] if processes > 1 else []
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "eth0", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    addresses = json.loads(done.stdout.splitlines()[-1])
    assert len(addresses) >= fewest
    assert all(ip_address(address.removeprefix("::ffff:")).is_loopback for address in addresses), addresses
