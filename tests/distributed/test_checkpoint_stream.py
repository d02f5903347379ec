"""Tensors of a checkpoint one at a time: the same that the trainer's loader gives, whatever layout wrote it."""

import io
import json
from pathlib import Path

import pytest
import torch

from megatron_soda.errors import SodaError
from tests.distributed.test_layouts import LAYOUTS, train
from tests.helpers import SPACE, small_recipe
from tests.qwen3 import as_qwen3

TWO = ["training.steps=2", "checkpoint.save_every=2"]


def compare(run: str, data: str, overrides: list[str]) -> list[str]:
    """On one rank of the pool: the names of tensors that differ."""
    from megatron_soda.hf.qwen3 import parts
    from megatron_soda.model.gpt import build_model
    from megatron_soda.parallel import ranks
    from megatron_soda.training import checkpoint
    from megatron_soda.training.checkpoint_stream import TensorReader

    recipe = small_recipe(Path(run), Path(data), *overrides)
    folder = checkpoint.folder_of(Path(run), 2)
    model = build_model(recipe, SPACE, ranks.init(recipe))
    checkpoint.load(folder, [model], None)
    expected, reader = as_qwen3(model.state_dict(), recipe.model, SPACE), TensorReader(folder)
    assert reader.names() == {part.name for part in parts(recipe.model)}
    wrong = []
    for part in parts(recipe.model):
        found = part.split(reader.read(part.name, part.layer), recipe.model, SPACE.size)
        wrong += [n for n, t in zip(part.theirs, found, strict=True) if not torch.equal(t, expected[n])]
    return wrong


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ("one", ["precision.dtype=bf16"]),
        ("tp2", ["model.tie_embeddings=true"]),
        ("dp2_distributed", ["precision.dtype=bf16"]),
        ("tp2pp2", []),
        pytest.param("vpp2", ["model.tie_embeddings=true"], marks=pytest.mark.full),
    ],
)
def test_every_layout_is_read(pool, data, tmp_path, layout, model):
    world, overrides = LAYOUTS.get(layout, (1, []))
    pool.run(world, train, str(tmp_path), str(data), [*TWO, *overrides, *model])
    assert pool.run(1, compare, str(tmp_path), str(data), model) == [[]]


@pytest.fixture(scope="module")
def saved(pool, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("streamed")
    pool.run(2, train, str(run), str(data), [*TWO, "parallel.tensor=2"])
    return run / "checkpoints" / "step_00000002"


def test_what_is_written_is_read_and_loaded(pool, data, saved, tmp_path):
    from megatron_soda.parallel import ranks  # noqa: F401  before anything of megatron-core
    from megatron_soda.training import checkpoint
    from megatron_soda.training.checkpoint_stream import TensorReader, written

    reader = TensorReader(saved)
    temporary = tmp_path / "run" / "checkpoints" / ".new"
    temporary.mkdir(parents=True)
    with written(temporary) as writer:
        for name in sorted(reader.names()):
            layers = 4 if name.startswith("decoder.layers.") else 0
            for layer in range(layers) if layers else (None,):
                writer.write(name, reader.read(name, layer), layer, layers)
        entries = writer.finish()
    description = json.loads((saved / "checkpoint.json").read_text())
    final = checkpoint.folder_of(tmp_path / "run", 2)
    checkpoint.seal(temporary, final, description, entries)
    assert checkpoint.damage(final) == []
    again = TensorReader(final)
    assert again.names() == reader.names()
    for name in reader.names():
        assert torch.equal(again.read(name), reader.read(name))
        if name.startswith("decoder.layers."):
            assert again.shape(name, 3) == reader.shape(name)[1:]
            assert again.shape(name, 4) is None
    assert again.shape("nothing") is None
    for name, layer in (("nothing", None), ("decoder.layers.mlp.linear_fc2.weight", 4)):
        with pytest.raises(SodaError, match=f"has no tensor {name}"):
            again.read(name, layer)
    assert pool.run(1, compare, str(tmp_path / "run"), str(data), []) == [[]]
    from torch.distributed.checkpoint import FileSystemReader  # as other programs see it

    stored = FileSystemReader(final).read_metadata().state_dict_metadata
    assert {name: tuple(entry.size) for name, entry in stored.items()} == {n: again.shape(n) for n in again.names()}


def test_files_are_closed_and_counted(tmp_path, monkeypatch):
    from megatron_soda.parallel import ranks  # noqa: F401
    from megatron_soda.training import checkpoint_stream as module

    monkeypatch.setattr(module, "_FILE_BYTES", 1000)
    tensors = {f"t{i}": torch.full((300,), float(i)) for i in range(3)}
    with module.written(tmp_path) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
        entries = writer.finish()
    assert {name: (tmp_path / name).stat().st_size for name in entries} == {n: size for n, (size, _) in entries.items()}
    assert sorted(entries) == ["__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    reader = module.TensorReader(tmp_path)
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in tensors.items())


def test_a_part_of_a_tensor_is_written_as_that_part(tmp_path):
    """torch.save writes the whole storage of a slice."""
    from megatron_soda.parallel import ranks  # noqa: F401
    from megatron_soda.training.checkpoint_stream import written

    with written(tmp_path) as writer:
        writer.write("part", torch.zeros(1 << 20)[:5])
        ((size, _),) = writer.finish().values()
    assert size < 10_000


def test_mistakes_of_a_writer(tmp_path):
    from megatron_soda.parallel import ranks  # noqa: F401
    from megatron_soda.training.checkpoint_stream import written

    with written(tmp_path) as writer:
        writer.write("a", torch.ones(3), 0, 2)
        for tensor, layer in ((torch.ones(3), 0), (torch.ones(4), 1), (torch.ones(3).bfloat16(), 1)):
            with pytest.raises(ValueError, match="written twice, or with two shapes"):
                writer.write("a", tensor, layer, 2)
        with pytest.raises(ValueError, match="not all layers of a"):
            writer.finish()


def test_a_chunk_that_is_not_what_the_index_says(saved, tmp_path):
    from megatron_soda.parallel import ranks  # noqa: F401
    from megatron_soda.training.checkpoint_stream import TensorReader, written

    for number, value in enumerate((torch.ones(3), torch.ones(2, 2), {"a": 1}, torch.ones(4, dtype=torch.int64))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with written(folder) as writer:
            writer.write("a", torch.ones(4))
            writer.finish()
        blob = io.BytesIO()
        torch.save(value, blob)
        index = json.loads((folder / "index.json").read_text())
        index["tensors"]["a"]["chunks"][0]["bytes"] = len(blob.getvalue())
        (folder / "__0_0.distcp").write_bytes(blob.getvalue())
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(SodaError, match=r"__0_0\.distcp: cannot read a in it"):
            TensorReader(folder).read("a")
