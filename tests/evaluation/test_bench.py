"""What suites measure with."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_soda.codecs import description
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.bench import Bench
from megatron_soda.files import read_json, write_json
from megatron_soda.hf.load import load_model
from megatron_soda.inference import own
from megatron_soda.inference import run as inference_run
from tests.exported import FakeCodec

LOAD = description._load  # the fixture `exported` replaces it


class Placed(FakeCodec):
    """Its codes are others on another device, as those of neural codecs may be."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.fingerprint = f"on {device}"


@pytest.fixture
def codec_folder(tmp_path, monkeypatch):
    """With the description that `soda prepare` writes, which is that of the codec on the CPU."""
    monkeypatch.setattr(description, "load_codec", lambda spec, device: Placed(device))
    described = CodecDescription.of(Placed("cpu"), {"spec": "mimi"})
    write_json(tmp_path / "codec.json", described.to_dict())
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_codec_is_where_the_model_is(codec_folder, device):
    model: Any = SimpleNamespace(codec=codec_folder, device=torch.device(device), model=torch.nn.Identity())
    codec: Any = Bench(load_recipe(None), codec_folder, model).codec
    assert codec.device == device


def test_another_codec_is_refused_on_any_device(codec_folder):
    values = read_json(codec_folder / "codec.json") | {"fingerprint": "on cuda"}
    write_json(codec_folder / "codec.json", values)
    for device in ("cpu", "cuda"):
        with pytest.raises(SodaError, match="its tokens were made by codec on cuda, but the installed one is on cpu"):
            description.load_data_codec(codec_folder, device)


def test_so_it_is_in_generation(exported, monkeypatch):
    asked = []
    monkeypatch.setattr(description, "load_codec", lambda spec, device: asked.append(device) or FakeCodec())
    monkeypatch.setattr(description, "_load", LOAD)
    model = load_model(exported.folder)
    model.device = torch.device("cpu", 7)
    for module in (own, inference_run):
        monkeypatch.setattr(module, "load_model", lambda folder: model)
        monkeypatch.setattr(module, "Studio", lambda *_: 1 / 0)  # that is all of it
    for start in (own.open_studio, lambda folder: inference_run.generate(exported.recipe(), folder)):
        with pytest.raises(ZeroDivisionError):
            start(exported.folder)
    assert asked == ["cpu", "cpu:7"] * 2
