"""On one CUDA device: training runs, in BF16 too, and Transformer Engine's layers agree with the local ones."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers import write_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs the package transformer-engine"
)
ROOT = Path(__file__).resolve().parents[2]


def losses(folder: Path, *overrides: str) -> list[float]:
    write_data(folder / "data")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {folder}\ndata: {{sequence_length: 64}}\n"
        "training: {steps: 10, global_batch_size: 8, micro_batch_size: 2, log_every: 1, epsilon: 1.0e-8}\n"
    )
    command = [sys.executable, "-m", "megatron_soda.train", str(recipe), *overrides]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"})
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]


def test_local_layers_train(tmp_path):
    found = losses(tmp_path, "training.backend=local")
    assert len(found) == 10
    assert found[-1] < found[0]


def test_bf16_is_near_fp32(tmp_path):
    full = losses(tmp_path / "a", "training.backend=local")
    half = losses(tmp_path / "b", "training.backend=local", "training.precision=bf16")
    assert half == pytest.approx(full, abs=0.03)


@needs_te
def test_transformer_engine_agrees_with_local(tmp_path):
    local = losses(tmp_path / "a", "training.backend=local", "training.precision=bf16")
    engine = losses(tmp_path / "b", "training.backend=transformer_engine", "training.precision=bf16")
    assert engine == pytest.approx(local, abs=0.03)
