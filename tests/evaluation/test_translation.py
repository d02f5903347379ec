"""Spoken translation: a model that says the translation, one that says nothing, figures counted by hand; and the count
of the numbers that are heard (examples/s2st/hear_numbers.py)."""

import itertools
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile

from megatron_soda.codecs.description import read_description
from megatron_soda.data.units import write_units
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import answers
from megatron_soda.evaluation.run import evaluate
from megatron_soda.evaluation.speech_files import Recording
from megatron_soda.evaluation.suites.translation import _other
from megatron_soda.hf.load import load_model
from megatron_soda.inference import own
from megatron_soda.inference.own import Answer
from megatron_soda.inference.task import Prompt
from megatron_soda.inference.tasks import transcribe
from megatron_soda.report import build_report
from tests.evaluation.judges import Listener, fake_judges
from tests.exported import CONTEXT, HOP, RATE, FakeCodec

WORDS = {"es": "cero uno dos tres cuatro".split(), "en": "zero one two three four".split()}
STRINGS = ([0, 1], [2, 3, 4], [4], [1, 1])  # the first and the third from English to Spanish
TOOL = Path(__file__).resolve().parents[2] / "examples" / "s2st" / "hear_numbers.py"
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def judges(monkeypatch):
    monkeypatch.setattr(transcribe, "MOST_TOKENS", 12)
    monkeypatch.setattr(Listener, "hear", staticmethod(heard))
    with fake_judges():
        yield


@pytest.fixture
def tool():
    return runpy.run_path(str(TOOL))


def codes_of(numbers: list[int], language: str) -> np.ndarray:
    """A frame a word. The first code is 0 to 4 in Spanish, 5 to 9 in English."""
    return np.add.outer(np.array(numbers) + 5 * (language == "en"), np.arange(4)) % 16


def sound_of(codes: np.ndarray, loudness: int) -> np.ndarray:
    """What the fake codec encodes to these codes, by its level, and the listener hears as what they decode to."""
    tones = np.sin(2 * np.pi * np.outer(200 + 20 * codes[:, 0], np.arange(HOP)) / RATE)
    levels = (codes[:, :1] + 16 * loudness + 0.5) / 1000
    return (tones * levels / np.abs(tones).mean(1, keepdims=True)).reshape(-1)


def heard(wave: np.ndarray) -> str:
    """A word a frame, by its pitch."""
    pitches = np.abs(np.fft.rfft(wave.reshape(-1, HOP))).argmax(1) * RATE / HOP
    every = [*WORDS["es"], *WORDS["en"], *"abcdef"]
    return " ".join(every[round((pitch - 200) / 20)] for pitch in pitches)


def write_pairs(exported, *, other: bool = False, long: bool = False) -> list[Row]:
    """A speaker's pairs, and their recordings. other: another speaker's recording, too. long: the last source leaves no
    room in the context."""
    rows = []
    for i, numbers in enumerate(STRINGS):
        for language in ("es", "en") if i % 2 else ("en", "es"):
            text = " ".join(WORDS[language][number] for number in numbers)
            names = {"id": f"{i}-{language}", "recording": f"r{i}", "prompt": " ".join(map(str, numbers))}
            rows.append({**names, "text": text, "language": language, "codes": codes_of(numbers, language)})
    if long:
        rows[-2]["codes"] = np.zeros((CONTEXT, 4), int)
    rows = [{**row, "speaker": "ann", "loudness": 3} for row in rows]
    if other:
        unpaired = {"recording": "", "prompt": "", "text": "", "language": "en", "speaker": "bob", "loudness": 12}
        rows.append({"id": "x", "codes": codes_of([0, 0], "en"), **unpaired})
    for row in rows:
        row |= {"seconds": len(row["codes"]) * HOP / RATE, "audio": str(exported.run / f"{row['id']}.wav")}
        soundfile.write(row["audio"], sound_of(row["codes"], row.pop("loudness")), RATE, subtype="FLOAT")
    data = exported.run / "data"
    write_units(data / "test.parquet", rows, codec=read_description(data))
    return rows


def measured(exported, judges: str = "listener,voice") -> Row:
    recipe = exported.recipe("suite=[translation]", f"evaluate.judges=[{judges}]")
    return evaluate(recipe, exported.folder)["translation"]


def column(found: Row, system: str = "model") -> Row:
    return {name: row.get(system) for name, row in found["figures"].items()}


def read_items(exported) -> list[Row]:
    return json.loads((exported.run / "evaluate/translation/items.json").read_text())


# ---- the suite


class Translator:
    """In place of `sample`: knows the text and the translation of every source, writes both, and says it or not."""

    def __init__(self, exported, rows: list[Row], speaks: bool) -> None:
        self.space, self.text, self.speaks = exported.space, load_model(exported.folder).text, speaks
        self.pairs = {tuple(a["codes"][:, 0]): (a, b) for a, b in zip(rows[::2], rows[1::2], strict=True)}

    def __call__(self, decoder: Any, constraint: Any, prompts: Any, **how: Any) -> list[Any]:
        return [SimpleNamespace(ids=[*p.ids, *self.after(p.ids)], ended_by_itself=True) for p in prompts]

    def after(self, ids: list[int]) -> list[int]:
        space = self.space
        source, target = self.pairs[tuple(space.codes(np.array(ids[2 : ids.index(space.audio_end)]))[:, 0])]
        if ids[-1] == space.audio_start:
            return [*(space.audio_ids(target["codes"]).tolist() if self.speaks else []), space.audio_end]
        told = self.text.decode([token for token in ids[1:] if token < space.text_size])
        first = f"<language>{source['language']}</language>{source['text']}"
        if not told:  # not even the source's language
            return [*self.text.encode(first), space.text_end]
        assert told == f"{first} <language>{target['language']}</language>"
        return [*self.text.encode(target["text"]), space.text_end]


@pytest.mark.parametrize("speaks", [True, False])
def test_a_model_that_says_the_translation_and_one_that_says_nothing(exported, monkeypatch, capsys, tool, speaks):
    rows = write_pairs(exported)
    monkeypatch.setattr(own, "sample", Translator(exported, rows, speaks))
    found = measured(exported)
    model, original, codec = (column(found, system) for system in ("model", "original", "codec"))
    assert next(iter(model)) == "ended by itself"
    assert (model["ended by itself"], model["empty"]) == ((1, 0) if speaks else (0, 4))
    rates = [name for name in model if "WER" in name]
    assert len(rates) == 8
    for name in rates:
        assert model[name] == (0 if speaks else 1)
        assert original[name] == codec[name] == (None if name.startswith("own text") else 0)
    assert not any("another" in name for name in model)  # there is one speaker
    for item, source, target in zip(read_items(exported), rows[::2], rows[1::2], strict=True):
        assert item["source"] == item["written_source"] == source["text"]
        assert item["reference"] == item["written"] == item["original"] == item["codec"] == target["text"]
        assert item["model"] == (target["text"] if speaks else "")
    capsys.readouterr()
    tool["main"](exported.run)
    *lines, last = capsys.readouterr().out.splitlines()
    counted = json.loads(last)
    assert [line.split()[:2] for line in lines[1:]] == [[a, b] for a in counted for b in ("original", "codec", "model")]
    assert counted["es"]["original"] == {"heard": 3, "of": 3, "share": 1, "low": 1, "high": 1}
    assert counted["all"]["model"] == {"heard": 8 * speaks, "of": 8, **dict.fromkeys(("share", "low", "high"), speaks)}


def test_figures_by_hand(exported, monkeypatch):
    """One says its own text, which is wrong; one is right, but cut off; one says something else than it wrote; one
    source is too long."""
    rows = write_pairs(exported, other=True, long=True)
    spoken = [codes_of([0, 3], "es"), codes_of([2, 3, 4], "en"), codes_of([1], "es")]
    given = [
        Answer(["<language>en</language>zero one", "cero tres"], spoken[0], True),
        Answer(["<language>es</language>dos", "two three four"], spoken[1], False),
        Answer(["<language>en</language>four", "cuatro"], spoken[2], True),
    ]
    monkeypatch.setattr(answers, "answer", lambda *_: given)
    found = measured(exported)
    row = column(found)
    assert [row[n] for n in ("ended by itself", "cut off", "empty", "longer than the context")] == [0.5, 1, 0, 1]
    assert found["longer_than_the_context"] == ["3-es"]
    for name in ("authors", "whisper"):
        assert row[f"WER corpus, {name}"] == pytest.approx((1 + 3 + 1 + 2) / 8)
        assert row[f"WER utterance, {name}"] == pytest.approx((0.5 + 1 + 1 + 1) / 4)
        assert row[f"own text: WER corpus, {name}"] == pytest.approx((0 + 3 + 1 + 2) / 8)
        assert row[f"own text: WER utterance, {name}"] == pytest.approx((0 + 1 + 1 + 1) / 4)
    peaks = [np.abs(wave).max() for wave in FakeCodec().decode(spoken)]
    recorded = {one["id"]: np.abs(soundfile.read(one["audio"])[0]).max() for one in rows}
    to_source = [np.cos(a - recorded[name]) for a, name in zip(peaks, ("0-en", "1-es", "2-en"), strict=True)]
    assert row["similarity, voice"] == pytest.approx(sum(to_source) / 4, abs=1e-5)
    to_other = [np.cos(a - recorded["x"]) for a in peaks]
    assert row["similarity to another speaker, voice"] == pytest.approx(sum(to_other) / 4, abs=1e-5)
    items = read_items(exported)
    assert [item["state"] for item in items] == [
        *("ended by itself", "cut off", "ended by itself", "longer than the context")
    ]
    assert [item["written_source"] for item in items] == ["zero one", "dos", "four", ""]
    shown = [item["audio"] for some in found["shown"].values() for item in some]
    assert all({"source", "original", "codec"} <= set(audio) for audio in shown)
    page = build_report(exported.run).read_text()
    assert "Spoken translation" in page
    assert page.count("<audio controls") == sum(map(len, shown))


def test_without_an_own_text_nothing_is_said_that_was_written(exported, monkeypatch):
    write_pairs(exported)
    languages = ("es", "en") * 2
    given = [Answer(["zero", "."], codes_of(*one), True) for one in zip(STRINGS, languages, strict=True)]
    monkeypatch.setattr(answers, "answer", lambda *_: given)
    row = column(measured(exported))
    assert (row["WER corpus, authors"], row["own text: WER corpus, authors"]) == (0, 1)


def test_a_model_of_random_weights(exported, monkeypatch, tool):
    """All steps of the task with the model itself; and what was answered is kept."""
    write_pairs(exported, other=True)
    found = measured(exported)
    items = read_items(exported)
    assert all(item["written_source"] and item["model"] != item["reference"] for item in items)
    assert column(found)["WER corpus, authors"] > 0.5
    monkeypatch.setattr(answers, "answer", None)
    assert measured(exported) == found
    measured(exported, judges="")
    with pytest.raises(SodaError, match="nothing was heard; evaluate with a recogniser"):
        tool["main"](exported.run)


def test_answers_are_kept_by_their_language():
    asked = [answers._digest([(Prompt([1], set(), 3), language)], 0) for language in ("en", "es", "en")]
    assert asked[0] == asked[2] != asked[1]


def test_another_speaker_is_neither_sides_if_possible():
    def recording(name: str, speaker: str, language: str = "en", frames: int = 9) -> Recording:
        return Recording(name, "", language, np.zeros((frames, 4), np.int16), lambda: np.zeros(0), speaker)

    source, target = recording("s", "ann"), recording("t", "bob", "es")
    every = [source, target, recording("u", ""), recording("v", "bob"), recording("w", "carl", "es")]
    assert _other(source, target, every[:3]) is target
    assert _other(source, target, every[:4]) is every[3]
    assert _other(source, target, every) is every[4]
    nearer = [recording("x", "carl", frames=20), recording("z", "carl", frames=7), recording("y", "dora", frames=11)]
    assert _other(source, target, [*every, *nearer]) is nearer[2]  # as close as z, and before it by name
    assert _other(recording("s", ""), target, every) is None
    assert _other(source, source, every[:1]) is None


def test_what_cannot_be_measured_is_refused(exported):
    with pytest.raises(SodaError, match=r"the test split has no recording of two .* Leave translation out of"):
        measured(exported)


# ---- numbers


def splits(digits: str, numbers: list[str]) -> list[list[str]]:
    """All ways to read digits, by definition: cut between them, then each piece a number or tens and a digit."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(digits) - 1):
        pieces = [digits[0]]
        for cut, digit in zip(cuts, digits[1:], strict=True):
            pieces = [*pieces, digit] if cut else [*pieces[:-1], pieces[-1] + digit]
        read = []
        for piece in pieces:
            tens, ones = piece[0] + "0", piece[1:]
            whole = [piece] if piece in numbers else None
            read.append(whole or ([tens, ones] if tens in numbers and ones in "123456789" and len(ones) == 1 else None))
        if None not in read:
            found.append([number for piece in read for number in piece])
    return found


def common(a: list[str], b: list[str]) -> int:
    """Longest common subsequence, by trying all."""
    kept = [[x for x, keep in zip(b, some, strict=True) if keep] for some in itertools.product([0, 1], repeat=len(b))]
    return max(len(some) for some in kept if all(any(x == y for y in rest) for rest in [iter(a)] for x in some))


def test_digits_are_split_as_matches_best(tool):
    numbers = tool["NUMBERS"]
    assert splits("72", numbers) == [["70", "2"], ["7", "2"]]
    assert splits("10", numbers) == [["1", "0"]]  # there is no ten in Spanish
    rng = np.random.default_rng(0)
    values = []
    for _ in range(300):
        digits = "".join(rng.choice(list("0123579"), rng.integers(1, 7)))
        said = splits(digits, numbers)[0] if rng.random() < 0.5 else rng.choice(numbers, 3).tolist()
        reference = said[: rng.integers(1, 5)]
        values.append(max(common(some, reference) for some in splits(digits, numbers)))
        assert tool["in_order"](digits, reference, {}) == values[-1]
    assert {0, 1, 2, 3, 4} <= set(values)


@pytest.mark.parametrize(
    ("said", "reference", "count"),
    [
        ("Thirty-two, seven.", "30 2 7", 3),
        ("32 7", "30 2 7", 3),
        ("3 2 7", "30 2 7", 2),
        ("30, 2 and 7", "30 2 7", 3),
        ("seven 32", "30 2 7", 2),
        ("3,027", "30 2 7", 3),
        ("it is a two", "30 2 7", 1),
        ("", "30 2 7", 0),
        ("DIECISÉIS 5", "16 15", 1),
    ],
)
def test_what_is_heard_as_words_and_digits(tool, said, reference, count):
    words = {"thirty": "30", "two": "2", "seven": "7", "dieciseis": "16"}
    assert tool["in_order"](said, reference.split(), words) == count


def test_recordings_that_are_gone_and_other_texts(tmp_path, capsys, tool):
    folder = tmp_path / "evaluate" / "translation"
    folder.mkdir(parents=True)
    item = {"name": "a", "language": "en", "prompt": "numbers/7 2", "reference": "seven two", "original": None}
    items = [{**item, "codec": "72", "model": "seven"}, {**item, "codec": "seven", "model": ""}]
    (folder / "items.json").write_text(json.dumps(items))
    tool["main"](tmp_path)
    counted = json.loads(capsys.readouterr().out.splitlines()[-1])["en"]
    assert {system: (row["heard"], row["of"]) for system, row in counted.items()} == {"codec": (3, 4), "model": (1, 4)}
    (folder / "items.json").write_text(json.dumps([{**items[0], "reference": "seventy two four"}]))
    with pytest.raises(SodaError, match="a: 'seventy two four' is no string of numbers"):
        tool["main"](tmp_path)
