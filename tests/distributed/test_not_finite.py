"""Batches without a weight, and states that have blown up: what is counted, never saved, and gone back from."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data_prep import interleave
from megatron_soda.data.store import write_store
from megatron_soda.files import to_json, write_json
from tests.distributed.test_checkpoint import FLAT, folders, train_heard
from tests.distributed.test_layouts import LAYOUTS, losses, metrics, train
from tests.helpers import SPACE

SHORT = [*FLAT, "training.steps=6", "checkpoint.save_every=3", "training.valid_every=3"]
LONGER = [*SHORT, "training.steps=8"]


def test_json_holds_no_nan(tmp_path):
    value = {"a": float("nan"), "b": [1.5, float("-inf"), np.float64("inf")], "c": (2, "NaN"), "d": None, "e": True}
    write_json(tmp_path / "x.json", value)
    expected = {"a": None, "b": [1.5, None, None], "c": [2, "NaN"], "d": None, "e": True}
    for text in ((tmp_path / "x.json").read_text(), to_json(value)):
        assert json.loads(text, parse_constant=pytest.fail) == expected


@pytest.fixture(scope="module")
def hollow(tmp_path_factory) -> Path:
    """Text alone to validate on, and to train on until about the middle of the store."""
    folder = tmp_path_factory.mktemp("hollow")
    rng = np.random.default_rng(0)
    text = [interleave.text_only(rng.integers(3, 64, 30).tolist(), SPACE) for _ in range(24)]
    sound = [interleave.audio_first([([5, 6, 7], rng.integers(0, 16, (12, 4)))], SPACE) for _ in range(3)]
    write_store(folder / "train", [*text, *sound], SPACE)
    write_store(folder / "valid", text[:8], SPACE)
    return folder


HOLLOW = [
    *("training.loss_weights={text: 0, marker: 0}", "training.global_batch_size=4", "training.micro_batch_size=1"),
    *(*FLAT, "training.steps=6", "checkpoint.save_every=3", "training.valid_every=3"),
]


@pytest.mark.parametrize("layout", ["one", "dp2_distributed", "tp2pp2"])
def test_a_batch_without_a_weight_is_a_step_without_an_update(pool, hollow, tmp_path, layout):
    world, overrides = LAYOUTS.get(layout, (1, []))
    pool.run(world, train, str(tmp_path), str(hollow), [*overrides, *HOLLOW])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    trained, validated = ([row for row in rows if key in row] for key in ("loss", "valid_loss"))
    assert len(trained) == 6
    hollow_steps = [row["step"] for row in trained if row["loss"] is None]
    assert 0 < len(hollow_steps) < 6
    assert [row.get("skipped_steps", 0) for row in trained] == [
        sum(at <= row["step"] for at in hollow_steps) for row in trained
    ]
    assert all(row["grad_norm"] == 0 for row in trained if row["loss"] is None)
    assert [row["valid_loss"] for row in validated] == [None, None]
    saved = json.loads((tmp_path / "checkpoints" / "step_00000006" / "checkpoint.json").read_text())
    assert saved["skipped_steps"] == len(hollow_steps)


def state_after_a_hollow_step(run: str, data: str, overrides: list[str]) -> tuple[bool, bool]:
    """On a rank of the pool: whether parameters and Adam's state stayed bit for bit over a step without weights, and
    changed over one with them."""
    from unittest import mock

    from megatron_soda.training import step, trainer
    from tests.helpers import small_recipe

    original = step.Engine.train_step
    same: dict[bool, set[bool]] = {True: set(), False: set()}

    def watched(self, *arguments):
        before = [tensor.clone() for tensor in self._state()]
        result = original(self, *arguments)
        after = list(self._state())
        if len(before) == len(after):  # the first real step makes Adam's state
            same[result.skipped].add(all(a.equal(b) for a, b in zip(before, after, strict=True)))
        return result

    with mock.patch.object(step.Engine, "train_step", watched):
        trainer.train(small_recipe(Path(run), Path(data), *overrides))
    return same[True] == {True}, same[False] <= {False}


def test_adam_is_not_touched_by_it(pool, hollow, tmp_path):
    dp2 = ["parallel.distributed_optimizer=true", *HOLLOW]
    assert pool.run(2, state_after_a_hollow_step, str(tmp_path), str(hollow), dp2) == [(True, True)] * 2


@pytest.mark.parametrize(("world", "save_every"), [(1, 1), (2, 4)])
def test_a_state_that_has_blown_up_is_not_saved(pool, data, tmp_path, world, save_every):
    """At a rate of 1e30 the weights after the first step are finite; no loss of theirs is."""
    settings = [*FLAT, "training.steps=8", f"checkpoint.save_every={save_every}"]
    with pytest.raises(RuntimeError, match=r"Run again with a lower optimizer\.learning_rate .*nothing was saved"):
        pool.run(world, train, str(tmp_path), str(data), [*settings, "optimizer.learning_rate=1e30"])
    assert not (tmp_path / "checkpoints").exists() or folders(tmp_path) == []
    pool.run(world, train, str(tmp_path), str(data), [*settings, "optimizer.learning_rate=1e-3"])  # the advice is true
    assert len(losses(tmp_path)) == 8


def train_poisoned(run: str, data: str, overrides: list[str], steps: list[int], what: str) -> str:
    """On a rank of the pool: after these steps the state is broken on the last rank, and (`what` is not `state`) saved
    as an earlier version would have."""
    from unittest import mock

    import torch
    import torch.distributed as dist

    from megatron_soda.training import step, trainer

    original = step.Engine.train_step
    done = []

    def poisoned(self, *arguments):
        done.append(original(self, *arguments))
        if len(done) in steps and dist.get_rank() == dist.get_world_size() - 1:
            tensors = list(self.optimizer.state() if what == "state" else self.models[0].parameters())
            with torch.no_grad():
                tensors[-1].view(-1)[0] = float("nan")
        return done[-1]

    with mock.patch.object(step.Engine, "train_step", poisoned):
        if what == "state":
            return train_heard(run, data, overrides)
        with (
            mock.patch.object(step.Engine, "is_finite", return_value=True),
            mock.patch.object(trainer.torch, "isfinite", torch.ones_like),
        ):
            return train_heard(run, data, overrides)


def test_adams_state_counts_too(pool, data, tmp_path):
    """One NaN in Adam's state, on one rank of two, which shows in no loss before the next step."""
    with pytest.raises(RuntimeError, match=r"this is not saved.*checkpoint of step 3"):
        pool.run(2, train_poisoned, str(tmp_path), str(data), SHORT, [6], "state")
    assert folders(tmp_path) == [3]


def test_after_a_bad_checkpoint_the_one_before_is_used(pool, data, tmp_path):
    run, straight = tmp_path / "run", tmp_path / "straight"
    pool.run(1, train_poisoned, str(run), str(data), SHORT, [6], "saved")
    assert folders(run) == [3, 6]
    out = pool.run(1, train_heard, str(run), str(data), LONGER)[0]
    assert "step 7: loss nan" in out
    assert "going back to that of step 3" in out
    assert "step_00000006 was set aside as not_finite_step_00000006" in out
    pool.run(1, train, str(straight), str(data), LONGER)
    assert losses(run) == losses(straight)
    assert folders(run) == [3, 6, 8]  # 6 was made again


def test_when_no_checkpoint_is_good_it_says_so(pool, data, tmp_path):
    saves = [*FLAT, "checkpoint.save_every=1"]
    pool.run(1, train_poisoned, str(tmp_path), str(data), [*saves, "training.steps=1"], [1], "saved")
    with pytest.raises(RuntimeError, match=r"each checkpoint that was tried \(1\).*start from the beginning"):
        pool.run(1, train, str(tmp_path), str(data), [*saves, "training.steps=3"])
    assert folders(tmp_path) == [1]


def test_numbers_in_a_file(pool, data, tmp_path):
    """Lines where there is no terminal; validation and saving take no part in tokens/s."""
    out = pool.run(1, train_slow, str(tmp_path), str(data), [*SHORT, "checkpoint.save_every=1"])[0]
    lines = [line for line in out.splitlines() if "/6  loss " in line]
    assert re.match(r"\d\d:\d\d:\d\d step 1/6  loss ", lines[0])
    assert re.match(r"\d\d:\d\d:\d\d step 6/6  loss ", lines[-1])
    assert len(lines) == 2  # not more than one in ten seconds, and the last
    assert all("tokens/s" in line and line.endswith(" left") for line in lines)
    rows = metrics(tmp_path)
    assert rows[-1]["seconds"] > 6 * 0.5
    for row in rows[1:]:  # a step takes no half second, and a save does
        assert row["tokens_per_second"] == pytest.approx(8 * 32 / sum(train_seconds(row)), rel=0.3)
        assert row["step_seconds"]["save"] > 0.5


def train_seconds(row: dict) -> list[float]:
    return [seconds for part, seconds in row["step_seconds"].items() if part not in ("validate", "save")]


def train_slow(run: str, data: str, overrides: list[str]) -> str:
    """On a rank of the pool: every save takes half a second more."""
    import time
    from unittest import mock

    from megatron_soda.training import checkpoint

    start = checkpoint.Saver.start
    with mock.patch.object(checkpoint.Saver, "start", lambda *a: (time.sleep(0.5), start(*a))):
        return train_heard(run, data, overrides)
