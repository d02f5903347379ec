from pathlib import Path

import numpy as np
import pytest
import soundfile

from data_prep import numbers
from data_prep.utterance import Utterance
from megatron_soda.audio.sound import Sound
from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError

RATE, FRAME = numbers.RATE, numbers.FRAME


@pytest.fixture
def prompts(tmp_path: Path) -> list[Utterance]:
    """A tone for each number, of its own pitch and length, between stretches of silence; in two languages."""
    found = []
    for language, voice in (("en", "Ann"), ("es", "Ana")):
        for i, number in enumerate(numbers.NUMBERS):
            seconds = 0.2 + 0.01 * i
            tone = 0.5 * np.sin(2 * np.pi * (200 + 50 * i) * np.arange(round(RATE * seconds)) / RATE)
            path = tmp_path / f"{language}-{number}.wav"
            soundfile.write(path, np.concatenate([np.zeros(1000), tone, np.zeros(3000)]), RATE)
            id = f"digits/{number}"
            found.append(Utterance(f"{language}/{id}", Sound(str(path)), f"{language}{number}", voice, language, id))
    return found


def words_of(samples: np.ndarray) -> list[str]:
    """The numbers heard in a string: the pitch of every stretch that is not silent."""
    loud = np.abs(samples).reshape(-1, FRAME).max(axis=1) > 1e-3
    edges = np.flatnonzero(np.diff(np.concatenate([[0], loud.astype(int), [0]])))
    heard = []
    for begin, end in edges.reshape(-1, 2):
        word = samples[begin * FRAME : end * FRAME]
        pitch = np.abs(np.fft.rfft(word, RATE)).argmax()
        heard.append(numbers.NUMBERS[round((pitch - 200) / 50)])
    return heard


def test_strings_say_what_their_texts_say(prompts: list[Utterance], tmp_path: Path) -> None:
    found = list(numbers.strings(tmp_path / "numbers", prompts, 20))
    assert [u.id for u in found[:2]] == ["en/numbers/000000", "en/numbers/000001"]
    assert len(found) == 40
    assert {(u.language, u.speaker) for u in found} == {("en", "Ann"), ("es", "Ana")}
    assert {len(u.text.split()) for u in found} == {2, 3, 4}
    loudest = []
    for one in found:
        samples, rate = soundfile.read(one.audio.path, dtype="float32")
        assert rate == RATE
        assert len(samples) % FRAME == 0
        heard = words_of(samples)
        assert one.text == " ".join(one.language + number for number in heard)
        assert one.prompt == f"numbers/{' '.join(heard)}"
        loudest.append(np.abs(samples).max())
    assert max(loudest) > 1.5 * min(loudest)


def test_a_string_is_the_same_however_many_there_are(prompts: list[Utterance], tmp_path: Path) -> None:
    few = list(numbers.strings(tmp_path / "few", prompts[: len(numbers.NUMBERS)], 3))
    many = list(numbers.strings(tmp_path / "many", prompts, 5))
    assert [u.text for u in few] == [u.text for u in many[:3]]
    same = [soundfile.read(one.audio.path)[0] for one in (few[2], many[2])]
    np.testing.assert_array_equal(*same)
    # What is there already is not written again.
    written = [Path(one.audio.path) for one in many]
    times = [path.stat().st_mtime_ns for path in written]
    written[1].unlink()
    list(numbers.strings(tmp_path / "many", prompts, 6))
    assert [path.stat().st_mtime_ns == time for path, time in zip(written, times, strict=True)].count(False) == 1


def test_numbers_need_the_free_prompts() -> None:
    with pytest.raises(SodaError, match="need prepare"):
        load_recipe(None, ["prepare.numbers=10", "prepare.speech=/corpus"])
    with pytest.raises(SodaError, match="translations"):
        load_recipe(None, ["prepare.numbers=10", "prepare.orders=[translation]"])
