"""What `soda import` refuses, and that it leaves nothing behind then."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_soda.errors import SodaError
from megatron_soda.hf.tokenizer import extend_tokenizer, split_tokenizer
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import MARKERS
from tests.qwen3 import random_qwen3
from tests.test_tokenizer import SENTENCES, dummy_bpe


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder as SODA's released ones, tied."""
    root = tmp_path_factory.mktemp("whole")
    train_sentencepiece(root / "text.model", SENTENCES, 310)
    space = extend_tokenizer(root / "text.model", root / "soda", 4, 16)
    (root / "soda" / "text_tokenizer.json").unlink()
    random_qwen3(root / "soda", rows=space.size, tie_word_embeddings=True)
    return root / "soda"


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    return shutil.copytree(whole, tmp_path / "soda")


def bring(folder: Path, *overrides: str, shape: tuple[int, int] | None = (4, 16)) -> Path:
    from megatron_soda.hf.importing import import_model

    return import_model(folder, [f"run={folder.parent / 'run'}", *overrides], shape)


def change_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nan(folder: Path) -> None:
    bad = load_file(folder / "model.safetensors")["model.layers.2.mlp.down_proj.weight"]
    bad[-1, -1] = torch.nan
    change_weights(folder, model__layers__2__mlp__down_proj__weight=bad)


def rename_a_marker(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(MARKERS[1], "<|text_stop|>"))


def one_token_more(folder: Path) -> None:
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    last = spec["added_tokens"][-1]
    spec["added_tokens"].append({**last, "id": last["id"] + 1, "content": "<|more|>"})
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / "config.json").unlink(), r"soda: no config\.json in it"),
        (lambda f: (f / "tokenizer.json").unlink(), r"soda: no tokenizer\.json in it"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), r"neither a sentencepiece model nor a tokenizer\.json"),
        (lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors and no"),
        (lambda f: change_weights(f, model__norm__weight=None), r"the model lacks model\.norm\.weight"),
        (lambda f: change_weights(f, score__weight=torch.ones(3)), r"has unknown tensors: score\.weight"),
        (lambda f: change_weights(f, model__norm__weight=torch.ones(31)), r"model\.norm\.weight is \[31\], and config"),
        (
            lambda f: change_weights(f, lm_head__weight=torch.ones(378, 32)),
            r"lm_head\.weight differs from model\.embed_tok",
        ),
        (nan, r"model\.layers\.2\.mlp\.down_proj\.weight has values that are not finite"),
        (lambda f: change_json(f / "config.json", num_hidden_layers=4), r"must be equal to the number of"),
        (
            lambda f: change_json(f / "config.json", intermediate_size=49),
            r"gate_proj\.weight is \[48, 32\], and config",
        ),
        (lambda f: change_json(f / "config.json", tie_word_embeddings=False), r"the model lacks lm_head\.weight"),
        (lambda f: random_qwen3(f, rows=300), r"has 378 tokens, and the model's tables have 300 rows"),
        (rename_a_marker, r"its markers are not in SODA's order: \{"),
        (one_token_more, r"has other tokens behind the 64 audio codes"),
    ],
)
def test_what_is_refused(folder, damage, said):
    damage(folder)
    with pytest.raises(SodaError, match=said):
        bring(folder)
    checkpoints = folder.parent / "run" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.iterdir())


@pytest.mark.parametrize(
    ("overrides", "shape", "said"),
    [
        (["model.num_layers=2"], (4, 16), r"model\.num_layers=2: the model in .* has 3\. Leave it out"),
        (["model.rope_theta=7"], (4, 16), r"model\.rope_theta=7: the model in"),
        (["model.hidden=7"], (4, 16), r"unknown key model\.hidden"),
        ([], None, r"has 64 audio codes; say how many codebooks these are \(--codebooks, --entries\)"),
        ([], (8, 16), r"has 64 audio codes; say"),
    ],
)
def test_settings_that_do_not_fit(folder, overrides, shape, said):
    with pytest.raises(SodaError, match=said):
        bring(folder, *overrides, shape=shape)


def test_a_run_has_to_be_named(folder):
    from megatron_soda.hf.importing import import_model

    with pytest.raises(SodaError, match="give a run folder"):
        import_model(folder, ["name=x"])


def test_tables_that_are_saved_twice_and_equal(folder):
    change_weights(folder, lm_head__weight=load_file(folder / "model.safetensors")["model.embed_tokens.weight"].clone())
    assert bring(folder).name == "step_00000000"


def test_untied_tables_cannot_be_tied(folder):
    change_json(folder / "config.json", tie_word_embeddings=False)
    change_weights(folder, lm_head__weight=torch.ones(378, 32))
    with pytest.raises(SodaError, match=r"model\.tie_embeddings=True: the model in .* has False"):
        bring(folder, "model.tie_embeddings=true")


def test_the_recipe_of_the_run(folder):
    from megatron_soda.commands.resolve import resolve

    change_json(folder / "config.json", max_position_embeddings=300)
    bring(folder, "training.steps=7")
    recipe = resolve(folder.parent / "run", [])
    assert (recipe.name, recipe.training.steps, recipe.data.sequence_length) == ("soda", 7, 300)
    assert recipe.precision.dtype == "fp32"
    assert TextTokenizer(recipe.prepare.tokenizer).size == 310


@pytest.mark.parametrize("kind", ["sentencepiece", "bpe"])
def test_the_text_part_of_a_tokenizer(tmp_path, kind):
    """Taken out of the whole it is the one that was extended: the same ids for any text, and room for the rest."""
    source = tmp_path / ("text.model" if kind == "sentencepiece" else "text.json")
    if kind == "sentencepiece":
        train_sentencepiece(source, SENTENCES, 310)
    else:
        dummy_bpe(source, 300, {0: "<|begin_of_text|>", 1: "<|end_of_text|>", 2: "<|eot_id|>"})
    extend_tokenizer(source, tmp_path / "whole", 4, 16)
    spec, space = split_tokenizer(tmp_path / "whole" / "tokenizer.json", (4, 16)) or pytest.fail("no markers")
    (tmp_path / "part.json").write_text(json.dumps(spec))
    part, before = TextTokenizer(tmp_path / "part.json"), TextTokenizer(tmp_path / "whole")
    assert (part.size, part.bos, part.eos) == (before.size, before.bos, before.eos)
    assert space == before.space(4, 16)
    for text in [*SENTENCES[:50], "ab cab", " <|eot_id|> x", "Добрый"]:
        assert part.encode(text) == before.encode(text)
    assert split_tokenizer(tmp_path / "part.json", None) is None
