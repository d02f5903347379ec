"""read_audio: every kind of file a user may have, and a reason for each that is no usable audio."""

import socket
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_prep.audio import BadAudio, read_audio

RATE = 24000


def tone(rate: int, seconds: float = 1.0, hertz: float = 1000.0, peak: float = 0.5) -> np.ndarray:
    return (peak * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)).astype(np.float32)


def encode(path: Path, samples: np.ndarray, rate: int, codec: str, container: str) -> None:
    """Writes mono int16 samples with ffmpeg's encoders."""
    with av.open(str(path), "w", format=container) as output:
        stream = output.add_stream(codec, rate=rate)
        stream.layout = "mono"
        pcm = (samples * 32767).astype(np.int16)
        step = 320
        for start in range(0, len(pcm) - step + 1, step):
            frame = av.AudioFrame.from_ndarray(pcm[None, start : start + step], format="s16", layout="mono")
            frame.sample_rate = rate
            frame.pts = start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def middle(samples: np.ndarray) -> np.ndarray:
    return samples[len(samples) // 4 : 3 * len(samples) // 4]


def level(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(middle(samples), dtype=np.float64))))


def frequency(samples: np.ndarray, rate: int = RATE) -> float:
    """From the phase of the analytic signal: much finer than an FFT bin."""
    phase = np.unwrap(np.angle(scipy.signal.hilbert(middle(samples))))
    inner = phase[len(phase) // 8 : -len(phase) // 8]
    return float(np.polyfit(np.arange(len(inner)), inner, 1)[0] * rate / (2 * np.pi))


def reason(path: Path, **options: float) -> str:
    with pytest.raises(BadAudio) as caught:
        read_audio(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("hertz", [200.0, 1000.0, 3000.0])
def test_resampling_keeps_the_frequency_and_level_of_a_tone(tmp_path: Path, rate: int, hertz: float) -> None:
    soundfile.write(tmp_path / "a.wav", tone(rate, hertz=hertz), rate, subtype="FLOAT")
    samples = read_audio(tmp_path / "a.wav")
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert abs(len(samples) - RATE) <= 1
    assert frequency(samples) == pytest.approx(hertz, abs=0.05)
    assert level(samples) == pytest.approx(0.5 / np.sqrt(2), rel=0.005)  # 0.04 dB


@pytest.mark.parametrize("rate", [8000, 16000, 192000])
def test_resampling_agrees_with_scipy(tmp_path: Path, rate: int) -> None:
    """Noise below 3 kHz, where both filters are flat; scipy's FIR is an independent design."""
    lowpass = scipy.signal.firwin(8 * rate // 1000 + 1, 3000, fs=rate)
    noise = np.random.default_rng(0).standard_normal(rate)
    source = 0.3 * scipy.signal.lfilter(lowpass, 1, noise) / 3
    soundfile.write(tmp_path / "a.wav", source, rate, subtype="DOUBLE")
    ours = middle(read_audio(tmp_path / "a.wav"))
    theirs = middle(scipy.signal.resample(source, RATE))
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 0.01 * np.sqrt(np.mean(theirs**2))  # -40 dB


def test_what_24_khz_cannot_hold_is_filtered_out(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(192000, hertz=1000) + tone(192000, hertz=20000), 192000, subtype="FLOAT")
    samples = middle(read_audio(tmp_path / "a.wav"))
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hertz = np.fft.rfftfreq(len(samples), 1 / RATE)
    assert spectrum[np.abs(hertz - 4000) < 50].max() < 1e-4 * spectrum.max()  # 20 kHz would fold to 4 kHz


@pytest.mark.parametrize(
    ("suffix", "subtype", "tolerance"),
    [
        ("wav", "PCM_U8", 0.01),
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "FLOAT", 1e-7),
        ("wav", "DOUBLE", 1e-7),
        ("wav", "ULAW", 0.02),
        ("flac", "PCM_16", 1e-4),
        ("flac", "PCM_24", 1e-6),
    ],
)
def test_every_sample_width_reads_the_same(tmp_path: Path, suffix: str, subtype: str, tolerance: float) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(RATE), RATE, subtype=subtype)
    np.testing.assert_allclose(read_audio(path), tone(RATE), atol=tolerance)


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_lossy_formats(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, tone(44100), 44100)
    samples = read_audio(path)
    assert frequency(samples) == pytest.approx(1000, abs=0.5)
    assert level(samples) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(RATE), tone(RATE, hertz=440, peak=0.2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-6)


def test_g722_of_a_tone(tmp_path: Path) -> None:
    source = tone(16000, seconds=2)
    encode(tmp_path / "a.g722", source, 16000, "g722", "g722")
    samples = read_audio(tmp_path / "a.g722")
    assert len(samples) == pytest.approx(2 * RATE, abs=100)
    assert frequency(samples) == pytest.approx(1000, abs=0.1)
    assert level(samples) == pytest.approx(level(source), rel=0.02)
    clean = scipy.signal.resample(source, 2 * RATE)[: len(samples)]
    delay = int(np.argmax(np.correlate(middle(samples), middle(clean)[500:-500], "valid"))) - 500
    error = middle(np.roll(samples, -delay) - clean)
    assert level(error) < 0.05 * level(clean)  # the codec's own noise


def test_mp4_is_read_with_ffmpeg(tmp_path: Path) -> None:
    encode(tmp_path / "a.m4a", tone(48000), 48000, "alac", "mp4")
    samples = read_audio(tmp_path / "a.m4a")
    assert frequency(samples) == pytest.approx(1000, abs=0.1)
    assert level(samples) == pytest.approx(0.5 / np.sqrt(2), rel=0.005)
    assert "too long" in reason(tmp_path / "a.m4a", max_seconds=0.5)


def test_reasons(tmp_path: Path) -> None:
    def write(name: str, samples: np.ndarray, rate: int = RATE) -> Path:
        soundfile.write(tmp_path / name, samples, rate, subtype="FLOAT")
        return tmp_path / name

    assert reason(tmp_path / "none.wav") == "no such file"
    assert reason(tmp_path) == "no such file"
    (tmp_path / "empty.wav").touch()
    assert reason(tmp_path / "empty.wav") == "empty file"
    (tmp_path / "empty.g722").touch()
    assert reason(tmp_path / "empty.g722") == "empty file"
    (tmp_path / "text.wav").write_text("this is no sound file\n" * 50)
    assert reason(tmp_path / "text.wav").startswith("cannot be read: ")
    assert str(tmp_path) not in reason(tmp_path / "text.wav")
    assert reason(write("zero.wav", np.zeros(0, np.float32))) == "no samples"
    assert "too short: 79 ms" in reason(write("short.wav", tone(RATE, 0.079)))
    assert len(read_audio(write("frame.wav", tone(RATE, 0.08)))) == 1920
    assert "too long" in reason(write("long.wav", tone(8000, 60.1), 8000))
    assert len(read_audio(write("just.wav", tone(8000, 60.0), 8000))) == 60 * RATE
    assert "silent" in reason(write("silent.wav", np.zeros(RATE, np.float32)))
    assert "silent" in reason(write("faint.wav", tone(RATE, peak=0.0009)))
    assert len(read_audio(write("quiet.wav", tone(RATE, peak=0.0011)))) == RATE
    opposite = np.stack([tone(RATE), -tone(RATE)], axis=1)
    assert "silent" in reason(write("opposite.wav", opposite))
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        samples = tone(RATE)
        samples[100] = value
        assert reason(write(f"{name}.wav", samples)) == "NaN or infinite samples"
    assert "too loud" in reason(write("int_scaled.wav", 32767 * tone(RATE)))
    assert reason(write("slow.wav", tone(100), 100)) == "bad sample rate: 100 Hz"


def test_truncated_files(tmp_path: Path) -> None:
    for name, subtype in (("a.wav", "PCM_16"), ("a.flac", "PCM_16")):
        soundfile.write(tmp_path / name, tone(RATE, 2) + 0.1 * np.sin(np.arange(2 * RATE) ** 1.5), RATE, subtype)
        whole = (tmp_path / name).read_bytes()
        for keep in (0.9, 0.5):
            (tmp_path / name).write_bytes(whole[: int(keep * len(whole))])
            message = reason(tmp_path / name)
            assert "cut off" in message or "cannot be read" in message
        for length in (1, 10, 30, 44):
            (tmp_path / name).write_bytes(whole[:length])
            reason(tmp_path / name)
    soundfile.write(tmp_path / "a.mp3", tone(RATE, 2), RATE)
    whole = (tmp_path / "a.mp3").read_bytes()
    (tmp_path / "a.mp3").write_bytes(whole[: len(whole) // 2])
    assert "cut off" in reason(tmp_path / "a.mp3")
    encode(tmp_path / "a.m4a", tone(48000), 48000, "alac", "mp4")
    whole = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in reason(tmp_path / "a.m4a")


def test_a_wav_from_a_pipe_is_not_cut_off(tmp_path: Path) -> None:
    """Programs that cannot seek back write the largest length there is."""
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE, subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = b"\xff\xff\xff\xff"
    (tmp_path / "a.wav").write_bytes(data)
    assert len(read_audio(tmp_path / "a.wav")) == RATE


@pytest.mark.parametrize("name", ["a.wav", "a.m3u8", "a.m4a"])
def test_a_playlist_does_not_open_what_it_names(tmp_path: Path, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)
        address = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts"
        playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"
        (tmp_path / name).write_text(playlist)
        assert "cannot be read" in reason(tmp_path / name)
        with pytest.raises(TimeoutError):
            server.accept()


def test_files_are_closed(tmp_path: Path) -> None:
    encode(tmp_path / "a.g722", tone(16000), 16000, "g722", "g722")
    (tmp_path / "bad.wav").write_bytes(b"RIFF" + bytes(100))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        read_audio(tmp_path / "a.g722")
        reason(tmp_path / "a.g722", max_seconds=0.2)
        reason(tmp_path / "bad.wav")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 2


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from(["wav", "flac", "ogg", "mp3", "g722", "m4a"]))
def test_damaged_bytes_give_samples_or_a_reason(tmp_path: Path, data: st.DataObject, suffix: str) -> None:
    good = tmp_path / f"good.{suffix}"
    if not good.exists():
        if suffix == "g722":
            encode(good, tone(16000, 0.3), 16000, "g722", "g722")
        elif suffix == "m4a":
            encode(good, tone(48000, 0.3), 48000, "alac", "mp4")
        else:
            soundfile.write(good, tone(RATE, 0.3), RATE)
    content = bytearray(good.read_bytes())
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] + data.draw(st.binary(max_size=40))
    damaged = tmp_path / f"damaged.{suffix}"
    damaged.write_bytes(bytes(content))
    try:
        samples = read_audio(damaged)
    except BadAudio as error:
        assert str(error)  # noqa: PT017  (either outcome is right)
    else:
        assert samples.dtype == np.float32
        assert np.isfinite(samples).all()
        assert 1900 <= len(samples) <= 60 * RATE + 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=3000), suffix=st.sampled_from(["wav", "mp3", "xyz", "g722", "raw"]))
def test_random_bytes_give_samples_or_a_reason(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    try:
        assert np.isfinite(read_audio(path)).all()
    except BadAudio as error:
        assert str(error)  # noqa: PT017
