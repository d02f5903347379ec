"""Recognition, synthesis and continuation: figures counted by hand, models that are too short, cut off or silent, and
evaluations that are interrupted."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_soda.codecs.description import read_description
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import answers
from megatron_soda.evaluation.run import evaluate
from megatron_soda.inference.own import Answer
from megatron_soda.inference.tasks import transcribe
from megatron_soda.report import build_report
from tests.evaluation.judges import Listener, Voice, fake_judges
from tests.exported import HOP, RATE

JUDGES = "evaluate.judges=[listener,voice,taste]"
SPOKEN = "suite=[asr,tts,continuation]"


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 12)
    with fake_judges():
        yield


def answer_with(monkeypatch, *given: Answer) -> list[Any]:
    """The model's answers, in turn; returns the materials that they answer."""
    asked: list[Any] = []

    def answer(studio: Any, task: Any, materials: Any, chance: Any) -> list[Answer]:
        first = len(asked)
        asked.extend(materials)
        return list(given[first : len(asked)])

    monkeypatch.setattr(answers, "answer", answer)
    return asked


def frames(count: int, code: int = 3) -> np.ndarray:
    return np.full((count, 4), code, np.int16)


def measured(exported, *overrides: str) -> dict[str, Any]:
    return evaluate(exported.recipe(JUDGES, *overrides), exported.folder)


def model(result: dict[str, Any]) -> dict[str, Any]:
    return {name: row["model"] for name, row in result["figures"].items()}


# ---- recognition


def test_recognition_by_hand(exported, monkeypatch, capsys):
    """Six utterances, of which the last does not fit the context."""
    said = [row["text"] for row in exported.rows]
    words = [len(text.replace(".", "").split()) for text in said]
    wrong = f"{said[1].split()[0].upper()}, xx"  # the first word is right; one is replaced, the others are left out
    given = [said[0], wrong, "", f"well {said[3]}", said[4]]
    asked = answer_with(monkeypatch, *(Answer([text], None, i != 2) for i, text in enumerate(given)))
    found = measured(exported, "suite=[asr]")["asr"]
    assert len(asked) == 5
    errors = [0, words[1] - 1, words[2], 1, 0, words[5]]
    assert model(found) == {
        "ended by itself": 4,
        "longer than the context": 1,
        "WER corpus, authors": pytest.approx(sum(errors) / sum(words)),
        "WER utterance, authors": pytest.approx(np.mean(np.array(errors) / words)),
        "WER corpus, whisper": pytest.approx((sum(errors) + 1) / sum(words)),  # the comma stays, in this fake one
        "WER utterance, whisper": pytest.approx(np.mean(np.array(errors) / words) + 1 / words[1] / 6),
    }
    assert found["longer_than_the_context"] == ["u5"]
    heard = [abs_errors(text) for text in said]
    row = found["figures"]["WER corpus, authors"]
    assert row["codec"] == pytest.approx(sum(heard) / sum(words))
    assert "original" not in row  # the recordings are gone
    items = json.loads((exported.run / "evaluate/asr/items.json").read_text())
    assert [item["model"] for item in items] == [*given, ""]
    assert items[0]["codec"] == "stay on the line"
    shown = {item["name"] for item in found["shown"]["worst"]}
    assert {"u2", "u5"} <= shown
    wave, rate = soundfile.read(exported.run / "evaluate" / found["shown"]["best"][0]["audio"]["codec"])
    assert (len(wave), rate) == (len(exported.rows[0]["codes"]) * HOP, RATE)
    heading = capsys.readouterr().out.splitlines()[0].split()
    assert heading == ["asr", "items", "codec", "model", "from", "to", "of"]
    page = build_report(exported.run).read_text()
    assert "Recognition: word error rate" in page
    assert page.count("<audio controls") == 6  # the worst and the best three, as the codec makes them
    assert '<dt>said</dt><dd dir="auto">' + said[0].strip() in page
    assert f'; codec <data value="{row["codec"]}">' in page


def abs_errors(text: str) -> int:
    """Of the fake recogniser, which always hears the same."""
    from megatron_soda.evaluation.words import authors_recognition, word_errors

    return word_errors(authors_recognition(text, "en"), "stay on the line".split())


def test_without_judges_the_model_alone_is_measured(exported, monkeypatch):
    answer_with(monkeypatch, *(Answer([row["text"]], None, True) for row in exported.rows[:5]))
    found = evaluate(exported.recipe("suite=[asr]", "evaluate.judges=[]"), exported.folder)["asr"]
    assert set(found["figures"]["WER corpus, authors"]) >= {"model", "low", "high"}
    assert "codec" not in found["figures"]["WER corpus, authors"]
    assert not Listener.calls


def librispeech(folder: Path, names: dict[str, str]) -> None:
    for i, (name, text) in enumerate(names.items()):
        where = folder / name.split("-")[0] / name.split("-")[1]
        where.mkdir(parents=True, exist_ok=True)
        wave = 0.1 * (i + 1) * np.sin(np.arange((6 + i) * HOP) / 5)
        soundfile.write(where / f"{name}.flac", wave, RATE)
        with (where / f"{name.rsplit('-', 1)[0]}.trans.txt").open("a") as file:
            file.write(f"{name} {text}\n")


NAMES = {"1-2-0000": "STAY ON THE LINE", "1-2-0001": "PRESS TWO", "3-4-0000": "STAY ON LINE"}


def test_librispeech_with_examples(exported, tmp_path, monkeypatch):
    root = tmp_path / "benchmarks"
    librispeech(root / "asr", NAMES)
    with pytest.raises(SodaError, match="asr_shots, which has the examples, is not there"):
        measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}", "evaluate.shots=2")
    librispeech(root / "asr_shots", {f"9-9-{i:04d}": f"IT'S {i}" for i in range(5)})
    with pytest.raises(SodaError, match=r"evaluate\.shots=9: there are only 5 recordings to draw from"):
        measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}", "evaluate.shots=9")
    asked = answer_with(monkeypatch, *(Answer(["stay on the line"], None, True) for _ in range(6)))
    recipe = ("suite=[asr]", f"evaluate.benchmarks={root}", "evaluate.shots=1", "data.path=/nowhere")
    found = measured(exported, *recipe)["asr"]
    row = found["figures"]["WER corpus, authors"]
    # "press two" is four words wrong, "stay on line" one; the fake recogniser says the same.
    assert row["model"] == row["original"] == row["codec"] == pytest.approx(5 / 9)
    assert row["codec_less_original"] == {"value": 0, "low": 0, "high": 0}
    (shot,) = found["shots"]
    space = exported.space
    examples = [material.examples for material in asked]
    assert len(set(examples)) == 1
    ids = np.array(examples[0])
    assert space.check(ids, 4) is None
    text = ids[(ids > space.eos) & (ids < space.text_start)]
    from megatron_soda.hf.load import load_model

    assert load_model(exported.folder).text.decode(text.tolist()) == f"its {int(shot[-4:])}"  # as the authors write it
    assert [tuple(material.codes.shape) for material in asked] == [(6, 4), (7, 4), (8, 4)]
    assert found["must_match"] != measured(exported, *recipe, "seed=3")["asr"]["must_match"]  # other examples


def test_a_text_without_words_is_no_example(exported, tmp_path, monkeypatch):
    root = tmp_path / "benchmarks"
    librispeech(root / "asr", NAMES)
    librispeech(root / "asr_shots", {"9-9-0000": "...", "9-9-0001": "HERE", "9-9-0002": "?!"})
    recipe = ("suite=[asr]", f"evaluate.benchmarks={root}", "data.path=/nowhere")
    with pytest.raises(SodaError, match=r"only 1 recordings to draw from \(of 3, the others have no words"):
        measured(exported, *recipe, "evaluate.shots=2")
    answer_with(monkeypatch, *(Answer(["x"], None, True) for _ in range(9)))
    for seed in range(3):
        found = measured(exported, *recipe, "evaluate.shots=1", f"seed={seed}")
        assert found["asr"]["shots"] == ["9-9-0001"]


def test_examples_of_held_out_utterances_are_of_the_other_side(exported, monkeypatch):
    with pytest.raises(SodaError, match=r"valid\.json: no such file"):
        measured(exported, "suite=[asr]", "evaluate.shots=1")
    data = exported.run / "data"
    for path in data.glob("test.*"):
        shutil.copy(path, path.with_name(f"valid{path.suffix}"))
    rows = [{**exported.rows[i], "id": f"v{i}"} for i in range(2)]
    write_units(data / "valid.parquet", rows, codec=read_description(data))
    answer_with(monkeypatch, *(Answer(["x"], None, True) for _ in range(6)))
    found = measured(exported, "suite=[asr]", "evaluate.shots=1")["asr"]
    assert found["shots"][0] in ("v0", "v1")


# ---- synthesis


def test_synthesis_by_hand(exported, monkeypatch):
    """One ends and is heard right, one is cut off, two are heard wrong, one is empty; and the voice of one is too long
    for the context."""
    longest = {**exported.rows[5], "speaker": "t"}
    rows = [
        *exported.rows[:5],
        longest,
        {**longest, "id": "u6", "prompt": "p6", "text": "other words", "codes": frames(10)},
    ]
    data = exported.run / "data"
    write_units(data / "test.parquet", rows, codec=read_description(data))
    said = [row["text"] for row in rows]
    heard = {20: said[0], 21: said[1], 22: "what", 23: said[5], **{len(row["codes"]): row["text"] for row in rows}}
    monkeypatch.setattr(Listener, "hear", staticmethod(lambda wave: heard[len(wave) // HOP]))
    lengths = (20, 21, 22, 0, 20, 23)
    asked = answer_with(monkeypatch, *(Answer([], frames(length), length != 21) for length in lengths))
    found = measured(exported, "suite=[tts]")["tts"]
    assert [material.text for material in asked] == [text.strip() for text in said[:6]]
    wrong = [0, 1, word_rate(said[2], "what"), 1, word_rate(said[4], said[0]), 0, 1]
    assert next(iter(found["figures"])) == "ended by itself"
    row = model(found)
    assert row["ended by itself"] == pytest.approx(4 / 7)
    assert [row[name] for name in ("cut off", "empty", "longer than the context")] == [1, 1, 1]
    assert row["WER utterance, authors"] == pytest.approx(np.mean(wrong))
    assert found["figures"]["WER utterance, authors"]["codec"] == 0
    assert row["quality, taste"] == pytest.approx(np.mean([1.6, 1.68, 1.76, 1, 1.6, 1.84, 1]))
    items = json.loads((exported.run / "evaluate/tts/items.json").read_text())
    assert [item["state"] for item in items] == [
        *("ended by itself", "cut off", "ended by itself", "empty", "ended by itself", "ended by itself"),
        "longer than the context",
    ]


def word_rate(said: str, heard: str) -> float:
    from megatron_soda.evaluation.words import authors_synthesis, word_errors

    words = authors_synthesis(said, "en")
    return word_errors(words, authors_synthesis(heard, "en")) / len(words)


def test_voices_are_others_of_the_speaker(exported, monkeypatch):
    rows = [{**row, "speaker": "ab"[i % 2]} for i, row in enumerate(exported.rows[:5])]
    data = exported.run / "data"
    write_units(data / "test.parquet", rows, codec=read_description(data))
    asked = answer_with(monkeypatch, *(Answer([], frames(9), True) for _ in rows))
    measured(exported, "suite=[tts]")
    voices = [material.voice[0] for material in asked]  # the longest other one: 3 s are more than any has
    assert voices == [rows[i]["text"].strip() for i in (4, 3, 4, 1, 2)]


def seed_tts(root: Path, lines: int = 3, truth: bool = False) -> Path:
    folder = root / "tts" / "en"
    (folder / "wavs").mkdir(parents=True)
    found = []
    for i in range(lines):
        soundfile.write(folder / f"wavs/p{i}.wav", np.full(5 * HOP, 0.1 * (i + 1)), RATE)
        soundfile.write(folder / f"wavs/t{i}.wav", np.full(6 * HOP, 0.1 * (i + 1)), RATE)
        found.append(f"n{i}|stay {i}|wavs/p{i}.wav|press {i}" + (f"|wavs/t{i}.wav" if truth else ""))
    (folder / "meta.lst").write_text("\n".join(found))
    return folder


@pytest.mark.parametrize("truth", [False, True])
def test_seed_tts_eval(exported, tmp_path, monkeypatch, truth):
    """Without a recording of the text, the columns beside are of the prompts and of what they say."""
    root = tmp_path / "benchmarks"
    seed_tts(root, truth=truth)
    monkeypatch.setattr(Listener, "hear", staticmethod(lambda wave: "press 1" if len(wave) // HOP == 6 else "stay 1"))
    monkeypatch.setattr(Voice, "angle", staticmethod(lambda wave: 1.0 if len(wave) // HOP == 7 else 0.0))
    asked = answer_with(monkeypatch, *(Answer([], frames(count), True) for count in (6, 6, 7)))
    found = measured(exported, "suite=[tts]", f"evaluate.benchmarks={root}", "data.path=/nowhere")["tts"]
    assert [material.voice[0] for material in asked] == ["stay 0", "stay 1", "stay 2"]
    row = found["figures"]["WER corpus, authors"]
    assert row["original"] == row["codec"] == pytest.approx(2 / 6)
    assert row["model"] == pytest.approx((1 + 0 + 2) / 6)
    similar = found["figures"]["similarity, voice"]
    assert similar["model"] == pytest.approx((2 + np.cos(1.0)) / 3)
    assert similar["original"] == pytest.approx(1.0)


# ---- continuation


def test_continuation_by_hand(exported, monkeypatch):
    """Five utterances of 5 to 9 frames, and one of 60, of which 37 are heard: 148 tokens, so 2 frames can follow."""
    given = [2, 3, 3, 4, 4, 30]
    more = [25, 25, 0, 25, 25, 1]
    answer_with(
        monkeypatch, *(Answer([], frames(a + b), i != 1) for i, (a, b) in enumerate(zip(given, more, strict=True)))
    )
    monkeypatch.setattr(Listener, "hear", staticmethod(lambda wave: "a b c d"))
    found = measured(exported, "suite=[continuation]")["continuation"]
    row = model(found)
    state = [item["state"] for item in json.loads((exported.run / "evaluate/continuation/items.json").read_text())]
    assert state == [*("ended by itself", "cut off", "empty", "ended by itself", "ended by itself"), state[5]]
    assert row["empty"] == 1
    assert row["words a second"] == pytest.approx(5 * 4 / (0.08 * (4 * 25 + 1)), rel=0.2)
    assert found["figures"]["quality, taste"]["codec"] == pytest.approx(
        np.mean([(len(r["codes"]) - g) * 0.08 for r, g in zip(exported.rows, given, strict=True)])
    )


# ---- all of them


def test_an_interruption_changes_nothing_and_neither_do_batches(exported, monkeypatch):
    """With the model itself."""
    whole = evaluate(exported.recipe(JUDGES, SPOKEN), exported.folder)
    other = exported.run.parent / "other"
    real, calls = answers.answer, []

    def once(*arguments: Any) -> list[Answer]:
        calls.append(len(arguments[2]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(answers, "BATCH", 2)
    monkeypatch.setattr(answers, "answer", once)
    recipe = exported.recipe(JUDGES, SPOKEN, f"run={other}", f"data.path={exported.run}/data")
    with pytest.raises(KeyboardInterrupt):
        evaluate(recipe, exported.folder)
    resumed = evaluate(recipe, exported.folder)
    batches = 0
    for name in ("asr", "tts", "continuation"):
        lines = (other / f"evaluate/{name}-answers.jsonl").read_text().splitlines()[1:]
        batches += len({json.loads(line)[0] for line in lines})
    assert len(calls) == batches + 1  # each once, and the one that was interrupted
    assert all(resumed[name] == whole[name] for name in ("asr", "tts", "continuation"))


def test_results_of_two_models_are_compared(exported, monkeypatch, tmp_path):
    from megatron_soda.evaluation.compare import compare

    paths = []
    for right in (5, 3):
        answer_with(
            monkeypatch,
            *(Answer([row["text"] if i < right else "x"], None, True) for i, row in enumerate(exported.rows[:5])),
        )
        (exported.run / "evaluate" / "asr-answers.jsonl").unlink(missing_ok=True)
        measured(exported, "suite=[asr]")
        paths.append(tmp_path / f"{right}.json")
        paths[-1].write_text((exported.run / "eval.json").read_text())
    found, refused = compare(*paths)
    assert not refused
    (row,) = [one for one in found if one.figure == "WER utterance, authors"]
    assert (row.items, row.first) == (6, pytest.approx(1 / 6))
    assert row.second > row.first


# ---- what is refused


def broken(root: Path, what: str) -> None:
    folder = root / "asr"
    if what == "gone":
        (folder / "1/2/1-2-0001.flac").unlink()
    if what == "silent":
        soundfile.write(folder / "1/2/1-2-0009.flac", np.zeros(10), RATE)
    if what == "both":
        (folder / "list.json").write_text("[]")
    if what == "twice":
        with (folder / "1/2/1-2.trans.txt").open("a") as file:
            file.write("1-2-0000 AGAIN\n")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("gone", r"incomplete: 1 recordings are missing: .*1-2-0001\.flac"),
        ("silent", r"1 recordings have no transcript: .*1-2-0009\.flac"),
        ("both", r"needs either LibriSpeech's folders .* it has 2 and 1 of them"),
        ("twice", "several recordings are named 1-2-0000"),
    ],
)
def test_incomplete_folders_for_recognition(exported, tmp_path, what, message):
    root = tmp_path / "benchmarks"
    librispeech(root / "asr", NAMES)
    broken(root, what)
    with pytest.raises(SodaError, match=message):
        measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}")
    assert not (exported.run / "eval.json").exists()


def test_the_authors_list(exported, tmp_path, monkeypatch):
    root = tmp_path / "benchmarks"
    librispeech(root / "asr", NAMES)
    for path in root.rglob("*.trans.txt"):
        path.unlink()
    rows = [
        {"file_path": str(p.relative_to(root / "asr")), "transcript": "stay on"} for p in sorted(root.rglob("*.flac"))
    ]
    path = root / "asr" / "test.json"
    path.write_text(json.dumps(rows))
    answer_with(monkeypatch, *(Answer(["stay on"], None, True) for _ in rows))
    found = measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}")["asr"]
    assert model(found)["WER corpus, authors"] == 0
    path.write_text(json.dumps([*rows, {"file_path": "x.flac"}]))
    with pytest.raises(SodaError, match="item 3: needs file_path and transcript"):
        measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}")
    path.write_text(json.dumps([*rows, {"file_path": "x.flac", "transcript": "gone"}]))
    with pytest.raises(SodaError, match=r"incomplete: 1 recordings are missing: .*x\.flac"):
        measured(exported, "suite=[asr]", f"evaluate.benchmarks={root}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("n9|said|wavs/p0.wav", "line 4: needs NAME"),
        ("n9|said|wavs/gone.wav|text", r"incomplete: 1 recordings are missing: .*gone\.wav"),
        ("n1|said|wavs/p0.wav|text", "several lines have one name"),
    ],
)
def test_incomplete_folders_for_synthesis(exported, tmp_path, line, message):
    folder = seed_tts(tmp_path / "benchmarks")
    with (folder / "meta.lst").open("a") as file:
        file.write(f"\n{line}\n")
    with pytest.raises(SodaError, match=message):
        measured(exported, "suite=[tts]", f"evaluate.benchmarks={tmp_path}/benchmarks")


def test_two_languages_for_synthesis(exported, tmp_path):
    folder = seed_tts(tmp_path / "benchmarks")
    (folder.parent / "zh").mkdir()
    (folder.parent / "zh" / "meta.lst").write_text("")
    with pytest.raises(SodaError, match=r"holds several: .* Link the folder of one of them"):
        measured(exported, "suite=[tts]", f"evaluate.benchmarks={tmp_path}/benchmarks")
