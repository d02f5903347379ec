"""DaliDecoder: the same samples and the same reasons as read_pieces. Skipped, but for one test, without DALI.

DALI's resampler runs on its CPU backend here, and on a GPU in tests/gpu."""

import re
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_soda.audio import dali
from megatron_soda.audio.dali import DaliDecoder, Resampler
from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio, Sound
from megatron_soda.errors import SodaError

from .test_reading import encode, encoded, talk, tone

RATE = 24000
FRAME = 1920

needs_dali = pytest.mark.skipif(
    not (find_spec("nvidia") and find_spec("nvidia.dali")), reason="nvidia-dali-cuda130 is not installed"
)


def same(sounds: list[Sound], tolerance: float = 0.0, resample_on: str = "", piece_seconds: float = 60.0) -> list[str]:
    """Compares with read_pieces; returns each reason, or the number of pieces."""
    found = DaliDecoder(RATE, FRAME, resample_on=resample_on, piece_seconds=piece_seconds).decode(sounds)
    assert len(found) == len(sounds)
    seen = []
    for sound, result in zip(sounds, found, strict=True):
        try:
            expected = list(read_pieces(sound, RATE, FRAME, piece_seconds=piece_seconds))
        except BadAudio as error:
            with pytest.raises(BadAudio, match=f"^{re.escape(str(error))}$"):
                list(result)
            seen.append(str(error))
        else:
            result = list(result)
            assert [len(piece) for piece in result] == [len(piece) for piece in expected]
            for a, b in zip(result, expected, strict=True):
                assert a.dtype == np.float32
                np.testing.assert_allclose(a, b, atol=tolerance, rtol=0)
            seen.append(str(len(result)))
    return seen


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(SodaError, match=r"pip install megatron-soda\[dali\]"):
        DaliDecoder(RATE, FRAME)


@needs_dali
@pytest.mark.parametrize("rate", [8000, 24000, 44100])
@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_16", 0),
        ("wav", "PCM_24", 0),
        ("wav", "FLOAT", 0),
        ("wav", "ULAW", 0),
        ("flac", "PCM_16", 0),
        ("ogg", "VORBIS", 1e-6),
        ("mp3", "MPEG_LAYER_III", 0),
    ],
)
def test_the_same_samples(tmp_path: Path, rate: int, suffix: str, subtype: str, tolerance: float) -> None:
    sounds = []
    for i in range(dali.BATCH + 3):
        samples = talk(0.5 + 0.3 * i, rate, seed=i)
        samples = np.stack([samples, 0.3 * samples[::-1]], axis=1) if i % 3 == 1 else samples
        soundfile.write(tmp_path / f"{i}.{suffix}", samples, rate, subtype=subtype)
        sounds.append(Sound(str(tmp_path / f"{i}.{suffix}")))
    assert same(sounds, tolerance, piece_seconds=2.0)[-1] != "1"


@needs_dali
def test_opus(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.opus", talk(3, 48000), 48000, format="OGG", subtype="OPUS")
    assert same([Sound(str(tmp_path / "a.opus"))], 1e-5) == ["1"]


@needs_dali
@pytest.mark.parametrize("resample_on", ["", "cpu"])
def test_good_and_bad_files_in_one_batch(tmp_path: Path, resample_on: str) -> None:
    def write(name: str, content: bytes) -> Sound:
        (tmp_path / name).write_bytes(content)
        return Sound(str(tmp_path / name))

    wav, flac, ogg = (encoded(talk(2, 16000), 16000, format) for format in ("WAV", "FLAC", "OGG"))
    nan = tone(RATE)
    nan[5] = np.nan
    soundfile.write(tmp_path / "nan.wav", nan, RATE if not resample_on else 16000, subtype="FLOAT")
    encode(tmp_path / "a.g722", tone(16000), 16000, "g722", "g722")
    damaged = bytearray(flac)
    damaged[len(flac) // 2 : len(flac) // 2 + 200] = bytes(200)
    sounds = [
        write("a.wav", wav),
        write("cut.wav", wav[:-5000]),
        write("b.flac", flac),
        write("cut.flac", flac[:-5000]),
        write("damaged.flac", bytes(damaged)),
        write("c.ogg", ogg),
        write("text.wav", b"no sound\n" * 100),
        write("empty.wav", b""),
        Sound(str(tmp_path / "gone.wav")),
        Sound(str(tmp_path / "nan.wav")),
        Sound(str(tmp_path / "a.g722")),
        write("silent.wav", encoded(np.zeros(RATE, np.float32), RATE, "WAV")),
        Sound(str(write("tar", b"x" * 700 + wav + b"y" * 99).path), offset=700, size=len(wav)),
        Sound(str(tmp_path / "a.wav"), start=0.5, end=1.0),
        Sound(str(tmp_path / "a.wav"), start=0.5, end=9.0),
        write("d.wav", wav),
    ]
    seen = same(sounds, 1e-6 if not resample_on else 0.01, resample_on)
    assert [seen[i] for i in (0, 2, 5, 10, 12, 13, 15)] == ["1"] * 7
    assert [seen[i] for i in (7, 8, 9)] == ["empty file", "no such file", "NaN or infinite samples"]
    assert "bad segment" in seen[14]
    assert same([]) == []


@needs_dali
def test_long_recordings_are_cut_alike(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", talk(50), RATE)
    soundfile.write(tmp_path / "b.wav", talk(150), RATE)
    assert same([Sound(str(tmp_path / "a.wav")), Sound(str(tmp_path / "b.wav"))], piece_seconds=20.0)[0] in ("3", "4")


@needs_dali
def test_a_file_that_kills_the_pipeline_harms_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in NVIDIA/DALI issue 4076: an MP3 that got past the look at the header."""
    soundfile.write(tmp_path / "b.mp3", talk(2), RATE)
    monkeypatch.setattr(dali, "FORMATS", (b"RIFF", (tmp_path / "b.mp3").read_bytes()[:4]))
    for name in ("a.wav", "c.wav"):
        soundfile.write(tmp_path / name, talk(2), RATE)
    assert same([Sound(str(tmp_path / name)) for name in ("a.wav", "b.mp3", "c.wav")]) == ["1"] * 3


@needs_dali
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_damaged_bytes_give_pieces_or_a_reason(tmp_path: Path, data: st.DataObject, format: str) -> None:
    content = bytearray(encoded(tone(RATE, 0.3), RATE, format))
    good = bytes(content)
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, 60) | st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "bad").write_bytes(content)
    (tmp_path / "good").write_bytes(good)
    bad, fine = DaliDecoder(RATE, 480).decode([Sound(str(tmp_path / "bad")), Sound(str(tmp_path / "good"))])
    assert len(np.concatenate(list(fine))) == RATE * 0.3
    with suppress(BadAudio):
        assert np.isfinite(np.concatenate(list(bad))).all()


def noise(rate: int, below: float) -> np.ndarray:
    """Four seconds without anything above that share of what `rate` and RATE can hold."""
    spectrum = np.fft.rfft(np.random.default_rng(rate).standard_normal(4 * rate))
    spectrum[int(below * min(rate, RATE) / 2 * 4) :] = 0
    return (0.1 * np.fft.irfft(spectrum, 4 * rate)).astype(np.float32)


def decibels(samples: np.ndarray, against: np.ndarray) -> float:
    return 20 * np.log10(np.linalg.norm(samples.astype(float)) / np.linalg.norm(against.astype(float)))


@needs_dali
def test_the_resampler_agrees_with_soxr() -> None:
    rates = [8000, 11025, 16000, 22050, 32000, 44100, 48000, 96000]
    waves = [noise(rate, 0.9) for rate in rates]
    for rate, wave, found in zip(rates, waves, Resampler(RATE, "cpu")(waves, rates), strict=True):
        expected = soxr.resample(wave, rate, RATE, quality="HQ")
        assert found.shape == expected.shape
        assert found.dtype == np.float32
        assert decibels(found - expected, expected) < -60, rate


@needs_dali
def test_what_the_lower_rate_cannot_hold_is_filtered_out() -> None:
    rates = [32000, 44100, 48000, 96000]
    waves = [tone(rate, hertz=14_000) * np.hanning(rate).astype(np.float32) for rate in rates]
    for rate, wave, found in zip(rates, waves, Resampler(RATE, "cpu")(waves, rates), strict=True):
        assert decibels(found, np.sqrt(RATE / rate) * wave) < -90, rate


@needs_dali
@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 192_000])
def test_as_many_samples_as_soxr_gives(rate: int) -> None:
    waves = [np.zeros(n, np.float32) for n in [*range(1, 10), rate - 1, rate, rate + 1, 10 * rate - 1]]
    expected = [len(soxr.resample(wave, rate, RATE, quality="HQ")) for wave in waves]
    assert [len(found) for found in Resampler(RATE, "cpu")(waves, [rate] * len(waves))] == expected


@needs_dali
def test_files_are_resampled_by_dali(tmp_path: Path) -> None:
    """What is at the codec's rate already is not touched, what DALI cannot decode goes through soxr."""
    for name, rate in (("a.flac", 16000), ("b.wav", RATE), ("c.ogg", 48000), ("d.mp3", 16000)):
        soundfile.write(tmp_path / name, noise(rate, 0.9), rate)
    sounds = [Sound(str(tmp_path / name)) for name in ("a.flac", "b.wav", "c.ogg", "d.mp3")]
    found = [np.concatenate(list(one)) for one in DaliDecoder(RATE, FRAME, resample_on="cpu").decode(sounds)]
    differences = []
    for sound, samples in zip(sounds, found, strict=True):
        expected = np.concatenate(list(read_pieces(sound, RATE, FRAME)))
        assert samples.shape == expected.shape
        differences.append(float(np.abs(samples - expected).max()))
    assert differences[1] == differences[3] == 0
    assert 0 < differences[0] < 1e-3
    assert 0 < differences[2] < 1e-3


@needs_dali
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_fails_is_named() -> None:
    """Up to there the real package takes the pipeline of a GPU."""
    with pytest.raises(SodaError, match=r"(?s)cannot resample on cuda:1: .*CUDA is not available.*decoder=dali"):
        Resampler(RATE, "cuda:1")([tone(16000)], [16000])
