"""A Qwen3 of Hugging Face becomes a checkpoint that any layout reads, and comes out again as it was."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron_soda.data.store import write_store
from megatron_soda.hf.tokenizer import extend_tokenizer
from megatron_soda.hf.weights import Weights
from megatron_soda.tokenizer import TextTokenizer, data_tokenizer, train_sentencepiece
from megatron_soda.vocab import LLAMA3, MARKERS, TokenSpace
from tests.distributed.test_checkpoint import train_heard
from tests.distributed.test_layouts import LAYOUTS, losses
from tests.helpers import documents
from tests.qwen3 import random_qwen3, write_soda
from tests.test_tokenizer import SENTENCES, dummy_bpe

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SIZES = ["model.num_layers=3", "model.hidden_size=32", "model.ffn_hidden_size=48", "model.head_dim=16"]
SIZES += ["model.num_attention_heads=4", "model.num_query_groups=2"]


def soda_folder(folder: Path) -> TokenSpace:
    """A tokenizer of a text part, the markers and 4 codebooks of 16, as its user would have it: one tokenizer.json."""
    train_sentencepiece(folder.parent / "text.model", SENTENCES, 310)
    space = extend_tokenizer(folder.parent / "text.model", folder, 4, 16)
    (folder / "text_tokenizer.json").unlink()
    return space


def run_import(folder: str, overrides: list[str], shape: tuple[int, int] | None, rows: str) -> str:
    """On a rank of the pool."""
    from megatron_soda.hf.importing import import_model

    return str(import_model(Path(folder), overrides, shape, rows))  # type: ignore[arg-type]


def run_export(run: str, overrides: list[str]) -> str:
    from megatron_soda.commands.resolve import resolve
    from megatron_soda.hf.export import export

    return str(export(resolve(run, overrides)))


def bring(pool, folder: Path, run: Path, *overrides: str, shape=(4, 16), rows="means") -> Path:
    return Path(pool.run(1, run_import, str(folder), [f"run={run}", *overrides], shape, rows)[0])


def same_tensors(a: Path, b: Path, rows: int | None = None) -> None:
    """Bit by bit, names and formats too; of tables the first `rows`."""
    first, second = Weights(a), Weights(b)
    assert first.shapes.keys() == second.shapes.keys()
    for name in first.shapes:
        x, y = first.read(name), second.read(name)
        x = x[:rows] if "embed" in name or "lm_head" in name else x
        assert x.dtype == y.dtype
        assert torch.equal(x, y), name


CASES = {
    "released": {"tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 4096},
    "tied": {"tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}},
    "wide heads": {"head_dim": 32, "rms_norm_eps": 1e-6},
    "narrow heads, no groups": {"head_dim": 8, "num_key_value_heads": 4},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        ("released", torch.bfloat16),
        ("tied", torch.float32),
        ("wide heads", torch.float32),
        ("narrow heads, no groups", torch.bfloat16),
    ],
)
def test_an_export_of_an_import_is_the_same_model(pool, tmp_path, case, dtype):
    folder, run = tmp_path / "soda", tmp_path / "run"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size, dtype=dtype, shard="20KB", **CASES[case])
    assert len(list(folder.glob("*.safetensors"))) > 3
    bring(pool, folder, run)
    (out,) = pool.run(1, run_export, str(run), [])
    same_tensors(folder, Path(out))
    model, loading = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert model.dtype == dtype
    ids = torch.randint(3, space.size, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    for name in ("rope_parameters", "head_dim", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert getattr(model.config, name) == getattr(theirs.config, name), name
    ours, own = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(folder)
    string = f"{MARKERS[0]}{SENTENCES[0]}{MARKERS[1]}{MARKERS[2]}\ue000\ue010\ue020\ue030{MARKERS[3]}"
    assert ours(string)["input_ids"] == own(string)["input_ids"]


def test_configs_of_earlier_transformers(pool, tmp_path):
    """Released models have rope_theta and rope_scaling by themselves."""
    folder = tmp_path / "soda"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size, **CASES["released"])
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    bring(pool, folder, tmp_path / "run")
    (out,) = pool.run(1, run_export, str(tmp_path / "run"), [])
    assert json.loads((Path(out) / "config.json").read_text())["rope_parameters"] == LLAMA3_ROPE


@pytest.mark.full
def test_the_shape_of_released_models(pool, tmp_path):
    """144,644 ids, untied, in bf16."""
    folder, run = tmp_path / "soda-tiny", tmp_path / "run"
    write_soda(folder, "tiny", torch.bfloat16, *SIZES)
    checkpoint = bring(pool, folder, run, shape=None)
    saved = json.loads((checkpoint / "checkpoint.json").read_text())
    assert TokenSpace(**saved["space"]) == LLAMA3
    assert data_tokenizer(run / "imported").size == 128_256
    (out,) = pool.run(1, run_export, str(run), [])
    same_tensors(folder, Path(out))


def test_rows_of_no_token_are_left_out(pool, tmp_path):
    folder = tmp_path / "soda"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size + 27)
    bring(pool, folder, tmp_path / "run")
    (out,) = pool.run(1, run_export, str(tmp_path / "run"), [])
    assert Weights(Path(out)).shapes["lm_head.weight"][0] == space.size
    same_tensors(folder, Path(out), space.size)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_weights_in_the_format_that_is_wanted(pool, tmp_path, stored):
    folder, run = tmp_path / "soda", tmp_path / "run"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size, dtype=stored)
    bring(pool, folder, run)
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = Path(pool.run(1, run_export, str(run), [f"export.weights={name}"])[0])
        assert json.loads((out / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
        for tensor in Weights(out).shapes:
            assert torch.equal(Weights(out).read(tensor), Weights(folder).read(tensor).to(dtype))


def test_formats_that_are_mixed_become_float32(pool, tmp_path):
    folder = tmp_path / "soda"
    space = soda_folder(folder)
    model = random_qwen3(folder, rows=space.size, dtype=torch.bfloat16)
    weights = {name: w.half() if "norm" in name else w for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    bring(pool, folder, tmp_path / "run")
    out = Weights(Path(pool.run(1, run_export, str(tmp_path / "run"), [])[0]))
    assert set(out.dtypes.values()) == {"F32"}
    assert all(torch.equal(out.read(name), weight.float()) for name, weight in weights.items())


def test_what_was_exported_is_imported(pool, tmp_path):
    """With the same text tokenizer, its codec, and so the fingerprints of its stores."""
    folder, first, second = tmp_path / "soda", tmp_path / "first", tmp_path / "second"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size)
    bring(pool, folder, first)
    codec = {"name": "none", "fingerprint": "none", "arguments": {}}
    (first / "imported" / "codec.json").write_text(json.dumps(codec))
    (out,) = pool.run(1, run_export, str(first), [])
    bring(pool, Path(out), second, shape=None)
    same_tensors(folder, Path(pool.run(1, run_export, str(second), [])[0]))
    assert json.loads((second / "hf" / "codec" / "codec.json").read_text()) == codec
    said = [json.loads((run / "hf" / "soda.json").read_text())["made_by"] for run in (first, second)]
    assert said[0] == said[1]


# ---- training on


@dataclass
class Imported:
    run: Path
    checkpoint: Path
    data: Path
    sizes: list[str]


@pytest.fixture(scope="module")
def imported(pool, tmp_path_factory) -> Imported:
    """An imported model of 4 layers, and stores of its tokens."""
    root = tmp_path_factory.mktemp("imported")
    space = soda_folder(root / "soda")
    random_qwen3(root / "soda", rows=space.size, num_hidden_layers=4, **CASES["released"])
    checkpoint = bring(pool, root / "soda", root / "run")
    tokenizer = TextTokenizer(root / "run" / "imported").fingerprint
    for side, (count, seed) in {"train": (200, 0), "valid": (40, 1), "test": (40, 2)}.items():
        write_store(root / "data" / side, documents(count, seed, space), space, codec="none", tokenizer=tokenizer)
    sizes = [size.replace("num_layers=3", "num_layers=4") for size in SIZES]
    return Imported(root / "run", checkpoint, root / "data", [*sizes, "model.norm_epsilon=1e-6"])


def train_from(pool, imported: Imported, run: Path, *overrides: str, world: int = 1) -> str:
    ten = ["training.steps=10", "checkpoint.save_every=1", f"training.init_from={imported.checkpoint}"]
    arguments = [*imported.sizes, *ten, *overrides]
    return pool.run(world, train_heard, str(run), str(imported.data), arguments)[0]


def same_weights(pool, a: Path, b: Path) -> bool:
    return pool.run(1, _same_weights, str(a), str(b))[0]


def _same_weights(a: str, b: str) -> bool:
    from megatron_soda.training.checkpoint_stream import TensorReader

    first, second = TensorReader(Path(a)), TensorReader(Path(b))
    assert first.names() == second.names()
    for name in first.names():
        x, y = first.read(name), second.read(name)
        rows = min(len(x), len(y))  # a table may be padded otherwise
        if not torch.equal(x[:rows].to(y.dtype), y[:rows]):
            return False
    return True


@pytest.mark.parametrize(
    "names",
    [("tp2", "pp2", "dp2_distributed"), pytest.param(("vpp2", "tp2pp2", "sp2"), marks=pytest.mark.full)],
    ids=["two ranks", "more"],
)
def test_every_layout_starts_with_the_weights(pool, imported, tmp_path, names):
    """The first step of a warm-up has rate 0: after it the weights are still those that were imported, to the bit, and
    the loss is that of one process. Master weights that were not read anew would show here."""
    out = train_from(pool, imported, tmp_path / "one")
    assert f"from the weights of {imported.checkpoint}" in out
    expected = losses(tmp_path / "one")
    for name in ("one", *names):
        run = tmp_path / name
        if name != "one":
            world, overrides = LAYOUTS[name]
            train_from(pool, imported, run, *overrides, world=world)
        assert same_weights(pool, imported.checkpoint, run / "checkpoints" / "step_00000001"), name
        assert not same_weights(pool, imported.checkpoint, run / "checkpoints" / "step_00000010"), name
        assert losses(run) == pytest.approx(expected, abs=1e-5), name


@pytest.mark.parametrize("overrides", [[], ["parallel.distributed_optimizer=true"]], ids=["plain", "distributed"])
def test_bf16_training_starts_with_the_rounded_weights(pool, imported, tmp_path, overrides):
    train_from(pool, imported, tmp_path, "precision.dtype=bf16", *overrides)
    assert same_weights(pool, imported.checkpoint, tmp_path / "checkpoints" / "step_00000001")


def test_the_imported_run_itself_can_be_trained(pool, imported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(imported.run, run)
    first = [*imported.sizes, "training.steps=4", "checkpoint.save_every=2"]
    assert "from the weights of" in pool.run(1, train_heard, str(run), str(imported.data), first)[0]
    assert "from step 4" in pool.run(1, train_heard, str(run), str(imported.data), [*first, "training.steps=6"])[0]
    shutil.rmtree(run / "hf", ignore_errors=True)
    (out,) = pool.run(1, run_export, str(run), [f"data.path={run}/nothing"])
    assert json.loads((Path(out) / "soda.json").read_text())["step"] == 6
    assert "Training started with the weights of soda." in (Path(out) / "README.md").read_text()


def test_a_trained_checkpoint_gives_its_weights_too(pool, imported, tmp_path):
    train_from(pool, imported, tmp_path / "a")
    trained = tmp_path / "a" / "checkpoints" / "step_00000010"
    train_from(pool, imported, tmp_path / "b", f"training.init_from={trained}", "parallel.tensor=2", world=2)
    assert same_weights(pool, trained, tmp_path / "b" / "checkpoints" / "step_00000001")
    assert losses(tmp_path / "b")[0] == pytest.approx(losses(tmp_path / "b")[1], abs=0.2)
    assert len(losses(tmp_path / "b")) == 10  # its own steps, from the first
    train_from(pool, imported, tmp_path / "b", f"training.init_from={trained}", "training.steps=11")
    with pytest.raises(
        RuntimeError, match=r"did not start with the weights of training\.init_from=.*but with those of"
    ):
        train_from(pool, imported, tmp_path / "b", "training.steps=12")
    moved = tmp_path / "moved"
    shutil.move(trained, moved)
    train_from(pool, imported, tmp_path / "b", f"training.init_from={moved}", "training.steps=12")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.num_layers=2"], r"of another model: its model\.num_layers is 4, the recipe's is 2"),
        (["training.init_from={run}"], r"It is a run; name a checkpoint of it: .*/step_00000000"),
        (["training.init_from={run}/../soda"], r"make a checkpoint of it: soda import .*soda run=RUN"),
        (["training.init_from=nowhere"], r"init_from=nowhere: not a checkpoint"),
        (
            ["training.init_from=", "training.branch_from={run}/checkpoints/step_00000000"],
            r"holds weights alone.*training\.init_from=",
        ),
        (["training.branch_from=x"], r"set one of them"),
    ],
)
def test_what_cannot_be_started_from(pool, imported, tmp_path, overrides, said):
    with pytest.raises(RuntimeError, match=said):
        train_from(pool, imported, tmp_path, *(o.format(run=imported.run) for o in overrides))
    assert not (tmp_path / "checkpoints").exists()


def test_the_model_knows_its_tokenizer(pool, imported, tmp_path):
    data = tmp_path / "data"
    space = TokenSpace(**json.loads((imported.checkpoint / "checkpoint.json").read_text())["space"])
    for side in ("train", "valid"):
        write_store(data / side, documents(40, 0, space), space, codec="none", tokenizer="other")
    other = Imported(imported.run, imported.checkpoint, data, imported.sizes)
    with pytest.raises(RuntimeError, match=r"made by tokenizer other, the model .*step_00000000\) has tokenizer"):
        train_from(pool, other, tmp_path / "run")
    train_from(pool, other, tmp_path / "run", "data.accept=[tokenizer]")


def test_a_damaged_import_is_not_used(pool, imported, tmp_path):
    shutil.copytree(imported.checkpoint, tmp_path / "c")
    whole = (tmp_path / "c" / "__0_0.distcp").read_bytes()
    (tmp_path / "c" / "__0_0.distcp").write_bytes(whole[:-9] + b"damaged!!")
    with pytest.raises(RuntimeError, match="has changed since it was written"):
        train_from(pool, imported, tmp_path / "run", f"training.init_from={tmp_path}/c")


# ---- warm start


TEXT_IDS = 1003


@pytest.fixture
def text_model(tmp_path):
    """As Qwen3 is released: tied, <|endoftext|> for an end, no beginning, and rows that no token has."""
    folder = tmp_path / "qwen"
    folder.mkdir()
    added = dict(enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    dummy_bpe(tmp_path / "tokenizer.json", TEXT_IDS - 3, added).rename(folder / "tokenizer.json")
    rope = {"rope_type": "default", "rope_theta": 1000000.0}
    model = random_qwen3(
        folder,
        rows=1024,
        tie_word_embeddings=True,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
        max_position_embeddings=9000,
    )
    return folder, model


@pytest.mark.parametrize(("rows", "tied"), [("means", True), ("classes", False)])
def test_a_text_model_is_extended(pool, tmp_path, text_model, rows, tied):
    folder, theirs = text_model
    run = tmp_path / "run"
    checkpoint = bring(pool, folder, run, *([] if tied else ["model.tie_embeddings=false"]), rows=rows)
    space = TokenSpace(**json.loads((checkpoint / "checkpoint.json").read_text())["space"])
    assert (space.text_size, space.bos, space.eos, space.size) == (1004, 1003, 1000, 1004 + 4 + 64)
    out = Path(pool.run(1, run_export, str(run), [])[0])
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    assert model.config.tie_word_embeddings == tied
    assert model.config.max_position_embeddings == 4096
    ids = torch.randint(0, TEXT_IDS, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = (m.model(ids).last_hidden_state for m in (theirs, model))
        assert torch.equal(expected, found)
        logits = model(ids).logits[..., :TEXT_IDS], theirs(ids).logits[..., :TEXT_IDS]
    assert torch.allclose(*logits, atol=1e-5, rtol=0)
    for table in (model.model.embed_tokens.weight, model.lm_head.weight):
        known = theirs.model.embed_tokens.weight[:TEXT_IDS].double()
        assert torch.equal(table[:TEXT_IDS].double(), known)
        new = table[TEXT_IDS:].double()
        if rows == "means":
            assert torch.allclose(new, known.mean(0).expand_as(new), atol=1e-6)
        else:
            check_classes(new, known, space)
    text = AutoTokenizer.from_pretrained(out)
    plain = AutoTokenizer.from_pretrained(folder)
    assert text("ab cab", add_special_tokens=False)["input_ids"] == plain("ab cab")["input_ids"]


def check_classes(new: torch.Tensor, known: torch.Tensor, space: TokenSpace) -> None:
    """Rows of a class lie around a vector of their own, and all together are spread as the text rows are."""
    away = ((new - known.mean(0)) / known.std(0)).detach().numpy()
    classes = space.class_table()[TEXT_IDS:]
    centres = np.array([away[classes == k].mean(0) for k in range(2, 2 + space.codebooks)])
    within = np.concatenate([away[classes == 2 + k] - centres[k] for k in range(space.codebooks)])
    assert centres.std() == pytest.approx(0.5**0.5, abs=0.2)
    assert within.std() == pytest.approx(0.5**0.5, abs=0.05)
    assert len(np.unique(away, axis=0)) == len(away)


def test_a_warm_start_is_trained_at_any_layout(pool, tmp_path, text_model):
    folder, _ = text_model
    checkpoint = bring(pool, folder, tmp_path / "run", "model.tie_embeddings=false")
    space = TokenSpace(**json.loads((checkpoint / "checkpoint.json").read_text())["space"])
    for side in ("train", "valid"):
        write_store(tmp_path / "data" / side, documents(60, 0, space), space)
    sizes = [*SIZES, "model.rope_scaling_factor=1", "model.rope_theta=1000000", "model.norm_epsilon=1e-6"]
    imported = Imported(tmp_path / "run", checkpoint, tmp_path / "data", [*sizes, "model.num_layers=3"])
    for name in ("one", "tp2"):
        world, overrides = LAYOUTS.get(name, (1, []))
        train_from(pool, imported, tmp_path / name, *overrides, world=world)
        assert same_weights(pool, checkpoint, tmp_path / name / "checkpoints" / "step_00000001")
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "tp2"), abs=1e-5)


def test_what_is_imported_already(pool, tmp_path):
    folder, run = tmp_path / "soda", tmp_path / "run"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size)
    checkpoint = bring(pool, folder, run)
    before = (checkpoint / "manifest.json").stat().st_mtime_ns
    assert bring(pool, folder, run) == checkpoint
    assert (checkpoint / "manifest.json").stat().st_mtime_ns == before
    random_qwen3(folder, rows=space.size, rms_norm_eps=1e-4)
    with pytest.raises(RuntimeError, match="already has other checkpoints"):
        bring(pool, folder, run)
    shutil.rmtree(checkpoint)
    bring(pool, folder, run)  # one that was removed, or never finished


def test_the_tokenizer_of_an_import_is_its_own(pool, tmp_path):
    folder, run = tmp_path / "soda", tmp_path / "run"
    space = soda_folder(folder)
    random_qwen3(folder, rows=space.size)
    bring(pool, folder, run)
    text = run / "imported" / "text_tokenizer.json"
    text.write_text(text.read_text() + "\n")
    with pytest.raises(RuntimeError, match=r"its tokenizer is .*Import the model again"):
        pool.run(1, run_export, str(run), [])
