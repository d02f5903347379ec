"""No tensor of the CPU meets one of a CUDA device: training, export, evaluation, generation and codecs on a pretended
device (tests/fakes/device_fake.py), without a GPU.

A process of its own does all the work, since the device and Transformer Engine (the fake) must be there before megatron
is imported. The tests below look at what it found.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

ROOT = Path(__file__).parents[1]
BF16, DISTRIBUTED, CAUTIOUS = "precision.dtype=bf16", "parallel.distributed_optimizer=true", "optimizer.name=cautious"
LOCAL, TE = "training.backend=local", "training.backend=transformer_engine"
LEGAL = "training.head_rows=legal", "training.head_other_share=0.1"
RUNS = {
    "cautious": [LOCAL, BF16, CAUTIOUS, DISTRIBUTED, *LEGAL],
    "te": [TE, BF16, DISTRIBUTED],
}
MORE_RUNS = {
    "local": [LOCAL],
    "bf16": [LOCAL, BF16, DISTRIBUTED],
    "cautious_fp32": [LOCAL, CAUTIOUS, "training.recompute=true", "training.loss_weights={text: 2}"],
    "te_tied": [TE, BF16, "data.reset_positions=true", "model.tie_embeddings=true"],
}
CODECS = "mimi", "encodec", "dac"


# --- in the process with the device


def swiglu(both: Any) -> Any:
    """In the place of the Triton kernels, which read memory of a real device. See model/kernels.py."""
    import torch

    gate, up = both.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up


def statistics(scores: Any, columns: int, label: Any) -> tuple[Any, Any, Any]:
    some = scores[:, :columns].float()
    highest = some.amax(1)
    of_label = some.gather(1, label.clamp(min=0)[:, None])[:, 0].where(label >= 0, 0.0)
    return highest, (some - highest[:, None]).exp().sum(1), of_label


def gradient_(scores: Any, columns: int, label: Any, highest: Any, factor: Any, weight: Any) -> None:
    some = (scores[:, :columns].float() - highest[:, None]).exp() * factor[:, None]
    some.scatter_add_(1, label.clamp(min=0)[:, None], (-weight).where(label >= 0, 0.0)[:, None])
    scores.zero_()[:, :columns] = some.to(scores.dtype)


def small(run: Path, data: Path, *overrides: str) -> Any:
    from tests.helpers import small_recipe

    return small_recipe(run, data, "model.num_layers=2", "training.valid_every=2", "schedule.decay_share=0", *overrides)


def train(run: Path, data: Path, *overrides: str) -> dict[str, Any]:
    """Four steps with validation and checkpoints; the last two after a load.

    happened: micro-batches that were built (the first sample of their step, their number) and waits for the device.
    """
    import torch

    from megatron_soda.training import step, trainer

    engines, before, build = [], step.Engine.__init__, step.Engine.micro_batch
    happened: list[Any] = []

    def built(self: Any, samples: Any, first_sample: int, index: int) -> Any:
        happened.append([first_sample, index])
        return build(self, samples, first_sample, index)

    def waited(*_: Any) -> None:
        happened.append("waits")

    def remember(self: Any, *args: Any) -> None:
        before(self, *args)
        engines.append(self)

    without_te = mock.patch.dict(sys.modules, {"transformer_engine.pytorch.optimizers": None})
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(step.Engine, "__init__", remember))
        stack.enter_context(mock.patch.object(step.Engine, "micro_batch", built))
        stack.enter_context(mock.patch.object(torch.cuda, "synchronize", waited))
        if LOCAL in overrides:  # torch's Adam
            stack.enter_context(without_te)
        for steps in (2, 4):
            trainer.train(small(run, data, *overrides, f"training.steps={steps}"))
    last = engines[-1]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in metrics if "loss" in row],
        "valid": [row["valid_loss"] for row in metrics if "valid_loss" in row],
        "adam": last.optimizer.backend,
        "happened": [event for event, _ in itertools.groupby(happened)],
        "on": all(p.is_cuda for model in last.models for p in model.parameters()),
    }


def not_ahead(run: Path, data: Path) -> dict[str, Any]:
    from megatron_soda.training import step

    with mock.patch.object(step.Engine, "_build_ahead"):
        return train(run, data, *RUNS["te"])


def a_tensor_of_the_cpu(run: Path, data: Path) -> str:
    """What a step says of an attention mask that was made without a device."""
    from megatron_soda.model import gpt
    from tests.fakes.device_fake import MismatchError

    right = gpt.attention_mask
    with mock.patch.object(gpt, "attention_mask", lambda segments: right(segments).cpu()):
        try:
            train(run, data, LOCAL)
        except MismatchError as error:
            return str(error)
    return ""


def copies(marks: Any) -> list[Any]:
    """What a batch copies to the device."""
    import numpy as np

    from megatron_soda.data.batch import Batcher
    from megatron_soda.data.windows import Window
    from tests.helpers import SPACE

    batcher, ids = Batcher(SPACE, device="cuda"), np.full(33, SPACE.eos, np.int32)
    marks.copied.clear()
    batch = batcher([Window(ids, 32, np.ones(32, np.float32))] * 2)
    assert batch.tokens.is_cuda
    return list(marks.copied)


def exported(folder: Path) -> Any:
    """A tiny model, and its evaluation, samples and answers."""
    from megatron_soda.codecs import description
    from tests.exported import FakeCodec, write_exported

    description._load = lambda *_: FakeCodec()
    return write_exported(folder / "tiny")


def evaluate(tiny: Any) -> list[str]:
    from megatron_soda.evaluation.run import evaluate as run

    short = ["evaluate.documents=5", "evaluate.generations=2", "evaluate.max_tokens=20"]
    return sorted(run(tiny.recipe("evaluate.suite=[nll, gain, grammar]", *short), tiny.folder))


def generate(tiny: Any) -> int:
    from megatron_soda.inference.run import generate as run

    return len(run(tiny.recipe("generate.max_seconds=0.5", "generate.candidates=2"), tiny.folder))


def own(tiny: Any) -> dict[str, int]:
    """A text spoken and a recording written down and continued, as for `soda serve` and the commands."""
    from megatron_soda.inference.own import answer, continuation, open_studio
    from megatron_soda.registry import TASKS

    studio = open_studio(tiny.folder)
    codes = [row["codes"] for row in tiny.rows[:2]]
    asked = {
        "transcribe": [studio.material(codes=one) for one in codes],
        "speak": [studio.material(text=row["text"]) for row in tiny.rows[:2]],
        "continue": [continuation(studio, one, 0.3, "a") for one in codes],
    }
    return {name: len(answer(studio, TASKS[name], materials)) for name, materials in asked.items()}


def export(run: Path, data: Path, *overrides: str) -> float:
    """The largest difference of a logit between the checkpoint's model and the export's."""
    from megatron_soda.hf import compare
    from megatron_soda.hf import export as module
    from megatron_soda.training import checkpoint
    from tests.helpers import SPACE

    recipe, found = small(run, data, *overrides), checkpoint.newest_whole(run)
    assert found is not None
    target = run / "model"
    target.mkdir()
    saved = json.loads((found / "checkpoint.json").read_text())
    module.write_model(module.Source(recipe, found, saved, SPACE, None, data), target)
    return compare.compare_logits(recipe, SPACE, found, target, compare.example_documents(SPACE))


def codec(folder: Path, name: str) -> list[Any]:
    """Waves encoded in batches and one at a time, decoded whole and in parts."""
    from megatron_soda.codecs import load_codec
    from tests.codecs import test_codecs
    from tests.voices import voice

    place = folder / name
    getattr(test_codecs, f"tiny_{name}")().save_pretrained(place)
    made = load_codec(name, place, device="cuda")
    waves = [voice(1, seconds) for seconds in (1.3, 0.4, 2.0)]
    codes = made.encode(waves)
    return [len(made.decode(codes)[0]), len(made.decode_part(codes[0], 1, 3)), made.fingerprint]


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return {"found": function(*arguments)}
    except BaseException:
        return {"error": traceback.format_exc()}


def work(out: Path, full: bool) -> None:
    from tests.fakes import transformer_engine_fake
    from tests.fakes.device_fake import pretended

    with tempfile.TemporaryDirectory() as name, pretended() as marks:
        transformer_engine_fake.install()
        import torch

        from megatron_soda.parallel import ranks  # noqa: F401  before anything of megatron-core
        from tests.helpers import write_data

        sys.modules["megatron_soda.model.kernels"] = sys.modules[__name__]
        torch.set_num_threads(1)
        folder = Path(name)
        data = write_data(folder / "data")
        results: dict[str, Any] = {}
        for run, overrides in (MORE_RUNS if full else RUNS).items():
            results[run] = attempt(train, folder / run, data, *overrides)
            results[f"export {run}"] = attempt(export, folder / run, data, *overrides)
        if full:
            results["not ahead"] = attempt(not_ahead, folder / "not_ahead", data)
            results["a tensor of the CPU"] = attempt(a_tensor_of_the_cpu, folder / "broken", data)
        else:
            results["copies"] = attempt(copies, marks)
        tiny = exported(folder)
        for function in (evaluate, generate) if full else (own,):
            results[function.__name__] = attempt(function, tiny)
        for codec_name in CODECS[1:] if full else CODECS[:1]:
            results[codec_name] = attempt(codec, folder, codec_name)
        out.write_text(json.dumps(results))


# --- what it found


def results_of(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "results.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.test_devices", str(out), *arguments]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("devices"))


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> dict[str, Any]:
    return results_of(tmp_path_factory.mktemp("more_devices"), "full")


def of(results: dict[str, Any], name: str) -> Any:
    if "error" in results[name]:
        pytest.fail(f"{name}\n{results[name]['error']}")
    return results[name]["found"]


def check_run(results: dict[str, Any], name: str, overrides: list[str]) -> None:
    found = of(results, name)
    assert found["on"]
    assert len(found["losses"]) == 4
    assert found["losses"][-1] < found["losses"][0]
    wanted = "Transformer" if TE in overrides else "Cautious" if CAUTIOUS in overrides else "torch"
    assert found["adam"].startswith(wanted)
    assert of(results, f"export {name}") < 1e-4


@pytest.mark.parametrize("name", RUNS)
def test_training_and_export(results, name):
    check_run(results, name, RUNS[name])


@pytest.mark.full
@pytest.mark.parametrize("name", MORE_RUNS)
def test_more_training(more, name):
    check_run(more, name, MORE_RUNS[name])


def test_the_next_micro_batch_is_built_before_the_host_waits(results):
    steps = [[[0, 0], [0, 1], [8, 0], "waits"], [[8, 1], [16, 0], "waits"]]
    assert of(results, "te")["happened"][:7] == [*steps[0], *steps[1]]


def test_the_host_does_not_wait_for_its_copies(results):
    assert of(results, "copies") == [[[2, 33], True], [[2], True], [[2, 32], True]]


@pytest.mark.full
def test_it_is_the_same_micro_batch(results, more):
    assert of(more, "not ahead")["losses"] == of(results, "te")["losses"]
    assert of(more, "not ahead")["happened"][2:4] == ["waits", [8, 0]]


@pytest.mark.full
def test_precisions_agree(more):
    """So what was computed on the pretended device is what it should be."""
    full, half = (of(more, name) for name in ("local", "bf16"))
    for kind in ("losses", "valid"):
        assert half[kind] == pytest.approx(full[kind], abs=0.01)


@pytest.mark.full
def test_a_tensor_of_the_cpu_is_found(more):
    assert "operands on two devices" in of(more, "a tensor of the CPU")


def test_answers(results):
    assert of(results, "own") == {"transcribe": 2, "speak": 2, "continue": 2}


@pytest.mark.full
def test_evaluation_and_generation(more):
    assert {"nll", "gain", "grammar"} < set(of(more, "evaluate"))
    assert of(more, "generate") > 2


def check_codec(results: dict[str, Any], name: str) -> None:
    whole, part, _ = of(results, name)
    assert whole > part > 0


def test_mimi(results):
    check_codec(results, "mimi")


@pytest.mark.full
@pytest.mark.parametrize("name", CODECS[1:])
def test_codecs(more, name):
    check_codec(more, name)


if __name__ == "__main__":
    work(Path(sys.argv[1]), "full" in sys.argv)
