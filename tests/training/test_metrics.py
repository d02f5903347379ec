import json
import sys
import types

import pytest

from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.training.metrics import Metrics, check_wandb, memory_gib, mfu, peak_tflops


def test_mfu_against_a_sum_by_hand():
    """135M, 4 H100 at 1.2 M tokens/s: 975 MFLOP a token are 1.17e15 of 3.956e15 FLOP/s."""
    recipe = load_recipe(None, [])
    peak = peak_tflops(recipe, "NVIDIA H100 80GB HBM3")
    assert peak == 989.0
    assert mfu(975_187_968, 1.2e6, 4, peak) == pytest.approx(0.2958, abs=1e-4)
    assert peak_tflops(recipe, "NVIDIA H100 PCIe") == 756.0
    assert peak_tflops(recipe, "cpu") is None
    assert mfu(1, 1.0, 1, None) is None
    assert peak_tflops(load_recipe(None, ["logging.peak_tflops=2"]), "cpu") == 2.0


def test_memory_is_of_this_process():
    assert 0.02 < memory_gib() < 64


def test_files_and_weights_and_biases(tmp_path, monkeypatch):
    recipe = load_recipe(None, [f"run={tmp_path}", "logging.wandb_project=soda"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SodaError, match="wandb is not installed"):
        check_wandb(recipe)
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end")
    )
    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = lambda **settings: logged.append(settings["project"]) or run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    check_wandb(recipe)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 5, "loss": 2.0}\n{"st')
    metrics = Metrics(recipe, 1)
    metrics.write(2, {"loss": 2.5, "mfu": None, "nll": {"text": 1.5}})
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert logged == ["soda", (2, {"loss": 2.5, "nll/text": 1.5}), "end"]
    assert list((tmp_path / "tensorboard").iterdir())


def test_without_weights_and_biases(tmp_path):
    recipe = load_recipe(None, [f"run={tmp_path}"])
    check_wandb(recipe)
    metrics = Metrics(recipe, 0)
    metrics.write(1, {"loss": 1.0})
    metrics.close()
    assert metrics.wandb is None


def test_weights_and_biases_without_a_login(tmp_path, monkeypatch):
    recipe = load_recipe(None, [f"run={tmp_path}", "logging.wandb_project=soda"])

    def fail(**settings):
        raise ValueError("no such project")

    fake = types.ModuleType("wandb")
    fake.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    fake.init = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    login = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(login))
    with pytest.raises(SodaError, match=r"no login on this host.*WANDB_MODE=offline"):
        check_wandb(recipe)
    login.write_text("machine elsewhere.org login user password secret\n")
    with pytest.raises(SodaError, match="no login"):
        check_wandb(recipe)
    for mode in ("offline", "disabled"):
        monkeypatch.setenv("WANDB_MODE", mode)
        check_wandb(recipe)
    monkeypatch.delenv("WANDB_MODE")
    login.write_text("machine api.wandb.ai login user password secret\n")
    check_wandb(recipe)
    with pytest.raises(SodaError, match=r"does not start \(no such project\)"):
        Metrics(recipe, 0)


def test_lines_are_json(tmp_path):
    metrics = Metrics(load_recipe(None, [f"run={tmp_path}"]), 0)
    metrics.write(1, {"loss": None, "valid_loss": float("nan"), "nll": {"text": float("inf")}})
    metrics.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "valid_loss": None, "nll": {"text": None}}
