"""Judges of sounds: by name, in batches, each sound once, and what is said of one that is not there."""

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError
from megatron_soda.evaluation import panel
from megatron_soda.evaluation.panel import Panel, place_for_kept
from megatron_soda.registry import JUDGES
from tests.evaluation.judges import Listener, fake_judges

RATE = 8000


@pytest.fixture(autouse=True)
def judges():
    with fake_judges():
        yield


def sounds(*seconds: float):
    waves = [np.full(round(one * RATE), 0.1 + one / 100, np.float32) for one in seconds]
    return [lambda wave=wave: wave for wave in waves]


def test_verdicts_come_in_order_and_each_sound_is_judged_once(tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "BATCH", 2)
    monkeypatch.setattr(Listener, "hear", staticmethod(lambda wave: f"{len(wave) / RATE:g}"))
    some = sounds(1, 2, 1, 0, 3)
    languages = ["en"] * 5
    jury = Panel(["listener", "taste"], tmp_path)
    found = jury.judged(some, RATE, languages, "x")
    assert found == {"listener": ["1", "2", "1", None, "3"], "taste": [1.0, 2.0, 1.0, None, 3.0]}
    assert Listener.calls == [2, 1]  # 1 s and 2 s; then 1 s again and nothing; then 3 s
    again = Panel(["listener"], tmp_path).judged([*some, *sounds(4)], RATE, [*languages, "en"], "x")
    assert again == {"listener": ["1", "2", "1", None, "3", "4"]}
    assert Listener.calls == [2, 1, 1]
    Panel(["listener"], tmp_path).judged(some[:1], RATE, ["es"], "x")  # the language decides what is heard
    assert Listener.calls == [2, 1, 1, 1]
    assert jury.judged(some, RATE, languages, "x", ["voice"]) == {}


def test_sounds_are_judged_at_the_rate_of_the_judge(tmp_path):
    (seconds,) = Panel(["taste"], tmp_path).judged(sounds(2), 2 * RATE, [""], "x")["taste"]
    assert seconds == pytest.approx(1.0, abs=1e-3)


def test_another_judge_judges_again(tmp_path, monkeypatch):
    """The weights in the folder are others."""
    folder = tmp_path / "model"
    folder.mkdir()
    for weights, calls in (("one", 1), ("one", 1), ("two", 2)):
        (folder / "weights").write_text(weights)
        Panel([f"listener:{folder}"], tmp_path / "kept").judged(sounds(1), RATE, [""], "x")
        assert len(Listener.calls) == calls
    assert json.loads(next((tmp_path / "kept").iterdir()).read_text().splitlines()[0])["model"] == "model"


def test_names(monkeypatch):
    assert JUDGES.names() == ("dnsmos", "listener", "resemblyzer", "taste", "voice", "wavlm", "whisper")
    assert load_recipe(None, ["evaluate.judges=[whisper:/a:b,dnsmos]"]).evaluate.judges == ["whisper:/a:b", "dnsmos"]
    with pytest.raises(SodaError, match=r"evaluate\.judges=wisper: must be one of .* Did you mean whisper\?"):
        load_recipe(None, ["evaluate.judges=[wisper:x]"])
    with pytest.raises(SodaError, match="has a judge twice"):
        load_recipe(None, ["evaluate.judges=[whisper:a,whisper:b]"])


def test_a_judge_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(type(JUDGES["resemblyzer"]), "module", "no_such_module")
    with pytest.raises(
        SodaError, match=r"resemblyzer needs Resemblyzer, .*pip install 'megatron-soda\[judges\]'.*no-deps"
    ):
        Panel(["resemblyzer"], tmp_path)


def test_wavlm_needs_a_folder(tmp_path):
    with pytest.raises(SodaError, match=r"wavlm: no folder: name the folder of a WavLMForXVector"):
        Panel(["wavlm"], tmp_path)


def test_the_place_for_what_is_kept(tmp_path):
    assert place_for_kept("", "run") == Path("run/evaluate")
    assert place_for_kept(str(tmp_path), "run") == tmp_path
    assert place_for_kept(str(tmp_path / "gone"), "run") == Path("run/evaluate")
