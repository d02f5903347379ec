"""What Transformer Engine is asked for buffers of: parallel.overlap_tensor. Training with them: test_te_spec.py."""

import sys

import pytest
import torch

from megatron_soda.config import load_recipe
from megatron_soda.parallel.userbuffers import start_userbuffers
from tests.fakes import te_speed_fake as fake

FP8 = ["precision.dtype=fp8"]


@pytest.mark.parametrize(
    ("overrides", "modes"),
    [(["precision.dtype=bf16"], ["NONE"]), (FP8, ["FP8"]), ([*FP8, "precision.bf16_layers=1"], ["FP8", "NONE"])],
)
def test_buffers_for_all_tokens_in_the_precisions_of_the_layers(monkeypatch, overrides, modes):
    """Those of the run before, in the same process, are gone."""
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", fake)
    monkeypatch.setattr(fake, "buffers", {"shape": "of the run before"})
    wanted = ["model.hidden_size=64", "data.sequence_length=32", "training.micro_batch_size=4", "parallel.tensor=2"]
    start_userbuffers(load_recipe(None, [*wanted, *overrides]))
    assert fake.buffers == {
        "shape": [128, 64],
        "tp_size": 2,
        "modes": [fake.UserBufferQuantizationMode[mode] for mode in modes],
        "dtype": torch.bfloat16,
    }
