"""Checkpoints: written beside training, kept or forgotten, checked before they are used, and branched off."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.data.store import Store, write_store
from tests.distributed.test_layouts import LAYOUTS, losses, train
from tests.helpers import SPACE, documents, small_recipe

FLAT = ["schedule.warmup_share=0", "schedule.decay_share=0"]
SAVES = [*FLAT, "training.steps=12", "checkpoint.save_every=3"]


def folders(run: Path) -> list[int]:
    return sorted(int(f.name[5:]) for f in (run / "checkpoints").iterdir() if f.name.startswith("step_"))


def train_watched(run: str, data: str, overrides: list[str]) -> list[list[int]]:
    """On a rank of the pool: trains; the checkpoints that can be seen after every step, each proved whole."""
    from unittest import mock

    from megatron_soda.training import checkpoint, trainer

    seen = []
    poll = checkpoint.Saver.poll

    def watched(self):
        poll(self)
        steps = checkpoint.saved_steps(Path(run))
        for step in steps:
            assert checkpoint.damage(checkpoint.folder_of(Path(run), step)) == []
        seen.append(steps)

    with mock.patch.object(checkpoint.Saver, "poll", watched):
        trainer.train(small_recipe(Path(run), Path(data), *overrides))
    return seen


@pytest.mark.parametrize(
    "layout",
    ["one", pytest.param("dp2_distributed", marks=pytest.mark.full), pytest.param("tp2pp2", marks=pytest.mark.full)],
)
def test_async_checkpoints_are_whole_when_they_appear(pool, data, tmp_path, layout):
    world, overrides = LAYOUTS.get(layout, (1, []))
    plain, run = tmp_path / "plain", tmp_path / "run"
    pool.run(world, train, str(plain), str(data), [*overrides, *FLAT, "training.steps=9"])
    asynchronous = [*overrides, *FLAT, "checkpoint.async_save=true"]
    seen = pool.run(world, train_watched, str(run), str(data), [*asynchronous, "training.steps=7"])[0]
    assert seen[-1][-1] in (3, 6)
    assert folders(run) == [3, 6, 7]
    assert not list((run / "checkpoints").glob(".*"))
    shutil.rmtree(run / "checkpoints" / "step_00000007")  # after the one before it training went on
    pool.run(world, train, str(run), str(data), [*asynchronous, "training.steps=9"])
    assert losses(run) == losses(plain)  # bit for bit: the state that was written is that of its step, not a later one


def test_old_checkpoints_are_forgotten(pool, data, tmp_path):
    keep = ["checkpoint.save_every=1", "checkpoint.keep_last=2", "checkpoint.keep_every=3", "training.steps=8"]
    pool.run(1, train, str(tmp_path), str(data), keep)
    assert folders(tmp_path) == [3, 6, 7, 8]


def train_heard(run: str, data: str, overrides: list[str]) -> str:
    """On a rank of the pool: trains; what was printed."""
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        train(run, data, overrides)
    return out.getvalue()


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "no manifest"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(pool, data, saved, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    newest = run / "checkpoints" / "step_00000012"
    (run / "checkpoints" / ".step_00000015.tmp").mkdir()  # what a kill leaves
    victim = max(newest.glob("__*.distcp"))
    content = bytearray(victim.read_bytes())
    if damage == "flipped":
        content[len(content) // 2] ^= 1
        victim.write_bytes(bytes(content))
    elif damage == "cut":
        victim.write_bytes(bytes(content[:-7]))
    elif damage == "gone":
        victim.unlink()
    else:
        (newest / "manifest.json").unlink()
    out = pool.run(2, train_heard, str(run), str(data), SAVES)[0]
    assert "step_00000012 is damaged and not used" in out
    assert ("manifest.json" if damage == "no manifest" else victim.name) in out
    assert "from step 9" in out
    assert losses(run) == losses(saved)
    assert folders(run) == [3, 6, 9, 12]
    assert not list((run / "checkpoints").glob(".*"))


def test_when_all_are_damaged_nothing_starts_anew(pool, data, saved, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    for path in run.glob("checkpoints/*/common.pt"):
        path.write_bytes(b"")
    with pytest.raises(RuntimeError, match="every checkpoint is damaged"):
        pool.run(1, train, str(run), str(data), [])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.name=cautious"], r"another optimizer: its optimizer\.name is adamw"),
        (["parallel.distributed_optimizer=true"], r"another optimizer: its optimizer\.distributed"),
        (["precision.dtype=bf16"], r"another optimizer: its optimizer\.half"),
        (["model.ffn_hidden_size=128"], r"another model: its model\.ffn_hidden_size is 64"),
        (["model.tie_embeddings=true"], r"another model: its model\.tie_embeddings"),
        (["seed=1"], "seed was 1234 when the checkpoint of step 12 was written, and is 1"),
        (["data.align_windows=true"], r"data\.align_windows was False"),
        (["training.branch_from=elsewhere"], "did not branch off training.branch_from=elsewhere but off nothing"),
        (["training.global_batch_size=16"], "by this recipe it would be 192: training.global_batch_size=16 is not"),
    ],
)
def test_another_model_or_optimizer_is_refused(pool, data, saved, tmp_path, overrides, message):
    run = tmp_path / "run"
    shutil.copytree(saved, run)
    with pytest.raises(RuntimeError, match=message):
        pool.run(1, train, str(run), str(data), [*FLAT, "training.steps=30", *overrides])


@pytest.mark.parametrize("start", ["model.init=levanter", "model.init_std=0.1"])
def test_how_weights_were_drawn_is_forgotten_after_the_start(pool, data, saved, tmp_path, start):
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    before = losses(folder)
    pool.run(1, train, str(folder), str(data), ["training.steps=13", start])
    assert losses(folder)[:-1] == before


def test_another_vocabulary_is_refused(pool, saved, tmp_path):
    from dataclasses import replace

    run, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(saved, run)
    space = replace(SPACE, text_size=80)
    for side in ("train", "valid"):
        write_store(data / side, documents(100, 0, space), space)
    with pytest.raises(RuntimeError, match=r"another vocabulary: its space\.text_size is 64"):
        pool.run(1, train, str(run), str(data), [*FLAT, "training.steps=30"])


@pytest.fixture(scope="module")
def corpora(tmp_path_factory, data) -> list[str]:
    """Two corpora and what validates them."""
    folder = tmp_path_factory.mktemp("corpora")
    for name, count, seed in (("speech", 120, 5), ("text", 60, 6)):
        write_store(folder / name, documents(count, seed), SPACE)
    return [f"data.corpora={{speech: {folder}/speech, text: {folder}/text}}"]


def mix(*stages: tuple[int, float]) -> str:
    made = [f"{{from_step: {at}, shares: {{speech: {share}, text: {1 - share}}}}}" for at, share in stages]
    return f"data.mix=[{', '.join(made)}]"


def consumed(run: Path, step: int) -> dict[str, int]:
    return json.loads((run / "checkpoints" / f"step_{step:08d}" / "checkpoint.json").read_text())["consumed"]


def test_shares_that_change_on_the_way(pool, data, corpora, tmp_path):
    """The same at any data-parallel size, through a resume, and without a window lost or repeated."""
    stages = mix((0, 0.75), (3, 0.25), (5, 1.0))
    straight, run = tmp_path / "straight", tmp_path / "run"
    settings = [*corpora, stages, *FLAT, "training.steps=8"]
    pool.run(1, train, str(straight), str(data), settings)
    assert consumed(straight, 8) == {"speech": 6 * 3 + 2 * 2 + 8 * 3, "text": 2 * 3 + 6 * 2}
    pool.run(2, train, str(run), str(data), [*settings, "training.steps=4"])
    pool.run(1, train, str(run), str(data), settings)
    assert losses(run) == pytest.approx(losses(straight), abs=1e-5)
    with pytest.raises(RuntimeError, match="the shares of steps that are done were changed"):
        pool.run(1, train, str(run), str(data), [*corpora, mix((0, 0.7)), *FLAT, "training.steps=30"])
    # A stage for the steps to come is no such change.
    later = mix((0, 0.75), (3, 0.25), (5, 1.0), (8, 0.0))
    pool.run(1, train, str(run), str(data), [*corpora, later, *FLAT, "training.steps=10"])
    assert consumed(run, 10)["speech"] == consumed(run, 8)["speech"]


def test_a_decay_leg_with_another_mix(pool, data, corpora, tmp_path):
    """Off a checkpoint of the stable phase: weights, optimizer, step and the places in the corpora go on."""
    trunk, leg, same = tmp_path / "trunk", tmp_path / "leg", tmp_path / "same"
    pool.run(1, train, str(trunk), str(data), [*corpora, mix((0, 0.7)), *FLAT])
    origin = f"training.branch_from={trunk}/checkpoints/step_00000003"
    pool.run(1, train, str(same), str(data), [*corpora, mix((0, 0.7)), *FLAT, origin])
    assert losses(same) == losses(trunk)[3:]  # a branch that changes nothing is the run itself, bit for bit
    # The leg brings a corpus of its own, which the trunk did not have.
    more = corpora[0].replace("text:", f"more: {data}/valid, text:")
    stage = "data.mix=[{from_step: 3, shares: {more: 0.25, text: 0.75}}]"
    decay = [more, stage, origin, "schedule.name=decay"]
    with pytest.raises(RuntimeError, match=r"training\.steps=3 is not past step 3"):
        pool.run(1, train, str(leg), str(data), [*decay, "training.steps=3"])
    pool.run(1, train, str(leg), str(data), [*decay, "training.steps=7", "checkpoint.save_every=2"])
    pool.run(1, train, str(leg), str(data), [*decay, "training.steps=7"])  # nothing to do
    rates = [json.loads(line) for line in (leg / "metrics.jsonl").read_text().splitlines()]
    rates = [row["learning_rate"] for row in rates if "learning_rate" in row]
    peak = small_recipe(leg, data).optimizer.learning_rate
    assert rates == pytest.approx([peak * part / 4 for part in (4, 3, 2, 1)])
    assert consumed(leg, 7) == {
        "speech": consumed(trunk, 3)["speech"],
        "text": consumed(trunk, 3)["text"] + 24,
        "more": 8,
    }
    # Stopped and resumed, the leg knows where it began.
    shutil.rmtree(leg / "checkpoints" / "step_00000007")
    before = losses(leg)
    pool.run(1, train, str(leg), str(data), [*decay, "training.steps=7"])
    assert losses(leg) == before
    with pytest.raises(RuntimeError, match=r"branch_from=.*nowhere"):
        pool.run(1, train, str(tmp_path / "x"), str(data), ["schedule.name=decay", "training.branch_from=/nowhere"])


def test_windows_on_whole_frames_and_data_that_do_not_fit(pool, data, corpora, tmp_path):
    pool.run(2, train, str(tmp_path / "a"), str(data), ["data.align_windows=true"])
    pool.run(1, train, str(tmp_path / "b"), str(data), ["data.align_windows=true"])
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), abs=1e-5)
    for overrides, message in [
        ([*corpora, "data.mix=[{shares: {speech: 0.7, text: 0.2}}]"], "sum to 0.9, not to 1"),
        ([*corpora, "data.mix=[{shares: {speach: 1.0}}]"], "Did you mean speech"),
        ([*corpora, "data.mix=[{from_step: 5, shares: {speech: 1.0}}]"], "training begins at step 0"),
        (["data.sequence_length=65536"], "the store is too small"),
        (["training.loss_weights={semantik: 1}"], "Did you mean semantic"),
        ([f"training.loss_weights={{{', '.join(f'{name}: 0' for name in SPACE.class_names)}}}"], "nothing to learn"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            pool.run(1, train, str(tmp_path / "c"), str(data), overrides)
    empty = tmp_path / "empty"
    shutil.copytree(data, empty)
    write_store(empty / "train", [], SPACE)
    with pytest.raises(RuntimeError, match="no tokens"):
        pool.run(1, train, str(tmp_path / "d"), str(empty), [])
    assert np.array_equal(Store(data / "train").document(0), documents(1)[0])
