"""What suites measure with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_soda.codecs import description, load_codec
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import load_recipe
from megatron_soda.evaluation.bench import Bench
from megatron_soda.files import write_json
from megatron_soda.hf.load import load_model
from megatron_soda.inference import own
from megatron_soda.inference import run as inference_run
from tests.codecs.test_codecs import mimi_folder  # noqa: F401  a fixture
from tests.exported import FakeCodec


def test_the_codec_is_where_the_model_is(tmp_path, mimi_folder):  # noqa: F811
    """On torch's device without memory: there may be no other one here."""
    arguments = {"spec": "mimi", "path": mimi_folder, "codebooks": 4}
    write_json(tmp_path / "codec.json", CodecDescription.of(load_codec(**arguments), arguments).to_dict())
    for device in ("cpu", "meta"):
        model: Any = SimpleNamespace(codec=tmp_path, device=torch.device(device), model=torch.nn.Identity())
        codec: Any = Bench(load_recipe(None), tmp_path, model).codec
        assert {parameter.device.type for parameter in codec._model.parameters()} == {device}


def test_so_it_is_in_generation(exported, monkeypatch):
    asked = []
    monkeypatch.setattr(description, "_load", lambda arguments, folder, device: asked.append(device) or FakeCodec())
    model = load_model(exported.folder)
    model.device = torch.device("cpu", 7)
    for module in (own, inference_run):
        monkeypatch.setattr(module, "load_model", lambda folder: model)
        monkeypatch.setattr(module, "Studio", lambda *_: 1 / 0)  # that is all of it
    for start in (own.open_studio, lambda folder: inference_run.generate(exported.recipe(), folder)):
        with pytest.raises(ZeroDivisionError):
            start(exported.folder)
    assert asked == ["cpu:7"] * 2
