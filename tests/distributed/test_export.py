"""A checkpoint of any layout becomes a Qwen3 whose logits are ours."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megatron_soda.config import save_recipe
from megatron_soda.errors import SodaError
from megatron_soda.files import write_json, write_sealed
from megatron_soda.hf.card import update_card
from megatron_soda.hf.load import load_model, read_export
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from tests.distributed.test_checkpoint_files import reseal
from tests.distributed.test_layouts import train
from tests.helpers import run_tool, small_recipe, write_data
from tests.test_tokenizer import SENTENCES


@pytest.fixture(scope="module")
def real_text_data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    train_sentencepiece(folder / "text_tokenizer.model", SENTENCES, 310)
    text = TextTokenizer(folder / "text_tokenizer.model")
    space = text.space(4, 16)
    write_data(folder, space=space)
    # Random ids are no text that a tokenizer would give: write real sentences for the comparison of ids.
    from data_prep import interleave
    from megatron_soda.data.store import write_store

    rng = np.random.default_rng(0)
    documents = [interleave.text_first([(text.encode(s), rng.integers(0, 16, (5, 4)))], space) for s in SENTENCES[:4]]
    write_store(folder / "test", documents * 3, space)
    write_json(folder / "codec.json", {"name": "none", "fingerprint": "none", "arguments": {"spec": "embedded"}})
    return folder


def export(run: str, data: str, overrides: list[str], swap: bool = False) -> str:
    """On a rank of the pool. `swap` exchanges two matrices of the export, a mistake that it must notice."""
    from unittest import mock

    from megatron_soda.hf import export as module
    from megatron_soda.hf.qwen3 import Part

    split = Part.split

    def swapped(part: Part, *arguments):
        result = split(part, *arguments)
        return result[::-1] if part.kind == "gate_up" and part.layer == 0 else result

    with mock.patch.object(Part, "split", swapped if swap else split):
        return str(module.export(small_recipe(Path(run), Path(data), *overrides)))


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (1, ["model.tie_embeddings=true", "model.rope_scaling_factor=1"]),
        (1, ["precision.dtype=bf16"]),
    ],
    ids=["one", "tp2", "pp2", "tied", "bf16"],
)
def test_transformers_gives_our_logits(pool, real_text_data, tmp_path, world, overrides):
    from transformers import AutoConfig, AutoModelForCausalLM

    pool.run(world, train, str(tmp_path), str(real_text_data), overrides)
    (folder,) = pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
    described = json.loads((Path(folder) / "soda.json").read_text())
    assert described["max_logit_difference"] < (0.25 if "precision.dtype=bf16" in overrides else 1e-4)
    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.vocab_size == TextTokenizer(real_text_data / "text_tokenizer.model").space(4, 16).size
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    # The exported model knows what training knew: its loss on the training stream is near the last one logged.
    from megatron_soda.data.store import Store

    store = Store(real_text_data / "train")
    with torch.no_grad():
        losses = []
        for i in range(40):
            ids = torch.tensor(store.document(i)[None].astype(np.int64))
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert float(torch.cat(losses).mean()) == pytest.approx(logged[-2]["loss"], abs=0.35)
    assert not list(Path(folder).rglob("*.bin"))


def test_any_checkpoint_goes_anywhere_by_megatrons_flags(pool, real_text_data, tmp_path):
    """tools/convert_checkpoint.py: of a run the newest checkpoint, or the one that is named."""
    run = tmp_path / "run"
    pool.run(1, train, str(run), str(real_text_data), [])
    (folder,) = pool.run(1, export, str(run), str(real_text_data), [])
    save_recipe(small_recipe(run, real_text_data), run / "recipe.yaml")
    for load, step in ((run, 6), (run / "checkpoints" / "step_00000003", 3)):
        flags = ["--model-type", "GPT", "--loader", "core", "--saver", "hf", "--load-dir", load]
        flags = ["convert_checkpoint.py", *map(str, flags), "--save-dir", str(tmp_path / "out" / f"{step}")]
        ((status, _, said),) = pool.run(1, run_tool, *flags)
        assert status == 0, said
        assert read_export(tmp_path / "out" / f"{step}")["step"] == step
    of_export = (Path(folder) / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "6" / "model.safetensors").read_bytes() == of_export
    assert (tmp_path / "out" / "3" / "model.safetensors").read_bytes() != of_export
    back = ["--model-type", "GPT", "--loader", "hf", "--saver", "core", "--load-dir", tmp_path / "out" / "6"]
    flags = ["convert_checkpoint.py", *map(str, back), "--save-dir", str(tmp_path / "again")]
    ((status, _, said),) = pool.run(1, run_tool, *flags)
    assert status == 0, said
    (again,) = pool.run(1, export_run, str(tmp_path / "again"))
    assert (Path(again) / "model.safetensors").read_bytes() == of_export


def export_run(run: str) -> str:
    """On a rank of the pool: a run by its own recipe."""
    from megatron_soda.commands.resolve import resolve
    from megatron_soda.hf.export import export

    return str(export(resolve(run, [])))


def test_others_load_the_folder_as_it_is(pool, real_text_data, tmp_path):
    """transformers by its own classes, and vLLM, which takes every *.safetensors at the top for the model's."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    data = tmp_path / "data"
    shutil.copytree(real_text_data, data)
    save_file({"books": torch.ones(3)}, data / "codec.safetensors")
    pool.run(1, train, str(tmp_path), str(data), ["training.steps=1"])
    (folder,) = map(Path, pool.run(1, export_for_others, str(tmp_path), str(data)))
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= set(file.keys())
    assert found == {name for name, _ in model.named_parameters()}
    assert sorted(p.name for p in (folder / "codec").iterdir()) == ["codec.json", "codec.safetensors"]
    loaded = load_model(folder)
    assert loaded.codec == folder / "codec"
    space = loaded.space
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [space.eos, space.text_end, space.audio_end]
    assert AutoTokenizer.from_pretrained(folder).eos_token_id == space.eos
    assert oct(folder.stat().st_mode & 0o777) == "0o755"
    for path in folder.rglob("*"):
        assert oct(path.stat().st_mode & 0o777) == ("0o755" if path.is_dir() else "0o644"), path
    for name in ("codec.json", "codec.safetensors"):  # earlier versions wrote the codec beside the model
        (folder / "codec" / name).rename(folder / name)
    (folder / "codec").rmdir()
    described = json.loads((folder / "soda.json").read_text())
    described["files"] = {name.removeprefix("codec/"): entry for name, entry in described["files"].items()}
    write_sealed(folder / "soda.json", {name: value for name, value in described.items() if name != "crc32"})
    assert load_model(folder).codec == folder
    described["files"]["../data/codec.json"] = [1, ""]
    write_sealed(folder / "soda.json", {name: value for name, value in described.items() if name != "crc32"})
    with pytest.raises(SodaError, match=r"soda\.json: not the description"):
        load_model(folder)


def export_for_others(run: str, data: str) -> str:
    """On a rank of the pool, whose files would be nobody else's."""
    import os

    before = os.umask(0o077)
    try:
        return export(run, data, ["training.steps=1"])
    finally:
        os.umask(before)


def test_all_of_a_checkpoint_is_exported(pool, real_text_data, tmp_path):
    """A tensor that is lacking, or has no place in a Qwen3, is an error, not a silent gap."""
    pool.run(1, train, str(tmp_path), str(real_text_data), ["training.steps=1"])
    index = tmp_path / "checkpoints" / "step_00000001" / "index.json"
    whole = json.loads(index.read_text())

    def with_changes(change) -> None:
        changed = json.loads(json.dumps(whole))
        change(changed["tensors"])
        index.write_text(json.dumps(changed))
        reseal(index.parent)

    name = "decoder.layers.mlp.linear_fc2.weight"
    for change, said in (
        (lambda tensors: tensors.pop(name), r"decoder\.layers\.mlp\.linear_fc2\.weight is None, and should be"),
        (lambda tensors: tensors.update({"decoder.extra": tensors[name]}), r"no place for: decoder\.extra"),
    ):
        with_changes(change)
        with pytest.raises(RuntimeError, match=said):
            pool.run(1, export, str(tmp_path), str(real_text_data), ["training.steps=1"])
        assert not (tmp_path / "hf").exists()


def test_the_model_card(pool, real_text_data, tmp_path):
    overrides = ["training.steps=1", "name=my soda"]
    pool.run(1, train, str(tmp_path), str(real_text_data), overrides)
    (folder,) = map(Path, pool.run(1, export, str(tmp_path), str(real_text_data), overrides))
    card = (folder / "README.md").read_text()
    model = load_model(folder)
    count = sum(p.numel() for p in model.model.parameters())
    for said in (
        "# my soda",
        f"{count:,}, of which",
        "step 1, 256 tokens",
        "Not evaluated yet",
        "1 steps of 8 windows",
    ):
        assert said in card, card
    results = {"nll": {"all": {"model_nats": 1.25, "unigram_nats": 2.5}}, "split": "test", "documents": 3}
    update_card(folder, results)
    now = (folder / "README.md").read_text()
    assert "| All tokens | 1.2500 | 2.5000 |" in now
    assert "Not evaluated yet" not in now
    assert now.partition("<!--")[0] == card.partition("<!--")[0]
    update_card(folder, results)
    assert (folder / "README.md").read_text() == now
    (folder / "README.md").write_text("my own words")
    update_card(folder, results)
    assert (folder / "README.md").read_text() == "my own words"
    assert load_model(folder).step == 1  # a card may be written anew
    write_json(tmp_path / "eval.json", {"export": model.key, **results})
    shutil.rmtree(folder)
    pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
    assert "| All tokens | 1.2500 | 2.5000 |" in (folder / "README.md").read_text()
    for damaged in ({"export": model.key, "nll": {"classes": 5, "all": {"model_nats": None}}}, {"export": "another"}):
        write_json(tmp_path / "eval.json", damaged)
        shutil.rmtree(folder)
        pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
        assert "1.25" not in (folder / "README.md").read_text()


def test_an_export_of_another_training_is_not_served(pool, real_text_data, tmp_path):
    """Trained anew in the same folder to the same step: the step says nothing about the weights."""
    overrides = ["training.steps=1", "checkpoint.save_every=1"]
    weights = tmp_path / "hf" / "model.safetensors"
    seen = set()
    for seed in (1, 2):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        pool.run(1, train, str(tmp_path), str(real_text_data), [*overrides, f"seed={seed}"])
        pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
        seen.add(weights.read_bytes())
    assert len(seen) == 2
    described = (tmp_path / "hf" / "soda.json").stat().st_mtime_ns
    pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
    assert (tmp_path / "hf" / "soda.json").stat().st_mtime_ns == described  # skipped

    whole = weights.read_bytes()
    for path, damage in (
        (weights, whole[:-100]),
        (weights, whole[:-1] + bytes([whole[-1] ^ 1])),
        (tmp_path / "hf" / "soda.json", b'{"step": 1}'),
        (tmp_path / "hf" / "tokenizer.json", None),
    ):
        path.unlink() if damage is None else path.write_bytes(damage)
        pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
        assert weights.read_bytes() == whole
        assert read_export(tmp_path / "hf")["step"] == 1

    for other in ("data.sequence_length=16", "name=other"):  # what the export says of itself
        before = (tmp_path / "hf" / "soda.json").read_text()
        pool.run(1, export, str(tmp_path), str(real_text_data), [*overrides, other])
        assert (tmp_path / "hf" / "soda.json").read_text() != before
    data = tmp_path / "data"
    shutil.copytree(real_text_data, data)
    write_json(data / "codec.json", {"name": "none", "fingerprint": "other", "arguments": {"spec": "embedded"}})
    pool.run(1, export, str(tmp_path), str(data), overrides)
    assert "other" in (tmp_path / "hf" / "codec" / "codec.json").read_text()


CHANGES = {
    "hidden_size": 64,
    "num_key_value_heads": 4,
    "num_hidden_layers": 3,
    "vocab_size": 9999,
    "rms_norm_eps": 0.1,
    "hidden_act": "relu",
    "tie_word_embeddings": True,
    "model_type": "llama",
    "rope_parameters": {"rope_type": "unheard of"},
    "max_position_embeddings": None,
}


def test_a_model_that_is_not_as_exported_is_not_loaded(pool, real_text_data, tmp_path):
    overrides = ["training.steps=1", "checkpoint.save_every=1"]
    pool.run(1, train, str(tmp_path), str(real_text_data), overrides)
    (folder,) = map(Path, pool.run(1, export, str(tmp_path), str(real_text_data), overrides))
    assert load_model(folder).step == 1
    config, described = ((folder / name).read_text() for name in ("config.json", "soda.json"))
    for name, value in CHANGES.items():
        (folder / "config.json").write_text(json.dumps(json.loads(config) | {name: value}))
        with pytest.raises(SodaError, match=rf"config\.json: {name} is "):
            load_model(folder)
    (folder / "config.json").write_text(json.dumps(json.loads(config) | {"attention_dropout": 0.5}))
    with pytest.raises(SodaError, match=r"config\.json: has \d+ bytes, not"):
        load_model(folder)
    (folder / "config.json").write_text(config)
    for name in json.loads(described)["files"]:
        whole = (folder / name).read_bytes()
        for damage in (whole[: len(whole) // 2], whole[:-1] + bytes([whole[-1] ^ 1]), None):
            (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
            with pytest.raises(SodaError, match=name):
                load_model(folder)
        (folder / name).write_bytes(whole)
    for change in ({"step": "one"}, {"space": [1]}, {"files": {"config.json": 5}}, {"config": 7}, {"files": None}, {}):
        write_sealed(folder / "soda.json", json.loads(described) | change)
        if change:
            with pytest.raises(SodaError, match=r"soda\.json: not the description"):
                load_model(folder)
    assert load_model(folder).step == 1


def test_earlier_checkpoints_are_heard_with_their_own_weights(pool, real_text_data, tmp_path):
    overrides = ["training.steps=6", "checkpoint.save_every=1", "checkpoint.keep_last=6"]
    pool.run(1, train, str(tmp_path), str(real_text_data), overrides)
    (folder,) = pool.run(1, export, str(tmp_path), str(real_text_data), overrides)
    (heard,) = pool.run(1, _earlier, str(tmp_path), str(real_text_data), overrides, folder)
    own = {6: _digest(load_model(Path(folder)).model)}
    for step in (2, 4):
        run = tmp_path / f"up to {step}"
        shutil.copytree(tmp_path / "checkpoints" / f"step_{step:08d}", run / "checkpoints" / f"step_{step:08d}")
        own[step] = _digest(load_model(Path(pool.run(1, export, str(run), str(real_text_data), overrides)[0])).model)
    assert heard == {2: own[2], 4: own[4]}
    assert len(set(own.values())) == 3
    damaged = tmp_path / "checkpoints" / "step_00000004" / "__0_0.distcp"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert pool.run(1, _earlier, str(tmp_path), str(real_text_data), overrides, folder) == [{2: own[2]}]


def _digest(network) -> str:
    state = sorted(network.state_dict().items())
    return hashlib.sha256(b"".join(v.float().contiguous().numpy().tobytes() for _, v in state)).hexdigest()


def _earlier(run: str, data: str, overrides: list[str], folder: str) -> dict[int, str]:
    """On a rank of the pool: a digest of the weights of each earlier model, taken while it is the one at hand."""
    from megatron_soda.inference.earlier import earlier_models

    recipe = small_recipe(Path(run), Path(data), *overrides)
    return {step: _digest(network) for step, network in earlier_models(recipe, load_model(Path(folder)))}


def test_a_wrong_export_is_refused(pool, real_text_data, tmp_path):
    pool.run(1, train, str(tmp_path), str(real_text_data), [])
    with pytest.raises(RuntimeError, match="transformers' logits differ from ours"):
        pool.run(1, export, str(tmp_path), str(real_text_data), [], True)
    assert not (tmp_path / "hf").exists()


def test_no_checkpoint_and_another_model(pool, real_text_data, tmp_path):
    with pytest.raises(RuntimeError, match="no checkpoint in it"):
        pool.run(1, export, str(tmp_path), str(real_text_data), [])
    pool.run(1, train, str(tmp_path), str(real_text_data), ["training.steps=1"])
    with pytest.raises(RuntimeError, match=r"a checkpoint of another model: its model\.num_layers is 4"):
        pool.run(1, export, str(tmp_path), str(real_text_data), ["model.num_layers=2"])
    with pytest.raises(RuntimeError, match=r"a checkpoint of another model: its model\.hidden_size"):
        pool.run(1, train, str(tmp_path), str(real_text_data), ["model.hidden_size=64"])


def test_stores_of_another_codec_are_refused(pool, real_text_data, tmp_path):
    """All sizes agree, and every id means something else."""
    import shutil

    from megatron_soda.commands.resolve import resolve
    from megatron_soda.data.store import Store, write_store
    from megatron_soda.errors import SodaError
    from megatron_soda.evaluation.run import evaluate
    from megatron_soda.hf.load import load_model
    from megatron_soda.inference.held_out import held_out_rows

    one_step = ["training.steps=1"]
    pool.run(1, train, str(tmp_path / "run"), str(real_text_data), one_step)
    (folder,) = pool.run(1, export, str(tmp_path / "run"), str(real_text_data), one_step)
    made_by = {"codec": "none", "tokenizer": "none"}
    assert json.loads((Path(folder) / "soda.json").read_text())["made_by"] == made_by
    model = load_model(Path(folder))
    assert model.made_by == made_by
    for kind in made_by:
        other = tmp_path / kind
        shutil.copytree(real_text_data, other)
        for side in ("train", "test"):
            store = Store(real_text_data / side)
            made = [store.document(i) for i in range(len(store))]
            write_store(other / side, made, store.space, **{**made_by, kind: "fresh"})
        said = f"made by {kind} fresh, the model .* has {kind} none"
        with pytest.raises(SodaError, match=said):
            evaluate(resolve(folder, [f"data.path={other}", "evaluate.suite=[nll]"]), Path(folder))
        with pytest.raises(SodaError, match=said):
            held_out_rows(other, "test", model)
        again = tmp_path / f"run of {kind}"
        shutil.copytree(tmp_path / "run" / "checkpoints", again / "checkpoints")
        with pytest.raises(RuntimeError, match=said):
            pool.run(1, export, str(again), str(other), one_step)
    write_json(Path(folder) / "soda.json", {"name": "x", "step": 1, "space": model.space.to_dict()})
    with pytest.raises(SodaError, match="was not written by this version"):
        load_model(Path(folder))
