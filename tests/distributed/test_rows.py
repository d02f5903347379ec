"""How rows are dealt out to tensor-parallel ranks, and that checkpoints have them in the order of ids."""

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_soda.model.rows import Rows
from megatron_soda.vocab import LLAMA3, TokenSpace
from tests.distributed.test_layouts import FLAT, losses, train
from tests.helpers import SPACE, deal, dealt, small_recipe

ODD = TokenSpace(text_size=3, bos=0, eos=2, codebooks=5, entries=249)  # sections of any remainder; one rank is full


@pytest.mark.parametrize("space", [SPACE, ODD, LLAMA3], ids=["small", "odd", "soda"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_codebook_is_on_all_ranks(space, ranks):
    rows = Rows(space, ranks)
    shares = [rows.ids(rank) for rank in range(ranks)]
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(space.size))
    classes = space.class_table()
    markers = np.isin(np.arange(space.size), [space.bos, space.eos, *range(space.text_size, space.audio_base)])
    sections = [classes == k for k in range(2, 2 + space.codebooks)] + [(classes < 2) | markers, classes >= 0]
    for section in sections:
        counts = [int(section[ids].sum()) for ids in shares]
        assert max(counts) - min(counts) <= 1
    row_of_id = rows.of_ids().numpy()
    for rank, ids in enumerate(shares):
        assert np.array_equal(ids, dealt(space, ranks, rank))
        assert len(ids) == rows.count(rank) <= rows.local
        assert np.array_equal(row_of_id[ids], rank * rows.local + np.arange(len(ids)))
    if ranks == 1:
        assert np.array_equal(row_of_id, np.arange(space.size))
    table = np.random.default_rng(0).normal(size=(space.size, 2))
    cut = [rows.cut(torch.tensor(table), rank).numpy() for rank in range(ranks)]
    assert all(np.array_equal(part, deal(table, rows.local, space, ranks, rank)) for rank, part in enumerate(cut))
    assert np.array_equal(np.concatenate(cut)[row_of_id], table)


def resave(old: str, new: str, overrides: list[str]) -> None:
    """On a rank of the pool: reads the checkpoint of step 3 and writes it again, at this layout."""
    from megatron_soda.parallel import ranks
    from megatron_soda.training import checkpoint
    from megatron_soda.training.step import Engine

    recipe = small_recipe(Path(new), Path(new), *overrides)
    device = ranks.init(recipe)
    engine = Engine(recipe, SPACE, device)
    checkpoint.load(checkpoint.folder_of(Path(old), 3), engine.models, engine.optimizer.inner)
    assert engine.is_finite()
    for model in engine.models:  # padding does not come back as something
        for name, parameter in model.named_parameters():
            if "word_embeddings" in name or "output_layer" in name:
                rank = torch.distributed.get_rank(model.pg_collection.tp)
                assert not parameter[model.rows.count(rank) :].any()
    checkpoint.Saver(recipe, engine.models, engine.optimizer.inner, checkpoint.describe(recipe, SPACE)).start(3, {})


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint of step 3, Adam's state too; tables without padding."""
    from megatron_soda.training.checkpoint_stream import TensorReader

    reader = TensorReader(run / "checkpoints" / "step_00000003")
    found = {name: reader.read(name) for name in reader._described}
    tables = [name for name in found if "word_embeddings" in name or "output_layer" in name]
    assert len(tables) in (3, 4, 6, 8)
    for name in tables:
        assert not found[name][SPACE.size :].any()
        found[name] = found[name][: SPACE.size]
    return found


def same_tensors(a: Path, b: Path) -> bool:
    first, second = tensors(a), tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


FOUR = "model.num_query_groups=4"
ONE, TP2, TP4 = (1, []), (2, ["parallel.tensor=2"]), (4, ["parallel.tensor=4"])
SP2, PP2 = (2, ["parallel.tensor=2", "parallel.sequence=true"]), (2, ["parallel.pipeline=2"])
TP2PP2, TP2DP2 = (4, ["parallel.tensor=2", "parallel.pipeline=2"]), (4, ["parallel.tensor=2"])


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        ([], [TP2, ONE, TP4, PP2, SP2]),
        (["model.tie_embeddings=true"], [TP4, TP2PP2, ONE, TP2]),
        (["precision.dtype=bf16"], [ONE, TP2, TP4, ONE]),
        (["parallel.distributed_optimizer=true"], [TP2DP2, PP2, TP4, ONE, TP2]),
        (["parallel.distributed_optimizer=true", "precision.dtype=bf16", "model.tie_embeddings=true"], [TP2DP2, TP4]),
        (["optimizer.name=cautious"], [TP2, TP4, ONE]),
    ],
    ids=["plain", "tied", "bf16", "distributed", "distributed-bf16-tied", "cautious"],
)
def test_checkpoints_are_in_the_order_of_ids(pool, data, tmp_path, settings, layouts):
    """A checkpoint is read and written at one layout after another, and no bit of it changes. That the first is in the
    order of ids is seen by the one that a single rank trained."""
    (world, overrides), *others = layouts
    settings = [*settings, FOUR, "model.init_std=0.2", *FLAT, "training.steps=3"]
    pool.run(world, train, str(tmp_path / "0"), str(data), [*settings, *overrides])
    pool.run(1, train, str(tmp_path / "alone"), str(data), settings)
    alone, first = tensors(tmp_path / "alone"), tensors(tmp_path / "0")
    name = "embedding.word_embeddings.weight"
    assert alone[name].float().std() > 0.1
    assert (alone[name].float() - first[name].float()).abs().max() < 0.02
    for number, (world, overrides) in enumerate(others, 1):
        old, new = tmp_path / str(number - 1), tmp_path / str(number)
        pool.run(world, resave, str(old), str(new), [*settings, *overrides])
        assert same_tensors(old, new)


def count_reads(run: str, overrides: list[str]) -> list[tuple[str, int]]:
    """On a rank of the pool: what is read of the checkpoint of step 3, and how often."""
    from collections import Counter
    from unittest import mock

    from megatron_soda.parallel import ranks
    from megatron_soda.training import checkpoint, checkpoint_files
    from megatron_soda.training.step import Engine

    recipe = small_recipe(Path(run), Path(run), *overrides)
    engine = Engine(recipe, SPACE, ranks.init(recipe))
    seen: Counter[str] = Counter()
    view = checkpoint_files._create_file_view

    def watched(file, start: int, length: int):
        seen[f"{Path(file.name).name}: {start}"] += 1
        return view(file, start, length)

    with mock.patch.object(checkpoint_files, "_create_file_view", watched):
        checkpoint.load(checkpoint.folder_of(Path(run), 3), engine.models, engine.optimizer.inner)
    return sorted(seen.items())


def test_a_table_is_read_once(pool, data, tmp_path):
    """Whatever the number of its parts on a rank."""
    pool.run(1, train, str(tmp_path), str(data), ["training.steps=3"])
    for reads in pool.run(2, count_reads, str(tmp_path), ["parallel.tensor=2"]):
        assert len(reads) > 30
        assert {count for _, count in reads} == {1}


def as_before(function, *arguments) -> None:
    """On a rank of the pool: the function, with rows as earlier versions had them: ids cut into equal ranges, which
    checkpoints held with the padding."""
    from unittest import mock

    from megatron.core.models.gpt import GPTModel

    from megatron_soda.model import gpt

    def blocks(self: Rows, rank: int) -> list[range]:
        return [range(min(rank * self.local, self.space.size), min((rank + 1) * self.local, self.space.size))]

    with (
        mock.patch.object(Rows, "blocks", blocks),
        mock.patch.object(gpt.SodaModel, "sharded_state_dict", GPTModel.sharded_state_dict),
    ):
        function(*arguments)


@pytest.mark.parametrize(
    "settings",
    [[], pytest.param(["parallel.distributed_optimizer=true"], marks=pytest.mark.full)],
    ids=["plain", "distributed"],
)
@pytest.mark.parametrize("head", [pytest.param("all", marks=pytest.mark.full), "legal"])
def test_a_checkpoint_of_an_earlier_version(pool, data, tmp_path, settings, head):
    """It is read at every layout, and a run that began with one goes on."""
    settings = [*settings, FOUR, *FLAT, f"training.head_rows={head}"]
    three = [*settings, "training.steps=3"]
    pool.run(2, as_before, train, str(tmp_path / "run"), str(data), [*three, "parallel.tensor=2"])
    for number, (world, overrides) in enumerate((TP2, TP4, ONE)):
        pool.run(world, resave, str(tmp_path / "run"), str(tmp_path / str(number)), [*three, *overrides])
        assert same_tensors(tmp_path / "run", tmp_path / str(number))
    pool.run(2, train, str(tmp_path / "run"), str(data), [*settings, "parallel.tensor=2"])
    pool.run(1, train, str(tmp_path / "alone"), str(data), settings)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)
