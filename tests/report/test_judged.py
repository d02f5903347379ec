"""What the page says of a run: doubtful sounds are marked, the axis fits, nothing internal, and what to do next."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from megatron_soda.audio.judge import best_and_median, judge, level_of, silence
from megatron_soda.report import plots
from megatron_soda.report.advice import prospects
from megatron_soda.report.plots import Line
from megatron_soda.report.training import cut_start
from tests.report.conftest import voice
from tests.report.test_report import build

RATE = 24_000


def verdict(wave: np.ndarray, **changes):
    return judge(wave, RATE, **{"level": -20.0, "expected": 2.0, "ended": True, "nats": 5.0, **changes})


def test_what_is_hardly_speech_is_named():
    assert verdict(voice(2.0)).problems == []
    whisper = verdict(0.003 * np.ones(round(0.32 * RATE), np.float32))
    assert [problem.split(":")[0] for problem in whisper.problems] == ["too short", "too quiet"]
    assert whisper.level == pytest.approx(-50.5, abs=0.1)
    assert verdict(voice(9.0)).problems[0].startswith("too long")
    assert verdict(voice(9.0), expected=None).problems == []
    gap = np.concatenate([voice(0.5), np.zeros(RATE * 2)])
    assert verdict(gap).problems == ["80% silence"]
    assert verdict(voice(2.0), ended=False).problems == ["cut off at the length limit"]
    assert len(verdict(np.zeros(0, np.float32)).problems) == 3
    assert level_of(np.ones(10)) == 0
    assert silence(np.zeros(RATE), RATE) == 1


def test_the_best_has_the_fewest_faults_and_then_the_highest_likelihood():
    short = voice(0.2)
    some = [verdict(voice(2.0), nats=5.0), verdict(short, nats=1.0), verdict(voice(2.0), nats=4.0)]
    assert best_and_median(some) == (2, 0)


def test_a_doubtful_sample_is_marked(fake_run: Path):
    samples = json.loads((fake_run / "samples/samples.json").read_text())
    speak = next(sample for sample in samples if sample["task"] == "speak")
    soundfile.write(fake_run / "samples" / speak["audio"]["model"], 0.003 * np.ones(round(0.32 * RATE)), RATE)
    transcribe = next(sample for sample in samples if sample["task"] == "transcribe")
    transcribe |= {"candidates": 5, "good": 4, "median_text": "einst nord"}
    (fake_run / "samples/samples.json").write_text(json.dumps(samples))
    page = build(fake_run)
    for shown in ("too short: 0.32 s", "too quiet: -50 dB", "5 drawn, 4 of them plausible", "einst nord"):
        assert shown in page.text
    assert page.text.count("too short") == 1
    speak["verdicts"] = {"model": {"problems": ["as it was judged"]}}
    (fake_run / "samples/samples.json").write_text(json.dumps(samples))
    text = build(fake_run).text
    assert "as it was judged" in text
    assert "too short" not in text


def test_long_sounds_are_cut_before_they_are_decoded(tmp_path: Path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", np.zeros(600 * 4000, np.float32), 4000)
    soundfile.write(tmp_path / "short.wav", np.zeros(4000, np.float32), 4000)
    soundfile.write(tmp_path / "wide.wav", np.zeros((30 * 4000, 100), np.float32), 4000)
    clip = plots.read_clip(tmp_path / "long.wav")
    assert (clip.seconds, clip.whole) == (plots.MOST_SECONDS, 600)
    assert plots.read_clip(tmp_path / "short.wav").whole == 0
    assert plots.read_clip(tmp_path / "wide.wav").seconds == plots.MOST_SAMPLES / 100 / 4000


def test_a_cut_sample_says_so(fake_run: Path, monkeypatch):
    monkeypatch.setattr(plots, "MOST_SECONDS", 2)
    assert "cut to the first 2.0 s of 4.2 s" in build(fake_run).text


def line(values: list[float]) -> list[Line]:
    return [Line("training", list(range(1, len(values) + 1)), values, "--accent")]


def test_only_the_start_is_cut_off_the_axis():
    falling = [20.3, 9.0, *np.linspace(7, 6, 98)]
    top, said = cut_start(line(falling))
    assert 7 < (top or 0) < 7.3
    assert said == "The start is cut off: 20.3 at step 1 is above the axis."
    assert cut_start(line(list(np.linspace(7, 6, 100)))) == (None, "")
    spiked = [*falling[:50], 30.0, *falling[50:]]
    assert cut_start(line(spiked)) == (None, "")
    assert cut_start(line([3.0])) == cut_start([]) == (None, "")


def test_the_page_says_that_the_axis_is_cut(quick_run: Path):
    points = [{"step": step, "loss": 20.3 if step == 1 else 7 - step / 100} for step in range(1, 101)]
    (quick_run / "metrics.jsonl").write_text("\n".join(map(json.dumps, points)))
    assert "The start is cut off: 20.3 at step 1" in build(quick_run).text


def test_nothing_internal_is_shown(quick_run: Path):
    prepared = json.loads((quick_run / "data/prepare.json").read_text())
    prepared |= {"key": "46c81e8f", "tokenizer": {"size": 512, "fingerprint": "10c857983597"}}
    prepared["reject_reasons"] = {"no transcript": 7}
    (quick_run / "data/prepare.json").write_text(json.dumps(prepared))
    evaluation = json.loads((quick_run / "eval.json").read_text())
    (quick_run / "eval.json").write_text(json.dumps({**evaluation, "step": 900, "weights_sha256": "77aa"}))
    text = build(quick_run).text
    for hidden in ("46c81e8f", "10c857983597", "9f2c41d7a0b3", "77aa", "About this evaluation", "fingerprint"):
        assert hidden not in text
    assert "the model of step 900" in text
    assert "no transcript 7" in text


def test_it_says_how_good_the_model_is_and_what_to_do(fake_run: Path):
    text = build(fake_run).text
    assert "a token surprises it" in text
    assert "37 of 100 generated documents ended on their own" in text
    assert "From step 1,000 to 2,000 the validation loss fell by" in text
    assert "soda train RUN/recipe.yaml run=RUN-longer data.path=RUN/data training.steps=4000" in text
    assert "soda generate RUN tasks=[speak]" in text


def test_prospects_follow_the_curves():
    def of(losses: list[float], trained: float, tokens: int) -> str:
        valid = [{"step": 100 * (i + 1), "valid_loss": loss} for i, loss in enumerate(losses)]
        train = [{"step": 100 * len(losses), "loss": trained, "tokens": tokens}]
        return " ".join(prospects(train, valid, {"tokens": {"train": 1000}}))

    falling = of([7.0, 6.5, 6.2, 6.0], 6.0, 900)
    assert "fell by 0.50 nats" in falling
    assert "try more steps first" in falling
    assert "almost nothing" in of([6.0, 6.0, 6.0, 6.0], 5.9, 9000)
    assert "more data would gain more than more steps" in of([6.0, 5.5, 5.4, 5.5], 4.0, 9000)
    assert prospects([], [], {}) == []
