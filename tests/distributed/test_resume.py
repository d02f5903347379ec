"""What a run goes on from is what it was: the stores, what made their ids, and the settings of the training."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.data.files import checksum
from megatron_soda.data.store import Store, convert, write_store
from tests.distributed.test_checkpoint import FLAT, train_heard
from tests.distributed.test_checkpoint_files import reseal
from tests.distributed.test_layouts import losses, metrics, train
from tests.helpers import SPACE, documents, write_data

SHORT = [*FLAT, "training.steps=6", "checkpoint.save_every=3"]
LONGER = [*FLAT, "training.steps=8", "checkpoint.save_every=3"]


@pytest.fixture(scope="module")
def saved(pool, data, tmp_path_factory) -> Path:
    """A run folder with its data in it, trained for 6 steps."""
    run = tmp_path_factory.mktemp("saved")
    shutil.copytree(data, run / "data")
    pool.run(1, train, str(run), str(run / "data"), SHORT)
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def resume(pool, run: Path, *overrides: str, world: int = 1) -> str:
    return pool.run(world, train_heard, str(run), str(run / "data"), [*LONGER, *overrides])[0]


def notes(out: str) -> list[str]:
    return [line.partition("note: ")[2] for line in out.splitlines() if "note: " in line]


def rewrite(path: Path, change: Callable[[list[np.ndarray]], list[np.ndarray]], **changes: str) -> None:
    """Writes a store anew, its documents changed; `changes`: other fingerprints than it had."""
    store = Store(path)
    made = change([store.document(i) for i in range(len(store))])
    write_store(path, made, store.space, **{"codec": "none", "tokenizer": "none", **changes})


def roll(path: Path) -> None:
    ids = np.fromfile(path, "<i4")
    with path.open("r+b") as file:  # at no moment is it shorter: others may be reading it
        file.write(np.roll(ids, len(ids) // 2).tobytes())


def describe_anew(folder: Path, change: Callable[[dict], None]) -> None:
    """Changes checkpoint.json as if the checkpoint had been written so."""
    description = json.loads((folder / "checkpoint.json").read_text())
    change(description)
    (folder / "checkpoint.json").write_text(json.dumps(description))
    reseal(folder)


def test_the_same_stores_go_on_without_a_word(pool, run):
    out = resume(pool, run)
    assert "from step 6" in out
    assert notes(out) == ["training.steps was 6 up to step 6, and is 8 from now on."]
    assert len(losses(run)) == 8


@pytest.mark.parametrize("world", [1, 2])
def test_bytes_that_changed_under_the_same_json_are_refused(pool, run, world):
    roll(run / "data" / "train.bin")
    with pytest.raises(RuntimeError, match=r"train\.bin: its bytes have changed since it was written"):
        resume(pool, run, world=world)
    assert len(losses(run)) == 6


def train_large(run: str, data: str, overrides: list[str]) -> str:
    """As if every store were too large to be read whole."""
    from unittest import mock

    from megatron_soda.training import corpora

    with mock.patch.object(corpora, "_READ_WHOLE", 0):
        return train_heard(run, data, overrides)


def test_of_large_stores_samples_are_compared(pool, run):
    roll(run / "data" / "train.bin")
    with pytest.raises(RuntimeError, match=r"is a store with different bytes, though its \.json is the same"):
        pool.run(1, train_large, str(run), str(run / "data"), LONGER)


@pytest.mark.parametrize(
    ("side", "change", "changes", "said"),
    [
        ("train", lambda d: d[::-1], {}, r"corpus train: .*data/train is a different store \(fingerprint"),
        ("train", lambda d: d[1:], {}, r"is a different store \([0-9,]+ tokens, was "),
        ("train", list, {"codec": "other"}, r"is made by a different codec \(other, was none\)"),
        ("train", list, {"tokenizer": "other"}, r"is made by a different tokenizer \(other, was none\)"),
        ("valid", lambda d: d[::-1], {}, r"data/valid is a different store .*data\.accept=\[validation\]"),
    ],
    ids=["order", "length", "codec", "tokenizer", "valid"],
)
def test_another_store_is_refused(pool, run, side, change, changes, said):
    rewrite(run / "data" / side, change, **changes)
    if changes:  # both sides, as `soda prepare` would
        rewrite(run / "data" / "valid", list, **changes)
    with pytest.raises(RuntimeError, match=said):
        resume(pool, run)
    assert len(losses(run)) == 6


def test_other_validation_data_can_be_accepted(pool, run):
    rewrite(run / "data" / "valid", lambda d: d[::-1])
    assert "losses are not comparable" in resume(pool, run, "data.accept=[validation]")
    assert len(losses(run)) == 8


def test_a_store_in_another_format_is_the_same_store(pool, run, saved, tmp_path):
    straight = tmp_path / "straight"
    shutil.copytree(saved, straight)
    resume(pool, straight)
    for side in ("train", "valid"):
        convert(Store(run / "data" / side), run / "data" / side, "compact")
    assert len(notes(resume(pool, run))) == 1  # of training.steps
    assert losses(run) == losses(straight)


def test_the_fingerprint_is_of_the_ids_and_what_they_mean(tmp_path):
    some = documents(50)

    def of(name: str, documents: list[np.ndarray], format: str = "megatron", **made_by: str) -> str:
        write_store(tmp_path / name, documents, SPACE, format, **made_by)
        return Store(tmp_path / name).fingerprint

    first = of("a", some, codec="x")
    assert of("b", some, codec="x") == first
    assert of("c", some, "compact", codec="x") == first
    convert(Store(tmp_path / "b"), tmp_path / "b", "compact")
    assert Store(tmp_path / "b").fingerprint == first
    assert len({first, of("d", some), of("e", some, codec="y"), of("f", some[::-1], codec="x")}) == 4
    # One that an earlier version wrote.
    meta = json.loads((tmp_path / "a.json").read_text())
    assert meta.pop("ids_crc32") == checksum(tmp_path / "a.bin")
    meta.pop("crc32", None)
    (tmp_path / "a.json").write_text(json.dumps(meta))
    assert Store(tmp_path / "a").fingerprint == first


def test_a_checkpoint_of_an_earlier_version_is_taken_with_a_word(pool, run):
    def earlier(description: dict) -> None:
        now = description["data"]["corpora"]["train"]
        description["data"] = {
            "seed": now["seed"],
            "data.sequence_length": now["sequence_length"],
            "data.align_windows": now["align_windows"],
            "tokens": {"train": now["tokens"]},
        }
        del description["made_by"]

    describe_anew(run / "checkpoints" / "step_00000006", earlier)
    with pytest.raises(RuntimeError, match="seed was 1234"):
        resume(pool, run, "seed=1")
    out = resume(pool, run)
    assert "does not say which stores it was trained on" in out
    assert len(losses(run)) == 8


def train_and_write(run: str, data: str, overrides: list[str], how: str) -> str:
    """On a rank of the pool: the store is touched or written to in the third step."""
    from unittest import mock

    import torch.distributed as dist

    from megatron_soda.training import step

    original = step.Engine.train_step
    calls = []

    def disturbed(self, *arguments):
        calls.append(1)
        path = Path(data) / "train"
        if len(calls) == 3 and dist.get_rank() == 0:
            if how == "touched":
                os.utime(path.with_suffix(".bin"))
            elif how == "converted":
                convert(Store(path), path, "compact")
            elif how == "in place":
                roll(path.with_suffix(".bin"))
            elif how == "anew":
                rewrite(path, lambda d: d[::-1])
            else:
                path.with_suffix(".json").unlink()
        return original(self, *arguments)

    with mock.patch.object(step.Engine, "train_step", disturbed):
        return train_heard(run, data, overrides)


@pytest.mark.parametrize("how", ["in place", "anew", "removed"])
def test_a_store_written_to_under_a_run_stops_it(pool, data, tmp_path, how):
    shutil.copytree(data, tmp_path / "data")
    steps = ["training.steps=9", "checkpoint.save_every=2", *FLAT]
    with pytest.raises(RuntimeError, match="train was written to while the run was training on it") as error:
        pool.run(2, train_and_write, str(tmp_path / "run"), str(tmp_path / "data"), steps, how)
    assert "rank 0" in str(error.value)
    assert "rank 1" in str(error.value)  # it ends on both
    assert [f.name for f in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000002"]


@pytest.mark.parametrize("how", ["touched", "converted"])
def test_a_store_that_stays_the_same_store_stops_nothing(pool, data, tmp_path, how):
    shutil.copytree(data, tmp_path / "data")
    pool.run(1, train_and_write, str(tmp_path / "run"), str(tmp_path / "data"), SHORT, how)
    pool.run(1, train, str(tmp_path / "straight"), str(data), SHORT)
    assert losses(tmp_path / "run") == losses(tmp_path / "straight")


def train_unlike(run: str, data: str, others: str, broken: str) -> str:
    """On a rank of the pool: rank 1 has other stores at the same paths."""
    from unittest import mock

    import torch.distributed as dist

    from megatron_soda.training import corpora

    def open_other(path):
        if broken == "missing":
            raise OSError(5, "Input/output error", str(path))
        store = Store(Path(others) / Path(path).name)
        store.path = Path(path)
        return store

    with mock.patch.object(corpora, "Store", open_other if dist.get_rank() == 1 else Store):
        return train_heard(run, data, SHORT)


@pytest.mark.parametrize(
    ("broken", "said"),
    [("other", "do not see the same data"), ("missing", "Input/output error")],
)
def test_ranks_that_see_other_stores_are_named(pool, data, tmp_path, broken, said):
    write_data(tmp_path / "others")
    rewrite(tmp_path / "others" / "train", lambda d: d[::-1])
    with pytest.raises(RuntimeError) as error:
        pool.run(2, train_unlike, str(tmp_path / "run"), str(data), str(tmp_path / "others"), broken)
    traces = str(error.value).split("rank 1:\n")
    assert len(traces) == 2
    for trace in traces:  # the same on both
        assert "SodaError" in trace
        assert said in trace
        assert "rank 1 (" in trace


def branch(run: Path, step: int = 6) -> str:
    return f"training.branch_from={run}/checkpoints/step_{step:08d}"


def test_a_leg_on_data_of_another_codec(pool, run, tmp_path):
    """Each fresh `soda prepare` fits its own codec: the natural way into it."""
    new, leg = tmp_path / "new", tmp_path / "leg"
    for side, seed in (("train", 7), ("valid", 8)):
        write_store(new / side, documents(100, seed), SPACE, codec="fresh", tokenizer="none")
    settings = [*LONGER, branch(run), f"data.corpora={{more: {new}/train}}"]
    message = r"made by codec fresh, the model \(.*step_00000006\) has codec none.*data\.accept=\[codec\]"
    with pytest.raises(RuntimeError, match=message):
        pool.run(1, train, str(leg), str(new), settings)
    pool.run(1, train, str(leg), str(new), [*settings, "training.steps=7", "data.accept=[codec]"])
    description = json.loads((leg / "checkpoints" / "step_00000007" / "checkpoint.json").read_text())
    assert description["made_by"] == {"codec": "fresh", "tokenizer": "none"}
    pool.run(1, train, str(leg), str(new), settings)  # now it is the model's own


def test_text_has_no_codec(pool, run, tmp_path):
    for side in ("train", "valid"):
        write_store(tmp_path / "text" / side, documents(100, 7), SPACE, codec=None, tokenizer="none")
    settings = [*LONGER, branch(run), f"data.corpora={{text: {tmp_path}/text/train}}"]
    pool.run(1, train, str(tmp_path / "leg"), str(tmp_path / "text"), settings)
    description = json.loads((tmp_path / "leg" / "checkpoints" / "step_00000008" / "checkpoint.json").read_text())
    assert description["made_by"] == {"codec": "none", "tokenizer": "none"}  # the model still knows its codec


def test_a_leg_with_windows_of_another_length(pool, run, tmp_path):
    """The trunk's data could not say what is used up; data of a name of their own start over."""
    longer = [*LONGER, branch(run), "data.sequence_length=48"]
    with pytest.raises(RuntimeError, match=r"used data could not be skipped.*a new name in data\.corpora"):
        pool.run(1, train, str(tmp_path / "leg"), str(run / "data"), longer)
    named = [*longer, f"data.corpora={{again: {run}/data/train}}", "seed=5"]
    pool.run(1, train, str(tmp_path / "leg"), str(run / "data"), [*named, "training.steps=7"])
    pool.run(1, train, str(tmp_path / "leg"), str(run / "data"), named)
    assert [row["tokens"] for row in metrics(tmp_path / "leg")] == [8 * (6 * 32 + 48), 8 * (6 * 32 + 96)]
    # Back to the trunk's data, whose windows were of 32: what is used up of them is still known.
    back = [*LONGER, "training.steps=9", branch(tmp_path / "leg", 8)]
    with pytest.raises(RuntimeError, match=r"data\.sequence_length was 32 .* and is 48"):
        pool.run(1, train, str(tmp_path / "back"), str(run / "data"), [*back, "data.sequence_length=48"])
    pool.run(1, train, str(tmp_path / "back"), str(run / "data"), back)
    assert metrics(tmp_path / "back")[0]["tokens"] == 8 * (6 * 32 + 96 + 32)


# ---- settings


def test_what_changes_is_said(pool, run):
    out = resume(pool, run, "optimizer.weight_decay=0.1", "optimizer.beta1=0.9", "optimizer.learning_rate=1e-5")
    assert "optimizer.weight_decay was 0.033 up to step 6, and is 0.1 from now on" in out
    assert "optimizer.beta1 was 0.98 up to step 6, and is 0.9" in out
    assert "the learning rate falls from" in out
    assert "training.steps was 6" in out
    assert len(notes(out)) == 5


WSD = [
    "schedule.warmup_share=0.2",
    "schedule.decay_share=0.4",
    "optimizer.learning_rate=5e-3",
    "checkpoint.save_every=2",
]


@pytest.fixture(scope="module")
def decayed(pool, data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("decayed")
    pool.run(1, train, str(run), str(data), [*WSD, "training.steps=10"])
    return run


def test_the_schedule_is_not_rewound(pool, data, decayed, tmp_path):
    """Raising training.steps after the decay would jump back to the peak; a branch is the way, and the message gives
    its settings."""
    run = tmp_path / "run"
    shutil.copytree(decayed, run)
    out = pool.run(1, train_heard, str(run), str(data), [*WSD, "training.steps=10"])[0]
    with pytest.raises(RuntimeError, match=r"would jump from 0\.00125 to 0\.005 at step 11") as error:
        pool.run(1, train, str(run), str(data), [*WSD, "training.steps=20"])
    ways = out.partition("all 10 steps are done. ")[2].strip()
    assert ways in str(error.value)
    assert "training.steps was 10 up to step 10, and is 20 from now on" in str(error.value)
    settings = [word for word in ways.split() if "=" in word]
    assert f"training.branch_from={run}/checkpoints/step_00000006" in settings  # the last one at the peak
    pool.run(1, train, str(tmp_path), str(data), [*WSD, *[s for s in settings if not s.startswith("run=")]])
    rates = [row["learning_rate"] for row in metrics(tmp_path)]
    assert len(rates) == 14
    assert rates[0] == rates[7] == 5e-3
    assert rates[-1] == pytest.approx(1e-3)


def test_before_the_decay_steps_can_be_raised(pool, data, decayed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(decayed, run)
    for step in (8, 10):
        shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
    out = pool.run(1, train_heard, str(run), str(data), [*WSD, "training.steps=12"])[0]
    assert "note: training.steps was 10 up to step 6, and is 12 from now on" in out
    assert [row["learning_rate"] for row in metrics(run)][6:10] == [5e-3, 5e-3, 5e-3, 5e-3 * 3 / 4]


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        (["optimizer.learning_rate=2e-2"], True),
        (["schedule.name=cosine", "schedule.warmup_share=0"], False),
        (["schedule.decay_share=0"], True),
        (["optimizer.clip_grad=0.5"], False),
    ],
    ids=["rate", "cosine", "shares", "clipping"],
)
def test_any_jump_of_the_rate_is_refused(pool, data, decayed, tmp_path, changes, refused):
    run = tmp_path / "run"
    shutil.copytree(decayed, run)
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    settings = [*WSD, "training.steps=10", *changes]
    if refused:
        with pytest.raises(RuntimeError, match="the learning rate would jump"):
            pool.run(1, train, str(run), str(data), settings)
    else:
        key = changes[0].partition("=")[0]
        assert f"note: {key} was " in pool.run(1, train_heard, str(run), str(data), settings)[0]


def test_a_branch_is_known_by_what_it_is(pool, data, run, tmp_path, monkeypatch):
    """However its folder is written, and wherever it is moved to."""
    leg, settings = tmp_path / "leg", [*FLAT, "training.steps=7"]
    pool.run(1, train, str(leg), str(run / "data"), [*settings, branch(run)])

    def again(origin: Path | str) -> None:
        pool.run(1, train, str(leg), str(run / "data"), [*settings, f"training.branch_from={origin}"])

    again(f"{run}/checkpoints/step_00000006/")
    again(f"{run}/../run/checkpoints/step_00000006")
    again(os.path.relpath(run / "checkpoints" / "step_00000006"))
    (tmp_path / "link").symlink_to(run)
    again(tmp_path / "link" / "checkpoints" / "step_00000006")
    shutil.copytree(run, tmp_path / "moved")
    with pytest.raises(RuntimeError, match="they did not branch off"):
        again(tmp_path / "moved" / "checkpoints" / "step_00000003")
    shutil.rmtree(run / "checkpoints" / "step_00000006")
    again(tmp_path / "moved" / "checkpoints" / "step_00000006")


def test_more_validation_windows_than_there_are(pool, data, tmp_path):
    settings = [*FLAT, "training.steps=2"]
    out = pool.run(2, train_heard, str(tmp_path / "a"), str(data), [*settings, "training.valid_windows=100000"])[0]
    there = (Store(data / "valid").size - 1) // 32
    assert f"note: validation is over the {there} windows that" in out
    pool.run(1, train, str(tmp_path / "b"), str(data), [*settings, f"training.valid_windows={there}"])
    last = [json.loads((tmp_path / n / "metrics.jsonl").read_text().splitlines()[-1])["valid_loss"] for n in "ab"]
    assert last[0] == pytest.approx(last[1], abs=1e-5)
