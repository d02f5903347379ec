"""Ranks that were not started alike are named, on every rank alike; equal ones give a map."""

import time

import pytest

from megatron_soda.errors import SodaError
from megatron_soda.parallel import preflight
from tests.helpers import small_recipe


def check(overrides: list[str], on_rank_1: list[str], broken: str = "") -> tuple[str, float]:
    """On a rank of the pool: what the check says, and how long it took. `broken` makes rank 1 a bad one."""
    from pathlib import Path

    import torch
    import torch.distributed as dist

    from megatron_soda.parallel import ranks

    second = dist.get_rank() == 1
    recipe = small_recipe(Path("run"), Path("data"), *overrides)
    device = ranks.init(recipe)
    if second:
        recipe = small_recipe(Path("run"), Path("data"), *overrides, *on_rank_1)
    kept = preflight._versions, preflight._facts, dist.all_reduce
    if broken == "version" and second:
        preflight._versions = lambda: {**kept[0](), "torch": "1.0"}
    if broken == "device":
        preflight._facts = lambda *a: {**kept[1](*a), "device": "Some GPU", "device_id": "GPU-7"}
    if broken == "sum" and second:
        dist.all_reduce = lambda tensor, *a, **k: (kept[2](tensor, *a, **k), tensor.add_(1))
    began = time.perf_counter()
    try:
        said = preflight.check_groups(preflight.compare_ranks(recipe, device), device)
    except SodaError as error:
        said = f"error: {error}"
    finally:
        preflight._versions, preflight._facts, dist.all_reduce = kept
    assert torch.get_num_threads() == 1
    return said, time.perf_counter() - began


@pytest.mark.parametrize(
    ("world", "overrides", "last_line"),
    [
        (1, [], ["0", "0", "cpu", "0", "0", "0", "0"]),
        (4, ["parallel.tensor=2"], ["3", "3", "cpu", "1", "0", "0", "1"]),
        (4, ["parallel.pipeline=2", "parallel.context=2"], ["3", "3", "cpu", "0", "1", "1", "0"]),
    ],
)
def test_equal_ranks_give_a_map(pool, world, overrides, last_line):
    results = pool.run(world, check, overrides, [])
    (table,) = {said for said, _ in results}  # the same on all
    lines = table.splitlines()
    assert lines[0].startswith(f"{world} rank{'s' if world > 1 else ''} on 1 host; torch ")
    assert "transformer-engine none" in lines[0]
    assert len(lines) == 2 + world
    rank, _host, *rest = lines[-1].split()
    assert [rank, *rest] == last_line
    assert max(seconds for _, seconds in results) < 1


@pytest.mark.parametrize(
    ("on_rank_1", "broken", "said"),
    [
        (["seed=7"], "", ["\n  seed: 1234 on ranks 0, 2-3 (", "), 7 on rank 1 ("]),
        (
            ["training.loss_weights.text=2"],
            "",
            ["\n  training.loss_weights: {} on ranks 0, 2-3 (", ', {"text": 2.0} on rank 1 ('],
        ),
        ([], "version", ['\n  torch: "', '"1.0" on rank 1 (']),
        ([], "device", ["ranks 0-3 on host ", "one device (Some GPU, GPU-7)"]),
        ([], "sum", ["an all-reduce over the all group gave a wrong sum on rank 1 ("]),
    ],
    ids=["seed", "weights", "version", "device", "sum"],
)
def test_a_rank_that_differs_is_named_on_all_ranks(pool, on_rank_1, broken, said):
    (message,) = {text for text, _ in pool.run(4, check, ["parallel.tensor=2"], on_rank_1, broken)}
    assert message.startswith("error: ")
    for part in said:
        assert part in message


def compare_before_groups(on_rank_1: list[str]) -> str:
    from pathlib import Path

    import torch
    import torch.distributed as dist

    recipe = small_recipe(Path("run"), Path("data"), *(on_rank_1 if dist.get_rank() == 1 else []))
    try:
        preflight.compare_ranks(recipe, torch.device("cpu"))
    except SodaError as error:
        return str(error)
    return ""


def test_layouts_that_differ_are_named_before_the_groups_are_made(pool):
    """Making groups of different layouts would hang."""
    (message,) = set(pool.run(2, compare_before_groups, ["parallel.tensor=2"]))
    assert "parallel.tensor: 1 on rank 0 (" in message
    assert "2 on rank 1 (" in message


def test_many_ranks_are_shown_by_host():
    versions = {"torch": "2.13.0", "transformer-engine": None}
    facts = [
        {"host": f"node-{rank // 8}", "local_rank": rank % 8, "device": "NVIDIA H100", "versions": versions}
        | {"tensor": rank % 2, "pipeline": 0, "context": 0, "data": rank // 2}
        for rank in range(24)
    ]
    assert preflight.rank_map(facts).splitlines() == [
        "24 ranks on 3 hosts; torch 2.13.0, transformer-engine none",
        "ranks  host    devices          tensor  pipeline  context  data",
        "0-7    node-0  8 x NVIDIA H100  0-1     0         0        0-3",
        "8-15   node-1  8 x NVIDIA H100  0-1     0         0        4-7",
        "16-23  node-2  8 x NVIDIA H100  0-1     0         0        8-11",
    ]
