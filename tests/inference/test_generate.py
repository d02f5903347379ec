"""`soda generate` on a tiny random model: what samples.json and the folder hold, seeds, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_soda.codecs.description import read_description
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.hf.load import load_model
from megatron_soda.inference import samples as making
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.held_out import choose
from megatron_soda.inference.run import generate
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.studio import Studio
from megatron_soda.inference.task import Material, Prompt, Task
from megatron_soda.inference.tasks import transcribe
from megatron_soda.registry import TASKS
from megatron_soda.report import build_report
from tests.exported import HOP, MADE_BY, RATE, FakeCodec

QUICK = ("generate.samples=1", "generate.candidates=3", "generate.prompt_seconds=0.2")
KEYS = {
    *("task", "id", "language", "prompt_text", "reference_text", "output_text", "median_text", "note", "candidates"),
    *("verdicts", "good", "audio", "export"),
}


@pytest.fixture(autouse=True)
def no_earlier_checkpoints_and_short_texts(monkeypatch):
    monkeypatch.setattr(making, "earlier_models", lambda recipe, model: iter(()))
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 40)  # a model that knows nothing writes to the end


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def by_task(samples: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {sample["task"]: sample for sample in samples}


def seconds(path: Path) -> float:
    return soundfile.info(path).duration


def test_samples_of_every_task(exported):
    samples = generate(exported.recipe(*QUICK), exported.folder)
    out = exported.run / "samples"
    assert json.loads((out / "samples.json").read_text()) == samples
    assert [entry["task"] for entry in samples] == ["continue", "speak", "transcribe"]
    rows, found = {row["id"]: row for row in exported.rows}, by_task(samples)
    for entry in samples:
        row = rows[entry["id"]]
        assert set(entry) == KEYS
        assert (entry["language"], entry["candidates"], entry["export"]) == ("en", 3, "k")
        cut = "cut off at the length limit"
        assert entry["note"] == (cut if cut in entry["verdicts"]["model"]["problems"] else "ended by itself")
        assert 0 <= entry["good"] <= 3
        frames = len(row["codes"])
        for kind in ("original", "codec"):  # the recording is gone: both are made of its codes
            assert seconds(out / entry["audio"][kind]) == pytest.approx(frames * HOP / RATE)
    assert {name for entry in samples for name in entry["audio"].values()} == {path.name for path in out.glob("*.wav")}
    spoken, heard, going = found["speak"], found["transcribe"], found["continue"]
    assert spoken["prompt_text"] == rows[spoken["id"]]["text"]
    assert spoken["reference_text"] is None
    assert heard["reference_text"] == rows[heard["id"]]["text"]
    assert isinstance(heard["output_text"], str)
    assert isinstance(heard["median_text"], str)
    assert set(heard["audio"]) == {"original", "codec"}
    assert (going["prompt_text"], going["output_text"]) == (None, None)
    assert seconds(out / going["audio"]["prompt"]) == pytest.approx(2 * HOP / RATE)  # round(0.2 s x 12.5)
    assert seconds(out / going["audio"]["model"]) >= 2 * HOP / RATE
    page = build_report(exported.run).read_text()
    for shown in ("Continue", "Speak", "Transcribe", "3 drawn"):
        assert shown in page


def test_a_sample_is_the_best_of_what_is_drawn(exported):
    """Drawn again by hand with the prompt, seed and settings of the recipe."""
    recipe = exported.recipe(*QUICK, "generate.tasks=[speak]", "generate.temperature=0.7", "generate.top_p=0.9")
    (entry,) = generate(recipe, exported.folder)
    model, s = load_model(exported.folder), exported.space
    ids = [s.bos, s.text_start, *model.text.encode(entry["prompt_text"]), s.text_end, s.audio_start]
    longest = (160 - 64) // 4
    prompt = Prompt(ids, {s.audio_end}, longest * 4 + 2)
    how: dict[str, Any] = {"count": 3, "seed": recipe.seed, "temperature": 0.7, "top_p": 0.9, "statistics": True}
    rows = sample(Decoder(model.model), Constraint(s, model.device), [prompt], **how)
    waves = [np.array([t for t in row.ids[len(ids) :] if t >= s.audio_base]).reshape(-1, 4) for row in rows]
    nats = [pytest.approx(float(np.mean(row.nats))) for row in rows]
    best = nats.index(entry["verdicts"]["model"]["nats"])
    assert entry["verdicts"]["median"]["nats"] in nats
    assert entry["verdicts"]["model"]["seconds"] == pytest.approx(len(waves[best]) * HOP / RATE)
    kept, _ = soundfile.read(exported.run / "samples" / entry["audio"]["model"], dtype="float32")
    expected = FakeCodec().decode([s.codes(waves[best].reshape(-1))])[0]
    assert np.abs(kept - expected).max() < 1e-4
    verdict = entry["verdicts"]["model"]["problems"]
    assert ("cut off at the length limit" in verdict) == (rows[best].forced or not rows[best].ended)


def test_samples_that_the_limit_cut_are_named(exported, capsys):
    quick, named = ("max_seconds=0.6", "tasks=[continue]", "candidates=1"), {}
    for seed in range(8):
        (entry,) = generate(exported.recipe(*QUICK, *quick, f"seed={seed}"), exported.folder)
        said = capsys.readouterr().err
        named[entry["note"]] = f"warning cut off at the length limit: continue {entry['id']}." in said
    assert named == {"ended by itself": False, "cut off at the length limit": True}


def test_the_seed_decides(exported):
    made = []
    for seed in (5, 5, 6):
        generate(exported.recipe(*QUICK, "max_seconds=0.6", "tasks=[continue,speak]", f"seed={seed}"), exported.folder)
        made.append(files(exported.run / "samples"))
    assert made[0] == made[1]
    assert made[0]["samples.json"] != made[2]["samples.json"]


def test_a_text_of_ones_own(exported):
    (entry,) = generate(exported.recipe(*QUICK, "generate.tasks=[speak]", "generate.text=stay on"), exported.folder)
    assert (entry["id"], entry["prompt_text"], entry["reference_text"]) == ("", "stay on", None)
    assert set(entry["audio"]) <= {"model", "median"}


def test_what_an_earlier_run_left_goes_away(exported):
    out = exported.run / "samples"
    quick = (*QUICK, "max_seconds=0.6")
    generate(exported.recipe(*quick, "generate.samples=2", "tasks=[continue,speak]"), exported.folder)
    assert (out / "continue_1_model.wav").is_file()
    generate(exported.recipe(*quick, "tasks=[continue]"), exported.folder)
    assert {name.rpartition("_")[0] for name in files(out)} == {"", "continue_0"}


def test_progress_is_one_draw_by_every_checkpoint(exported, monkeypatch):
    from transformers import AutoModelForCausalLM

    def earlier(recipe, model):
        other = AutoModelForCausalLM.from_pretrained(exported.folder).eval()
        other.lm_head.weight.data.mul_(-1)
        yield 3, other
        yield 5, model.model

    monkeypatch.setattr(making, "earlier_models", earlier)
    samples = generate(
        exported.recipe(*QUICK, "max_seconds=0.6", "candidates=1", "tasks=[speak,transcribe]"), exported.folder
    )
    (entry,) = [sample for sample in samples if sample["task"] == "progress"]  # nothing is heard of a transcription
    assert list(entry["audio"]) == ["step_3", "step_5", "step_7"]
    assert entry["id"].startswith("speak: u")
    sounds = [(exported.run / "samples" / name).read_bytes() for name in entry["audio"].values()]
    assert sounds[1] == sounds[2] != sounds[0]
    assert "On the way" in build_report(exported.run).read_text()


def test_without_transcripts_there_is_no_text(exported, capsys):
    store = Store(exported.run / "data" / "test")
    s = store.space
    sound = [np.array([s.bos, s.audio_start, *range(s.audio_base, s.size, 16), s.audio_end, s.eos], np.int32)] * 3
    write_store(store.path, sound, s, **MADE_BY)
    samples = generate(exported.recipe(*QUICK), exported.folder)
    assert [entry["task"] for entry in samples] == ["continue"]
    assert "speak and transcribe: the data have no transcripts" in capsys.readouterr().err
    with pytest.raises(SodaError, match=r"generate\.tasks=\['speak'\]: speak: the data have no transcripts"):
        generate(exported.recipe(*QUICK, "generate.tasks=[speak]"), exported.folder)


def test_what_cannot_be_done_is_said(exported):
    with pytest.raises(SodaError, match=r"no test utterance is under 0\.2 seconds; raise generate\.max_seconds"):
        generate(exported.recipe(*QUICK, "generate.max_seconds=0.2"), exported.folder)
    store = Store(exported.run / "data" / "test")
    made = [store.document(i) for i in range(len(store))]
    write_store(store.path, made, store.space, **{**MADE_BY, "codec": "another"})
    with pytest.raises(SodaError, match="made by codec another"):
        generate(exported.recipe(*QUICK), exported.folder)
    write_store(store.path, made, store.space, **MADE_BY)
    (exported.run / "data" / "test.parquet").unlink()
    with pytest.raises(SodaError, match=r"test\.parquet: no such file; was the data prepared by"):
        generate(exported.recipe(*QUICK), exported.folder)
    (exported.run / "data" / "codec.json").unlink()
    with pytest.raises(SodaError, match="there is no speech in these data"):
        generate(exported.recipe(*QUICK), exported.folder)
    assert not (exported.run / "samples").exists()


def test_choosing_utterances():
    rows = [{"id": i, "codes": np.zeros((n, 4)), "text": t} for i, (n, t) in enumerate([(1, "a"), (2, ""), (3, "b")])]
    rows += [{"id": 3 + i, "codes": np.zeros((20 + i, 4)), "text": "c"} for i in range(8)]
    rows = [{"recording": f"r{row['id']}", "language": "en", **row} for row in rows]
    found = choose(rows, 25, 12.5, 0)
    lengths = [len(row["codes"]) for row in found.usable]
    assert sorted(lengths) == [2, 3, 20, 21, 22, 23, 24, 25]
    assert max(lengths[-2:]) == 3  # the short ones last
    assert {row["id"] for row in found.spoken} == {row["id"] for row in found.usable} - {1}
    again, other = choose(rows, 25, 12.5, 0), choose(rows, 25, 12.5, 1)
    assert [row["id"] for row in found.usable] == [row["id"] for row in again.usable]
    assert [row["id"] for row in found.usable] != [row["id"] for row in other.usable]
    assert found.rows(TASKS["transcribe"]) is found.spoken
    assert found.rows(TASKS["continue"]) is found.usable


def test_choosing_translations():
    sizes = [("a", 4), ("a", 9), ("b", 4), ("c", 4), ("c", 22), ("d", 4), ("d", 4), ("d", 4)]
    rows = [
        {"id": i, "recording": name, "codes": np.zeros((n, 4)), "text": "t", "language": "en"}
        for i, (name, n) in enumerate(sizes)
    ]
    found = choose(rows, 25, 12.5, 0)
    assert [(row["id"], row["translation"]["id"]) for row in found.translated] == [(0, 1)]
    assert found.rows(TASKS["translate"]) is found.translated


def test_translations_are_made_from_held_out_pairs(exported):
    """A random model writes anything; what is kept beside it is the right recording of the pair."""
    pair = [{**exported.rows[i], "recording": "r", "language": lang} for i, lang in ((0, "es"), (1, "en"))]
    data = exported.run / "data"
    write_units(data / "test.parquet", pair, codec=read_description(data))
    quick = exported.recipe(*QUICK, "generate.tasks=[translate]", "generate.max_seconds=1.2")
    (sample,) = generate(quick, exported.folder)
    assert set(sample) == KEYS
    assert (sample["id"], sample["language"]) == (pair[0]["id"], "en")
    assert sample["reference_text"] == f"{pair[0]['text']} → {pair[1]['text']}"
    assert " → " in sample["output_text"]
    assert "<language>" not in sample["output_text"]
    out = exported.run / "samples"
    assert seconds(out / sample["audio"]["prompt"]) == pytest.approx(len(pair[0]["codes"]) * HOP / RATE)
    assert seconds(out / sample["audio"]["codec"]) == pytest.approx(len(pair[1]["codes"]) * HOP / RATE)
    assert "model" in sample["audio"]
    assert TASKS["translate"].meaning in build_report(exported.run).read_text()
    with pytest.raises(SodaError, match=r"no test recording of a source and its translation is under 0\.6 seconds"):
        generate(exported.recipe(*QUICK, "generate.tasks=[translate]", "generate.max_seconds=0.6"), exported.folder)


def test_the_context_limits_the_sound(exported):
    studio = Studio(load_model(exported.folder), exported.recipe("max_seconds=100"), FakeCodec(), exported.run)
    assert (studio.frame_rate, studio.longest) == (12.5, (160 - 64) // 4)
    shorter = exported.recipe("max_seconds=1.0")
    assert Studio(load_model(exported.folder), shorter, FakeCodec(), exported.run).longest == 12


def test_a_registered_task_is_run_and_shown(exported, monkeypatch):
    class Babble(Task):
        name = "babble"
        title = "Babble"
        meaning = "The model says whatever comes."

        def prompt(self, material: Material) -> Prompt:
            return Prompt([material.space.bos, material.space.audio_start], {material.space.audio_end}, 20)

    monkeypatch.setitem(TASKS._members, "babble", Babble())
    (entry,) = generate(exported.recipe(*QUICK, "generate.tasks=[babble]"), exported.folder)
    assert entry["task"] == "babble"
    assert set(entry["audio"]) >= {"original", "codec", "model"}
    assert "The model says whatever comes." in build_report(exported.run).read_text()
