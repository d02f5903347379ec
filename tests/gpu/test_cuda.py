"""On one CUDA device, or two: training in every precision, Transformer Engine's layers and optimizer against ours."""

import importlib.util
import json
import multiprocessing as mp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers import SPACE, documents, small_recipe, write_data

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
needs_te = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None, reason="needs the package transformer-engine"
)
needs_apex = pytest.mark.skipif(importlib.util.find_spec("amp_C") is None, reason="needs NVIDIA's apex")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
ROOT = Path(__file__).resolve().parents[2]
TE = "training.backend=transformer_engine"
LOCAL = "training.backend=local"
BF16 = "precision.dtype=bf16"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"), 400)


def train(folder: Path, data: Path, *overrides: str, cpu: bool = False, devices: int = 1) -> list[float]:
    """Sizes that FP8 takes: 128 wide, 128 tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"run: {folder}\ndata: {{sequence_length: 128, path: {data}}}\n"
        "model: {num_layers: 4, hidden_size: 128, ffn_hidden_size: 256, num_attention_heads: 4,"
        " num_query_groups: 4, head_dim: 32}\n"
        "training: {steps: 10, global_batch_size: 8, micro_batch_size: 2}\n"
        "optimizer: {epsilon: 1.0e-8}\n"
        "schedule: {warmup_share: 0, decay_share: 0}\n"
        "checkpoint: {save_every: 5}\n"
        "logging: {log_every: 1}\n"
    )
    launch = ["-m", "megatron_soda.parallel.one_node", "--nproc-per-node", str(devices)] if devices > 1 else []
    command = [sys.executable, *launch, "-m", "megatron_soda.train", str(recipe), *overrides]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "" if cpu else ",".join(map(str, range(devices)))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]


def test_local_layers_agree_with_cpu(tmp_path, data):
    found = train(tmp_path / "gpu", data, LOCAL)
    assert len(found) == 10
    assert found[-1] < found[0]
    assert found == pytest.approx(train(tmp_path / "cpu", data, LOCAL, cpu=True), abs=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "cautious"])
def test_bf16_is_near_fp32(tmp_path, data, optimizer):
    kind = f"optimizer.name={optimizer}"
    full = train(tmp_path / "a", data, LOCAL, kind)
    assert train(tmp_path / "b", data, LOCAL, BF16, kind) == pytest.approx(full, abs=0.03)


@needs_te
def test_transformer_engine_agrees_with_local(tmp_path, data):
    local = train(tmp_path / "a", data, LOCAL, BF16)
    assert train(tmp_path / "b", data, TE, BF16) == pytest.approx(local, abs=0.03)


@needs_te
@pytest.mark.parametrize(
    "overrides",
    [
        ["precision.fp8_recipe=delayed"],
        ["precision.fp8_recipe=tensorwise"],
        ["precision.fp8_recipe=tensorwise", "precision.bf16_layers=1"],
        ["precision.fp8_recipe=blockwise"],
    ],
    ids=["delayed", "tensorwise", "tensorwise-bf16-ends", "blockwise"],
)
def test_fp8_is_near_bf16(tmp_path, data, overrides):
    half = train(tmp_path / "a", data, TE, BF16)
    found = train(tmp_path / "b", data, TE, "precision.dtype=fp8", *overrides)
    assert found == pytest.approx(half, abs=0.1)
    assert found != half


@needs_te
def test_settings_for_speed_change_little(tmp_path, data):
    usual = train(tmp_path / "usual", data, TE, BF16)
    for setting in ("fuse_swiglu=false", "fuse_rope=false", "fuse_gradients=false", "cuda_graphs=true"):
        found = train(tmp_path / setting, data, TE, BF16, f"training.{setting}")
        assert found == pytest.approx(usual, abs=0.03), setting


@needs_te
def test_a_checkpoint_goes_to_the_gpu_and_back(tmp_path, data):
    distributed = "parallel.distributed_optimizer=true"
    whole = train(tmp_path / "cpu", data, LOCAL, BF16, distributed, cpu=True)
    shutil.copytree(tmp_path / "cpu", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step_00000010")
    assert train(tmp_path / "moved", data, TE, BF16, distributed) == pytest.approx(whole, abs=0.03)
    shutil.copytree(tmp_path / "moved", tmp_path / "back")
    more = [BF16, distributed, "training.steps=12"]
    on_gpu = train(tmp_path / "moved", data, TE, *more)
    assert train(tmp_path / "back", data, LOCAL, *more, cpu=True) == pytest.approx(on_gpu, abs=0.03)


@needs_te
@needs_two
def test_documents_split_between_two_devices(tmp_path, data):
    whole = train(tmp_path / "one", data, TE, BF16)
    for name, backend in (("split", TE), ("masked", LOCAL)):
        found = train(tmp_path / name, data, backend, BF16, "parallel.context=2", devices=2)
        assert found == pytest.approx(whole, abs=0.03), name


def _logits(backend: str, ids: np.ndarray) -> np.ndarray:
    from megatron_soda.data.batch import Batcher
    from megatron_soda.data.windows import Window
    from megatron_soda.model.gpt import build_model, forward, inputs_of
    from megatron_soda.parallel import ranks

    recipe = small_recipe(
        Path("."), Path("."), f"data.sequence_length={ids.shape[1] - 1}", f"training.backend={backend}", BF16
    )
    device = ranks.init(recipe)
    model = build_model(recipe, SPACE, device).eval()
    batch = Batcher(SPACE, device=device)([Window(row, ids.shape[1] - 1) for row in ids])
    with torch.no_grad():
        return forward(model, inputs_of(model, batch), logits=True)[..., : SPACE.size].float().cpu().numpy()


def _in_a_process(function, *arguments):
    with mp.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


@needs_te
def test_documents_do_not_see_each_other_under_transformer_engine():
    length = 96
    stream = np.concatenate(documents(60))
    ids = np.stack([stream[length * i : length * i + length + 1] for i in range(2)])
    changed = ids.copy()
    segment = np.concatenate([[0], np.cumsum(ids[0, :-2] == SPACE.eos)])
    mine = np.append(segment == 1, False) & (ids[0] != SPACE.eos)
    changed[0, mine] = np.random.default_rng(0).integers(3, SPACE.text_size, mine.sum())
    before, after = (_in_a_process(_logits, "transformer_engine", x) for x in (ids, changed))
    assert np.array_equal(before[0, segment != 1], after[0, segment != 1])
    assert np.array_equal(before[1], after[1])
    assert not np.array_equal(before, after)
    assert np.abs(before - _in_a_process(_logits, "local", ids)).max() < 0.05


def _optimizer(folder: str, overrides: list[str]) -> tuple[str, float]:
    from megatron_soda.training.optimizer import choose_adam
    from tests.distributed.test_optimizer import expected, run_steps

    cautious = "optimizer.name=cautious" in overrides
    wanted = expected(run_steps(folder, overrides, None), "stacked" if cautious else "")
    return choose_adam(cautious)[0], run_steps(folder, overrides, wanted)[0]


@pytest.mark.parametrize("optimizer", ["adamw", "cautious"])
@pytest.mark.parametrize("more", [[], [BF16], [BF16, "parallel.distributed_optimizer=true"]])
def test_optimizers_against_numpy(tmp_path, optimizer, more):
    """Transformer Engine's Adam where it is installed, then apex's, then torch's."""
    name, worst = _in_a_process(_optimizer, str(tmp_path), [f"optimizer.name={optimizer}", *more])
    if optimizer == "adamw" and importlib.util.find_spec("transformer_engine"):
        assert name.startswith("Transformer Engine")
    assert worst < 2e-5


@needs_apex
def test_apex_against_numpy(tmp_path):
    name, worst = _in_a_process(_without_te, str(tmp_path))
    assert name.startswith("apex")
    assert worst < 2e-5


def _without_te(folder: str) -> tuple[str, float]:
    sys.modules["transformer_engine.pytorch"] = None  # type: ignore[assignment]
    return _optimizer(folder, ["optimizer.name=adamw"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_against_cpu(dtype):
    from megatron_soda.model.head import head_loss

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(700, 64, generator=generator)
    weight = torch.randn(20_000, 64, generator=generator) * 0.1
    labels = torch.randint(0, 19_000, (700,), generator=generator)
    ones, classes = torch.ones(700), labels % 3
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        x = hidden.to(dtype).to(device, kind).clone().requires_grad_()
        w, gradient = weight.to(dtype).to(device, kind), torch.zeros(20_000, 64, device=device)
        loss, sums = head_loss(
            x, w, labels.to(device), ones.to(device), classes.to(device),
            classes=3, rows=19_000, z_weight=1e-4, weight_gradient=gradient,
        )  # fmt: skip
        loss.backward()
        found.append([t.detach().float().cpu() for t in (loss, sums, x.grad, gradient)])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() / a.abs().max() < (1e-5 if dtype == torch.float32 else 0.02)
