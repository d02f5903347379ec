"""Evaluation and the page of models that know sound without text, text without sound, or one code a frame."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.prepare import prepare
from megatron_soda.commands.resolve import resolve
from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError
from megatron_soda.evaluation.run import evaluate
from megatron_soda.hf.load import load_model
from megatron_soda.inference.run import generate
from megatron_soda.report import build_report
from tests.distributed.test_export import export
from tests.distributed.test_layouts import train
from tests.helpers import small_recipe
from tests.voices import write_speech

ACOUSTIC = {f"acoustic_{level}" for level in range(1, 8)}
KINDS = {  # window, classes of tokens after BOS, what `soda generate` says (None: it makes sound)
    "audio-only": (400, {"marker", "semantic", *ACOUSTIC}, None),
    "semantic-only": (64, {"marker", "semantic"}, "one code per frame"),
    "text-only": (64, {"marker", "text"}, "no speech in these data"),
}


@pytest.mark.parametrize("kind", [pytest.param("audio-only", marks=pytest.mark.full), "semantic-only", "text-only"])
def test_half_of_the_tokens(pool, tmp_path, kind):
    window, classes, refusal = KINDS[kind]
    run, data = tmp_path / "run", tmp_path / "run" / "data"
    if kind == "text-only":
        lines = [f"the {n} birds of day {n * 7} sang {n % 5} songs" for n in range(200)]
        (tmp_path / "text.txt").write_text("\n".join(lines))
        source = ["prepare.speech=''", f"prepare.text=[{tmp_path / 'text.txt'}]"]
    else:
        source = [f"prepare.speech={write_speech(tmp_path / 'speech', 30)}", "prepare.text=[]"]
    overrides = [
        *source,
        f"prepare.orders=[{kind}]",
        "prepare.text_pieces=300",
        "prepare.valid_share=0.2",
        "prepare.test_share=0.2",
        "training.steps=2",
        f"data.sequence_length={window}",
        "training.valid_windows=1",
        "evaluate.generations=3",
        "evaluate.max_tokens=60",
        "generate.samples=1",
        "generate.candidates=2",
        "generate.max_seconds=2",
    ]
    prepare(small_recipe(run, data, *overrides))
    pool.run(1, train, str(run), str(data), overrides)
    (folder,) = pool.run(1, export, str(run), str(data), overrides)

    result = evaluate(resolve(folder, [f"run={run}", f"data.path={data}"]), Path(folder))
    nll, grammar = result["nll"], result["grammar"]
    assert set(nll["classes"]) == classes
    model, store = load_model(Path(folder)), Store(data / "test")
    expected = []
    for index in range(len(store)):  # one by one, in float64
        ids = torch.from_numpy(store.document(index)[: window + 1].astype(np.int64))
        logits = model.model(input_ids=ids[None, :-1]).logits[0].double()
        expected.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").detach().numpy())
    assert nll["all"]["tokens"] == sum(map(len, expected))
    assert nll["all"]["model_nats"] == pytest.approx(np.concatenate(expected).mean(), abs=1e-4)
    assert grammar["valid"] == grammar["generations"] == 3
    assert ("duration_exact" in grammar) == (kind == "audio-only")

    if refusal is None:
        generate(resolve(folder, [f"run={run}", f"data.path={data}"]), Path(folder))
        samples = json.loads((run / "samples" / "samples.json").read_text())
        assert {sample["task"] for sample in samples} <= {"continue", "progress"}
        for sample in samples:
            assert all((run / "samples" / name).stat().st_size > 1000 for name in sample["audio"].values())
    else:
        with pytest.raises(SodaError, match=refusal):
            generate(resolve(folder, [f"run={run}", f"data.path={data}"]), Path(folder))
    page = build_report(run).read_text()
    for name in classes:
        assert name.replace("_", " ") in page
