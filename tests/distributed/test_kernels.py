"""csrc's kernels and the compact store in training: the same losses, bit for bit, as torch code on .bin/.idx."""

import json
from pathlib import Path

import pytest

from megatron_soda.data.convert import convert_stores
from megatron_soda.data.store import Store
from megatron_soda.ops import library
from tests.helpers import small_recipe, write_data


def train(run: str, data: str, csrc: bool, overrides: list[str]) -> bool:
    """On a rank of the pool. -> whether a kernel was there."""
    from unittest import mock

    from megatron_soda.ops import library
    from megatron_soda.training import trainer

    with mock.patch.object(library, "find", library.find if csrc else lambda name, device: None):
        trainer.train(small_recipe(Path(run), Path(data), *overrides))
        return library.find("build_batch", "cpu") is not None


def metrics(run: Path) -> list[tuple[float, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["loss"], row["grad_norm"]) for row in rows if "loss" in row]


ALIGNED = ["data.align_windows=true", "data.reset_positions=true"]


@pytest.mark.parametrize("overrides", [[], pytest.param(ALIGNED, marks=pytest.mark.full)])
def test_two_epochs(pool, tmp_path, overrides):
    write_data(tmp_path / "data", 40)
    write_data(tmp_path / "small", 40)
    convert_stores(tmp_path / "small", [], "compact", None)
    found = {}
    there = library.why_absent is None
    for name, data, csrc in (("torch", "data", False), ("csrc", "data", True), ("compact", "small", True)):
        runs = [str(tmp_path / name), str(tmp_path / data), csrc, ["training.steps=10", *overrides]]
        assert pool.run(1, train, *runs) == [csrc and there]  # without csrc torch code does it, from either store
        found[name] = metrics(tmp_path / name)
    assert len(found["torch"]) == 10
    assert (Store(tmp_path / "data" / "train").size - 1) // 32 < 10 * 8 // 2
    assert found["csrc"] == found["torch"]
    assert found["compact"] == found["torch"]
