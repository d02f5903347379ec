"""Fine-tuning on packed documents: the loss is that of the documents one by one, prompts have no gradient, and neither
layouts nor a stop in between change anything."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_prep import interleave
from megatron_soda.data.store import Store, write_store
from tests.distributed.test_checkpoint import train_heard
from tests.distributed.test_layouts import LAYOUTS, losses, metrics, same
from tests.distributed.test_resume import describe_anew
from tests.helpers import SPACE, small_recipe

LENGTH = 96
PACKED = [f"data.sequence_length={LENGTH}", "data.pack=true", "data.prompt_spans=1", "training.micro_batch_size=2"]


def translations(count: int, seed: int) -> list[np.ndarray]:
    """Documents of sound, text, text, sound, as for speech-to-speech translation; some are bare text."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        texts = {name: rng.integers(3, SPACE.text_size, rng.integers(1, 7)) for name in "ab"}
        audio = [SPACE.audio_ids(rng.integers(0, SPACE.entries, (rng.integers(1, 5), 4))) for _ in range(2)]
        bare = rng.random() < 0.1
        made.append(interleave.document([("a",)] if bare else [0, "a", "b", 1], texts, audio, SPACE))
    return made


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    for side, (count, seed) in {"train": (90, 0), "valid": (20, 1)}.items():
        write_store(folder / side, translations(count, seed), SPACE, codec="none", tokenizer="none")
    return folder


def sums_of_a_step(run: str, data: str, overrides: list[str]) -> Any:
    """On a rank of the pool: the first step's loss sums, and one of the documents one by one, in float64."""
    import torch

    from megatron_soda.data.packed import Packed
    from megatron_soda.data.windows import Window
    from megatron_soda.model.gpt import forward, inputs_of
    from megatron_soda.parallel import ranks
    from megatron_soda.training.step import Engine

    recipe = small_recipe(Path(run), Path(data), *PACKED, "model.init_std=0.2", *overrides)
    engine = Engine(recipe, SPACE, ranks.init(recipe))
    packed = Packed(Store(Path(data) / "train"), LENGTH, 5, recipe.data.prompt_spans)
    total = weight = 0.0
    for window in (packed[i] for i in range(8)):
        ends = np.flatnonzero(window.ids == SPACE.eos) + 1
        for document in np.split(window.ids, ends)[:-1]:
            if document[1] >= SPACE.text_size:  # what follows the first span, whose end is the first end marker
                spans_end = np.isin(document, [SPACE.text_end, SPACE.audio_end])
                first = int(spans_end.argmax()) + 1 if recipe.data.prompt_spans else 1
            else:
                first = 1
            batch = engine.batcher([Window(document, len(document) - 1)])
            with torch.no_grad():
                logits = forward(engine.models[0], inputs_of(engine.models[0], batch), logits=True)
            logs = logits[0, :, : SPACE.size].double().log_softmax(-1)
            said = logs.gather(1, batch.labels[0][:, None])[first - 1 :, 0]
            total, weight = total - float(said.sum()), weight + len(said)
    result = engine.train_step(packed, 0, 0.0)
    return (float(result.sums[0].sum()), float(result.sums[1].sum())), (total, weight)


@pytest.mark.parametrize("prompt_spans", [0, 1])
def test_a_packed_batch_has_the_loss_of_its_documents_one_by_one(pool, stores, tmp_path, prompt_spans):
    overrides = [f"data.prompt_spans={prompt_spans}"]
    (((total, weight), (alone, labels)),) = pool.run(1, sums_of_a_step, str(tmp_path), str(stores), overrides)
    assert weight == labels
    assert total / weight == pytest.approx(alone / labels, rel=1e-6)


def gradients_of(run: str, data: str, head_rows: str) -> Any:
    """On a rank of the pool: for every position of two packed windows its weight, whether another label there changes
    the gradient, and whether the hidden state that the head reads there has one."""
    import torch

    from megatron_soda.data.packed import Packed
    from megatron_soda.model import head
    from megatron_soda.parallel import ranks
    from megatron_soda.training import step

    recipe = small_recipe(Path(run), Path(data), *PACKED, f"training.head_rows={head_rows}", "model.init_std=0.2")
    engine = step.Engine(recipe, SPACE, ranks.init(recipe))
    packed = Packed(Store(Path(data) / "train"), LENGTH, 5, 1)
    hiddens = []

    def kept(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        hidden.retain_grad()
        hiddens.append(hidden)
        return head.head_loss(hidden, *args, **kwargs)

    real, step.head_loss = step.head_loss, kept
    try:
        engine.train_step(packed, 0, 0.0)
    finally:
        step.head_loss = real
    # A micro-batch has two windows; hidden states are ordered by position, then by window.
    gradients = torch.stack([h.grad.view(LENGTH, 2, -1).abs().sum(-1).T for h in hiddens]).flatten(0, 1)
    return [(packed[i].ids, packed[i].weights, gradients[i].numpy()) for i in range(8)]


@pytest.mark.parametrize("head_rows", ["all", "legal"])
def test_only_the_response_has_a_gradient(pool, stores, tmp_path, head_rows):
    """The state of a position has a gradient from the head exactly if its label is of a response: at both ends of every
    prompt, between documents, and in the padding."""
    (windows,) = pool.run(1, gradients_of, str(tmp_path), str(stores), head_rows)
    boundaries = 0
    for ids, weights, gradient in windows:
        assert ((gradient > 0) == (weights > 0)).all()
        labels = ids[1:]
        starts = np.flatnonzero((ids[:-1] == SPACE.audio_end) & (labels == SPACE.text_start))
        for position in starts:  # where a source's sound ends
            assert gradient[position] > 0
            assert gradient[position - 1] == 0
        for position in np.flatnonzero(labels == SPACE.eos):  # where a document does
            assert gradient[position] > 0
            assert position + 1 == LENGTH or gradient[position + 1] == 0
        boundaries += len(starts)
    assert boundaries > 8


def run_of(pool, stores: Path, run: Path, *overrides: str, layout: str = "one") -> str:
    world, of_layout = LAYOUTS.get(layout, (1, []))
    return pool.run(world, train_heard, str(run), str(stores), [*PACKED, *of_layout, *overrides])[0]


@pytest.fixture(scope="module")
def straight(pool, stores, tmp_path_factory) -> tuple[Path, str]:
    run = tmp_path_factory.mktemp("straight")
    return run, run_of(pool, stores, run)


@pytest.mark.parametrize("layout", ["tp2", "pp2", "dp2_distributed", "cp2", "sp2cp2", "vpp2"])
def test_the_same_at_every_layout(pool, stores, straight, tmp_path, layout):
    run_of(pool, stores, tmp_path, layout=layout)
    assert same(metrics(straight[0]), metrics(tmp_path))
    assert valid_losses(tmp_path) == pytest.approx(valid_losses(straight[0]), abs=1e-5)


def valid_losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["valid_loss"] for row in rows if "valid_loss" in row]


def test_a_run_that_was_stopped_goes_on_bit_by_bit(pool, stores, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_00000006")
    run_of(pool, stores, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(straight[0])
    assert valid_losses(tmp_path / "run") == valid_losses(straight[0])


def test_windows_cannot_change_in_the_middle_of_a_run_but_masks_can(pool, stores, straight, tmp_path):
    shutil.copytree(straight[0], tmp_path / "run")
    more = ["training.steps=7", "schedule.warmup_share=0", "schedule.decay_share=0"]
    with pytest.raises(RuntimeError, match=r"data\.pack was True when .* and is False"):
        run_of(pool, stores, tmp_path / "run", "data.prompt_spans=0", "data.pack=false", *more)
    out = run_of(pool, stores, tmp_path / "run", "data.prompt_spans=0", *more, "optimizer.learning_rate=1e-4")
    assert "note: data.prompt_spans was 1 up to step 6, and is 0 from now on." in out


def test_a_checkpoint_of_an_earlier_version_had_no_packing(pool, stores, straight, tmp_path):
    def earlier(description: dict) -> None:
        del description["data"]["corpora"]["train"]["pack"]
        del description["training"]["prompt_spans"], description["training"]["final_share"]

    shutil.copytree(straight[0], tmp_path / "run")
    describe_anew(tmp_path / "run/checkpoints/step_00000006", earlier)
    more = ["training.steps=7", "optimizer.learning_rate=1e-5"]
    with pytest.raises(RuntimeError, match=r"data\.pack was False when .* and is True"):
        run_of(pool, stores, tmp_path / "run", *more)
    out = run_of(pool, stores, tmp_path / "run", "data.prompt_spans=0", "data.pack=false", *more)
    assert "from step 6" in out
    assert "prompt_spans" not in out
    assert "final_share" not in out


def test_what_is_packed_and_what_is_left_out_is_said(pool, stores, tmp_path):
    long = translations(1, 9)[0]
    long = np.concatenate([long[:-1]] + [long[1:-1]] * 9 + [long[-1:]])
    data = tmp_path / "data"
    write_store(data / "train", [*translations(30, 0), long], SPACE, codec="none", tokenizer="none")
    write_store(data / "valid", translations(9, 1), SPACE, codec="none", tokenizer="none")
    out = run_of(pool, data, tmp_path / "run", "training.steps=1")
    windows = len(Store(data / "train")) - 1
    assert f"note: corpus train: {windows} documents in " in out
    assert f"1 of 31 documents of {data / 'train'} are longer than data.sequence_length=96 + 1 tokens" in out
    assert f"left out: document 30. The longest has {len(long)} tokens." in out


@pytest.mark.parametrize("world", [1, 2])
def test_documents_without_a_response_are_refused(pool, stores, tmp_path, world):
    layout = "dp2" if world == 2 else "one"
    with pytest.raises(
        RuntimeError, match=r"train: \d+ of 90 documents have no span after the 4 of data\.prompt_spans"
    ):
        run_of(pool, stores, tmp_path / "run", "data.prompt_spans=4", layout=layout)
