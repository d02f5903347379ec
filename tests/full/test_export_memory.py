"""Import and export of the 1.7B shape: what they need of memory, and that nothing changes on the way.

python -m pytest -s -m full tests/full/test_export_memory.py        prints the figures of docs/benchmarks.md
"""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_soda.hf.weights import SHARD_BYTES, Weights
from tests.qwen3 import write_soda

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
GB = 10**9
NEEDED = 26 * GB  # three copies in float32, and one in bf16 after that


def run(*arguments: object) -> tuple[int, float]:
    """Bytes of the largest resident set of a `soda` command, mapped files included, and its seconds."""
    command = [sys.executable, "-m", "megatron_soda.cli", *map(str, arguments)]
    began = time.monotonic()
    pid = os.spawnve(os.P_NOWAIT, sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)})
    _, status, used = os.wait4(pid, 0)
    assert status == 0
    return used.ru_maxrss * 1024, time.monotonic() - began


def test_the_peak_is_a_tensor_a_shard_and_half_a_gigabyte(tmp_path):
    if shutil.disk_usage(tmp_path).free < NEEDED:
        pytest.skip(f"needs {NEEDED / GB:.0f} GB of disk")
    source, folder = tmp_path / "soda-1.7b", tmp_path / "run"
    write_soda(source, "1.7b", torch.float32)
    weights = Weights(source)
    largest = max(torch.Size(shape).numel() for shape in weights.shapes.values())
    figures = {"import": run("import", source, f"run={folder}")}
    for name, itemsize in (("fp32", 4), ("bf16", 2)):
        out = folder / "hf"
        figures[name] = run("export", folder, f"export.weights={name}")
        peak, _ = figures[name]
        assert peak < largest * itemsize + SHARD_BYTES + GB / 2, f"{name}: {peak / GB:.2f} GB"
        exported = Weights(out)
        assert sum(torch.Size(s).numel() for s in exported.shapes.values()) * itemsize > 4 * GB
        for tensor in weights.shapes:
            expected = weights.read(tensor).to(exported.dtype)
            assert torch.equal(exported.read(tensor), expected), tensor
        difference = json.loads((out / "soda.json").read_text())["max_logit_difference"]
        print(f"{name}: {peak / GB:.2f} GB, {figures[name][1]:.0f} s, largest difference of a logit {difference:.1e}")
    print(f"import: {figures['import'][0] / GB:.2f} GB, {figures['import'][1]:.0f} s")
