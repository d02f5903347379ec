"""Which configurations can be imported and what the others get to read; names and shapes are those of transformers."""

import json
from pathlib import Path

import pytest
import torch

from megatron_soda.config import load_recipe
from megatron_soda.config.model import PRESETS
from megatron_soda.errors import SodaError
from megatron_soda.hf.qwen3 import from_config, hf_config, our_shape, parts, shapes
from megatron_soda.vocab import LLAMA3

LLAMA3_ROPE = hf_config(load_recipe(None, ["preset=135m"]).model, LLAMA3, 4096).rope_parameters


def write(folder: Path, **changes: object) -> Path:
    values = hf_config(load_recipe(None, ["preset=135m"]).model, LLAMA3, 4096).to_dict() | changes
    path = folder / "config.json"
    path.write_text(json.dumps({name: value for name, value in values.items() if value != "left out"}))
    return path


@pytest.mark.parametrize("preset", PRESETS)
def test_there_and_back(tmp_path, preset):
    model = load_recipe(None, [f"preset={preset}"]).model
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf_config(model, LLAMA3, 4096).to_dict()))
    settings, config = from_config(path)
    back = load_recipe(None, settings).model
    for name in ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "head_dim"):
        assert getattr(back, name) == getattr(model, name)
    same = ("tie_embeddings", "norm_epsilon", "rope_theta", "rope_scaling_factor")
    assert [getattr(back, name) for name in same] == [getattr(model, name) for name in same]
    assert config.vocab_size == LLAMA3.size


def test_names_and_shapes_are_those_of_transformers():
    from transformers import Qwen3ForCausalLM

    for preset in ("tiny", "150m", "600m-prelim"):
        model = load_recipe(None, [f"preset={preset}"]).model
        with torch.device("meta"):
            theirs = Qwen3ForCausalLM(hf_config(model, LLAMA3, 4096))
        assert shapes(model, LLAMA3.size) == {n: tuple(p.shape) for n, p in theirs.named_parameters()}


def test_split_and_join_are_inverse():
    model = load_recipe(None, ["preset=tiny", "model.head_dim=48"]).model
    ours = {part: torch.randn(our_shape(part, shapes(model, 20))) for part in parts(model)}
    for part, tensor in ours.items():
        theirs = part.split(tensor, model, 20)
        assert [tuple(t.shape) for t in theirs] == [shapes(model, 20)[name] for name in part.theirs]
        assert torch.equal(part.join(theirs, model, 20), tensor)
    (table,) = (t for part, t in ours.items() if part.name == "output_layer.weight")
    part = next(part for part in ours if part.name == "output_layer.weight")
    assert part.join([table], model, 24)[20:].abs().sum() == 0
    assert torch.equal(part.split(part.join([table], model, 24), model, 20)[0], table)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, r"a model of type 'llama'"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, r"only Qwen3ForCausalLM can be imported"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, r"has auto_map"),
        ({"quantization_config": {"bits": 4}}, r"has quantization_config"),
        ({"num_hidden_layers": 10**12}, r"num_hidden_layers is 1000000000000, not a whole number from 1 to 4,096"),
        ({"hidden_size": "512"}, r"hidden_size is '512', not a whole number"),
        ({"vocab_size": -1}, r"vocab_size is -1"),
        ({"hidden_act": "gelu"}, r"hidden_act is 'gelu'; only 'silu'"),
        ({"attention_bias": True}, r"attention_bias is True; only False"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1"),
        ({"use_sliding_window": True}, r"use_sliding_window is True"),
        ({"layer_types": ["sliding_attention"] * 15}, r"layer_types are \['sliding_attention'\]"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, r"scaled by .*yarn"),
        ({"rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 2.0}}, r"scaled by .*low_freq_factor': 2\.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1000.5}}, r"rope_theta is 1000\.5"),
        ({"rope_parameters": 5}, r"not the configuration of a Qwen3"),
    ],
)
def test_what_cannot_be_imported(tmp_path, changes, said):
    with pytest.raises(SodaError, match=said):
        from_config(write(tmp_path, **changes))


def test_files_that_are_no_config(tmp_path):
    path = tmp_path / "config.json"
    for text in ("", "[]", "{", '{"model_type": 7}', "null"):
        path.write_text(text)
        with pytest.raises(SodaError, match=r"config\.json: "):
            from_config(path)
