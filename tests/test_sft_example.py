"""examples/sft: the recipes say what they claim, and the LoRA script's loss is that of documents one by one."""

import argparse
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from megatron_soda.config import load_recipe
from megatron_soda.data.packed import response_start
from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError
from megatron_soda.hf.load import load_model
from tests.exported import write_exported
from tests.helpers import documents

FOLDER = Path(__file__).resolve().parents[1] / "examples/sft"


@pytest.fixture(scope="module")
def lora() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sft_lora", FOLDER / "lora.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sft_lora"] = module
    spec.loader.exec_module(module)
    return module


def test_the_papers_fine_tuning():
    recipe = load_recipe(FOLDER / "paper.yaml")
    o, s, t, d = recipe.optimizer, recipe.schedule, recipe.training, recipe.data
    assert (o.name, o.learning_rate, o.weight_decay) == ("cautious", 2e-5, 0.01)
    assert (o.beta1, o.beta2, o.epsilon) == (0.9, 0.999, 1e-8)
    assert (s.name, s.warmup_share, s.final_share) == ("cosine", 0.03, 0.1)
    assert (t.global_batch_size, d.sequence_length, t.z_loss) == (64, 2048, 1e-4)
    assert t.steps == 5 * -(-750_000_000 // (64 * 2048))
    assert (d.pack, d.prompt_spans) == (True, 1)


def test_the_example_goes_on_with_the_quickstarts_model():
    ours, before = load_recipe(FOLDER / "recipe.yaml"), load_recipe(FOLDER.parent / "quickstart/recipe.yaml")
    assert ours.model == before.model
    assert ours.training.init_from == f"{before.run}/checkpoints/step_{before.training.steps:08d}"
    assert ours.prepare.tokenizer.startswith(f"{before.run}/data/")
    assert ours.run != before.run


def test_the_loss_of_the_lora_script(lora, tmp_path):
    exported = write_exported(tmp_path)
    loaded = load_model(exported.folder)
    options = argparse.Namespace(length=96, prompt_spans=1, seed=0)
    space = exported.space
    with pytest.raises(SodaError, match="have no span after"):  # text and then sound, but none after two spans
        lora.Data(loaded, exported.run / "data/train", argparse.Namespace(length=96, prompt_spans=2, seed=0))
    data = lora.Data(loaded, exported.run / "data/train", options)
    with torch.no_grad():
        nll, labels = data.nll(loaded.model, 0, data.packed.count)
    expected, count = 0.0, 0
    for document in documents(40, 0, space):
        start = response_start(document, space, 1)
        with torch.no_grad():
            logs = loaded.model(torch.from_numpy(document)[None].long()).logits[0].double().log_softmax(-1)
        said = logs[np.arange(start - 1, len(document) - 1), document[start:]]
        expected, count = expected - float(said.sum()), count + len(said)
    assert len(data.packed.too_long) == 0
    assert labels == count
    assert float(nll) / labels == pytest.approx(expected / count, rel=1e-6)
    assert data.held_out(loaded.model) == pytest.approx(expected / count, rel=1e-6)


def test_the_merged_model_is_an_export(lora, tmp_path):
    exported = write_exported(tmp_path)
    loaded = load_model(exported.folder)
    with torch.no_grad():
        loaded.model.model.layers[0].mlp.down_proj.weight += 0.5
    lora.save(loaded, tmp_path / "merged")
    again = load_model(tmp_path / "merged")
    assert (again.name, again.made_by, again.space) == ("tiny-lora", loaded.made_by, loaded.space)
    assert again.key != loaded.key
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name])
    assert Store(exported.run / "data/test").space == again.space
