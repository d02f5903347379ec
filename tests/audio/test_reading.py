"""read_audio and read_pieces: every kind of file a user may have, a reason for each that is no usable audio, and cuts
that lose nothing."""

import io
import os
import socket
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import scipy.signal
import soundfile
import soxr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_soda.audio import reading as audio
from megatron_soda.audio import sound_bytes
from megatron_soda.audio.reading import cut, read_audio, read_pieces
from megatron_soda.audio.sound import BadAudio, Sound
from megatron_soda.errors import SodaError
from tests.voices import voice

RATE = 24000
FRAME = 1920


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


def reason(path: Path | Sound, **options: float) -> str:
    with pytest.raises(BadAudio) as caught:
        read_audio(path, **options)
    if not options:
        with pytest.raises(BadAudio) as again:
            list(read_pieces(path, RATE, FRAME))
        assert str(caught.value).startswith("too long") or str(again.value) == str(caught.value)
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
    with pytest.raises(BadAudio, match="too long"):
        read_audio(write("long.wav", tone(8000, 60.1), 8000))
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


@given(st.lists(st.floats(width=32), max_size=5), st.sampled_from([1, -1]))
def test_peak(values: list[float], sign: int) -> None:
    samples = np.array(values, np.float32)
    np.testing.assert_equal(audio._peak(samples), float(np.abs(samples).max(initial=0.0)))
    finite = sign * np.abs(samples[np.isfinite(samples)])
    np.testing.assert_equal(audio._peak(finite), float(np.abs(finite).max(initial=0.0)))


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
    assert "cut off" in reason(tmp_path / "a.m4a")


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
        assert "cannot be read" in reason(Sound(str(tmp_path / name), offset=0, size=len(playlist)))
        with pytest.raises(TimeoutError):
            server.accept()


def test_a_playlist_does_not_open_another_file(tmp_path: Path) -> None:
    encode(tmp_path / "a.ts", tone(48000), 48000, "aac", "mpegts")
    assert read_audio(tmp_path / "a.ts").any()
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/a.ts\n#EXT-X-ENDLIST\n"
    (tmp_path / "b.m3u8").write_text(playlist)
    reason(tmp_path / "b.m3u8")


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


# --- pieces


def talk(seconds: float, rate: int = RATE, seed: int = 0) -> np.ndarray:
    """Voice with a pause of half a second every three to five."""
    rng = np.random.default_rng(seed)
    samples = np.resize(voice(seed, min(seconds, 20.0), rate), int(seconds * rate))
    at = 0.0
    while (at := at + rng.uniform(3, 5)) < seconds:
        samples[int(at * rate) : int((at + 0.5) * rate)] *= 0.003
    return samples


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
@pytest.mark.parametrize("rate", [8000, 22050, 24000, 44100])
def test_blocks_make_the_same_samples_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, rate: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    sound = talk(3.7, rate)
    soundfile.write(path, np.stack([sound, 0.5 * np.roll(sound, 9)], axis=1), rate)
    samples, _ = soundfile.read(path, dtype="float32")
    mono = samples.mean(axis=1, dtype=np.float64)
    whole = soxr.resample(mono, rate, RATE, quality="HQ") if rate != RATE else mono
    one = read_audio(path)
    np.testing.assert_allclose(one, whole, atol=2e-6, rtol=0)
    for block, step in ((1 << 15, 1 << 14), (1000, 333), (77, 7777)):
        monkeypatch.setattr(audio, "BLOCK", block)
        monkeypatch.setattr(audio, "STEP", step)
        np.testing.assert_array_equal(read_audio(path), one)
        pieces = list(read_pieces(path, RATE, FRAME, piece_seconds=1.5))
        np.testing.assert_array_equal(np.concatenate(pieces), one)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "FLOAT"])
def test_wav_values_are_those_of_libsndfile(tmp_path: Path, subtype: str) -> None:
    noise = np.random.default_rng(0).uniform(-1, 1, 5000)
    noise[:2] = 1, -1
    soundfile.write(tmp_path / "a.wav", noise, RATE, subtype=subtype)
    np.testing.assert_array_equal(
        read_audio(tmp_path / "a.wav"), soundfile.read(tmp_path / "a.wav", dtype="float32")[0]
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cuts(data: st.DataObject) -> None:
    """Whatever the blocks: nothing lost, whole frames, no piece too long, and the same cuts."""
    rate, frame = 1000, data.draw(st.integers(1, 130))
    count = data.draw(st.integers(0, 20000))
    seconds = data.draw(st.floats(2 * frame / rate + 0.001, 8.0))
    whole = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    places = sorted(data.draw(st.lists(st.integers(0, count), max_size=12)))
    pieces = list(cut(iter(np.split(whole, places)), rate, frame, seconds))
    if count:
        np.testing.assert_array_equal(np.concatenate(pieces), whole)
    assert all(len(piece) % frame == 0 for piece in pieces[:-1])
    assert all(min(frame, count) <= len(piece) <= seconds * rate for piece in pieces)
    assert all(len(piece) >= seconds * rate / 2 - 2 * frame for piece in pieces[:-1])
    again = [len(piece) for piece in cut(iter([whole]), rate, frame, seconds)]
    assert [len(piece) for piece in pieces] == again


def test_cuts_are_in_pauses(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", talk(200), RATE)
    pieces = list(read_pieces(tmp_path / "a.wav", RATE, FRAME, piece_seconds=30))
    assert len(pieces) in range(7, 11)
    for a, b in pairwise(pieces):
        assert len(a) % FRAME == 0
        assert 20 * RATE <= len(a) <= 30 * RATE
        assert np.abs(a[-FRAME:]).max() < 0.003
        assert np.abs(b[:FRAME]).max() < 0.003


def test_a_piece_must_have_two_frames(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    with pytest.raises(SodaError, match="two codec frames"):
        list(read_pieces(tmp_path / "a.wav", RATE, FRAME, piece_seconds=0.15))


def read_all(path: Path, frame: int = FRAME) -> np.ndarray:
    return np.concatenate(list(read_pieces(path, RATE, frame)))


def test_the_shortest_is_one_frame_of_the_codec(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", tone(RATE, 0.03), RATE)
    assert len(read_all(tmp_path / "a.wav", 480)) == 720
    with pytest.raises(BadAudio, match="too short: 30 ms; one codec frame is 40 ms"):
        list(read_pieces(tmp_path / "a.wav", RATE, 960))


def test_what_shows_at_the_end_is_raised_at_the_end(tmp_path: Path) -> None:
    samples = talk(9)
    samples[-10] = np.nan
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(BadAudio, match="NaN"):
        list(read_pieces(tmp_path / "a.wav", RATE, FRAME, piece_seconds=2))


def test_ten_minutes_need_no_more_memory_than_one(tmp_path: Path) -> None:
    """Peak resident memory of a process that reads it, beyond that of one that reads a minute."""
    code = (
        "import resource, sys\n"
        "from megatron_soda.audio.reading import read_pieces\n"
        "count = sum(len(piece) for piece in read_pieces(sys.argv[1], 24000, 1920))\n"
        "print(count, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)\n"
    )
    root = Path(__file__).parents[2]
    peaks = {}
    for minutes in (1, 10):
        path = tmp_path / f"{minutes}.wav"
        with soundfile.SoundFile(path, "w", 16000, 1) as file:
            for _ in range(minutes):
                file.write(np.resize(talk(20, 16000), 60 * 16000))
        done = subprocess.run(
            [sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True, env=os.environ
        )
        count, peaks[minutes] = map(int, done.stdout.split())
        assert count == minutes * 60 * RATE
    assert peaks[10] <= peaks[1] + 25  # MiB; the samples of ten minutes alone are 55


# --- where sound is kept


def encoded(samples: np.ndarray, rate: int, format: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format)
    return file.getvalue()


def test_a_member_of_a_tar(tmp_path: Path) -> None:
    encode(tmp_path / "a.g722", tone(16000), 16000, "g722", "g722")
    encode(tmp_path / "a.m4a", tone(48000), 48000, "alac", "mp4")
    for suffix in ("wav", "flac", "ogg", "mp3"):
        soundfile.write(tmp_path / f"a.{suffix}", talk(3, 16000), 16000)
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for suffix in ("g722", "wav", "flac", "m4a", "ogg", "mp3"):
            tar.add(tmp_path / f"a.{suffix}", f"x/a.{suffix}")
    with tarfile.open(tmp_path / "all.tar") as tar:
        members = tar.getmembers()
    for member in members:
        name = member.name if member.name.endswith("g722") else ""
        sound = Sound(str(tmp_path / "all.tar"), offset=member.offset_data, size=member.size, name=name)
        np.testing.assert_array_equal(read_audio(sound), read_audio(tmp_path / Path(member.name).name))
        whole = Sound(sound.path, offset=sound.offset, size=10**9)
        assert reason(whole).startswith("cut off: bytes")
    assert reason(Sound(str(tmp_path / "all.tar"), offset=0, size=0)) == "empty file"
    assert reason(Sound(str(tmp_path / "gone.tar"), offset=0, size=10)) == "no such file"


def test_a_row_of_parquet(tmp_path: Path) -> None:
    data = [encoded(tone(RATE, 0.2, hertz=300 + 50 * i), RATE, "FLAC") for i in range(10)]
    path = tmp_path / "a.parquet"
    structs = [{"bytes": value, "path": f"{i}.flac"} for i, value in enumerate(data)]
    structs[4] = {"bytes": None, "path": "elsewhere.flac"}
    table = pa.table({"audio": structs, "raw": pa.array(data, pa.large_binary()), "text": ["x"] * 10})
    pa.parquet.write_table(table, path, row_group_size=3)
    sound_bytes._row_group.cache_clear()
    for row in range(10):
        raw = read_audio(Sound(str(path), row=row, column="raw"))
        np.testing.assert_allclose(raw, tone(RATE, 0.2, hertz=300 + 50 * row), atol=1e-4)
    assert sound_bytes._row_group.cache_info().misses == 4
    for row in (9, 0):
        np.testing.assert_array_equal(
            read_audio(Sound(str(path), row=row, column="audio")), read_audio(Sound(str(path), row=row, column="raw"))
        )
    assert reason(Sound(str(path), row=4, column="audio")) == "no audio in this row"
    assert reason(Sound(str(path), row=4, column="text")) == "no audio in this row"
    assert reason(Sound(str(path), row=10, column="audio")) == "no such row: 10 of 10"
    assert reason(Sound(str(path), row=1, column="sound")) == "no such column: sound"
    pa.parquet.write_table(table.slice(5), path)  # written anew
    raw = read_audio(Sound(str(path), row=0, column="raw"))
    np.testing.assert_allclose(raw, tone(RATE, 0.2, hertz=550), atol=1e-4)
    path.write_bytes(path.read_bytes()[:-50])
    assert reason(Sound(str(path), row=0, column="raw")).startswith("cannot be read")
    path.unlink()
    assert reason(Sound(str(path), row=0, column="raw")) == "no such file"


def test_the_name_in_parquet_tells_a_format_without_a_header(tmp_path: Path) -> None:
    encode(tmp_path / "a.g722", tone(16000), 16000, "g722", "g722")
    rows = [{"bytes": (tmp_path / "a.g722").read_bytes(), "path": "x/a.g722"}]
    pa.parquet.write_table(pa.table({"audio": rows}), tmp_path / "a.parquet")
    sound = Sound(str(tmp_path / "a.parquet"), row=0, column="audio")
    np.testing.assert_array_equal(read_audio(sound), read_audio(tmp_path / "a.g722"))


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3", "g722", "m4a", "aac.m4a"])
def test_segments(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    source = talk(12, 16000)
    if suffix == "g722":
        encode(path, source, 16000, "g722", "g722")
    elif suffix == "m4a":
        encode(path, source, 16000, "alac", "mp4")
    elif suffix == "aac.m4a":
        encode(path, source, 16000, "aac", "mp4")
    else:
        soundfile.write(path, source, 16000)
    whole = read_audio(path, 16000)
    # A decoder that starts in the middle of a lossy file may differ a little.
    tolerance = {"ogg": 1e-4, "mp3": 2e-3, "aac.m4a": 2e-2, "g722": 1e-2}.get(suffix, 0)
    for start, end in ((0.0, 2.0), (0.5, 1.25), (7.0, 8.0), (10.0, 0.0), (11.5, 12.05)):
        part = read_audio(Sound(str(path), start=start, end=end), 16000)
        expected = whole[round(start * 16000) : round(end * 16000) or None]
        assert abs(len(part) - len(expected)) <= (0 if end and end < 12 else 700)
        length = min(len(part), len(expected))
        np.testing.assert_allclose(part[:length], expected[:length], atol=tolerance, rtol=0)
    for start, end in ((5.0, 5.0), (5.0, 4.0), (11.0, 12.5), (13.0, 14.0), (13.0, 0.0), (-1.0, 2.0), (0.0, -1.0)):
        assert reason(Sound(str(path), start=start, end=end)).startswith("bad segment: ")
    for start, end in ((float("nan"), 1.0), (0.0, float("nan")), (float("inf"), 0.0), (0.0, float("inf"))):
        assert reason(Sound(str(path), start=start, end=end)).startswith("bad segment: ")
    assert reason(Sound(str(path), start=1.0, end=1.01)).startswith("too short")
    with pytest.raises(BadAudio, match="too long"):
        read_audio(Sound(str(path), start=1.0, end=9.0), max_seconds=3)
    assert len(read_audio(Sound(str(path), start=1.0, end=3.5), 16000, max_seconds=3)) == 40000


# --- speech


def room(seconds: float, rate: int = RATE) -> np.ndarray:
    return (0.001 * np.random.default_rng(1).standard_normal(int(seconds * rate))).astype(np.float32)


@pytest.mark.parametrize("rate", [RATE, 22050])
def test_trim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rate: int) -> None:
    speech = np.concatenate([voice(0, 2.0, rate), room(1.5, rate), voice(1, 2.0, rate)])
    whole = np.concatenate([room(3.0, rate), speech, room(4.0, rate)])
    soundfile.write(tmp_path / "a.wav", whole, rate, subtype="FLOAT")
    kept = np.concatenate(list(read_pieces(tmp_path / "a.wav", rate, FRAME, trim=True)))
    at = int(np.flatnonzero(whole == kept[0])[0])
    np.testing.assert_array_equal(whole[at : at + len(kept)], kept)  # one stretch, unaltered
    assert 2.7 <= at / rate <= 3.0  # the margin is 0.2 s
    assert 8.6 <= (at + len(kept)) / rate <= 8.9
    monkeypatch.setattr(audio, "BLOCK", 3001)
    pieces = list(read_pieces(tmp_path / "a.wav", rate, FRAME, trim=True, piece_seconds=2))
    np.testing.assert_array_equal(np.concatenate(pieces), kept)
    assert all(len(piece) % FRAME == 0 for piece in pieces[:-1])


def test_trim_keeps_what_is_all_speech_and_long_pauses(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", voice(3, 1.0), RATE, subtype="FLOAT")
    assert len(np.concatenate(list(read_pieces(tmp_path / "a.wav", RATE, FRAME, trim=True)))) == RATE
    whole = np.concatenate([voice(0, 2.0), room(130), voice(1, 2.0), room(2)])
    soundfile.write(tmp_path / "b.wav", whole, RATE, subtype="FLOAT")
    kept = np.concatenate(list(read_pieces(tmp_path / "b.wav", RATE, FRAME, trim=True)))
    np.testing.assert_array_equal(kept, whole[: len(kept)])
    assert 134.1 * RATE < len(kept) < 134.5 * RATE


def test_no_speech(tmp_path: Path) -> None:
    clicks = room(20)
    clicks[RATE :: 2 * RATE] = 0.5
    soundfile.write(tmp_path / "a.wav", clicks, RATE)
    with pytest.raises(BadAudio, match="no speech"):
        list(read_pieces(tmp_path / "a.wav", RATE, FRAME, trim=True))


def test_trim_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "webrtcvad", None)
    soundfile.write(tmp_path / "a.wav", tone(RATE), RATE)
    with pytest.raises(SodaError, match=r"pip install megatron-soda\[vad\]"):
        list(read_pieces(tmp_path / "a.wav", RATE, FRAME, trim=True))


# --- hostile bytes


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(["WAV", "FLAC", "OGG"]))
def test_damaged_bytes_in_a_range_give_pieces_or_a_reason(
    tmp_path: Path, capfd: pytest.CaptureFixture, data: st.DataObject, format: str
) -> None:
    content = bytearray(encoded(tone(RATE, 0.3), RATE, format))
    for _ in range(data.draw(st.integers(1, 8))):
        place = data.draw(st.integers(0, 60) | st.integers(0, len(content) - 1))
        content[place] = data.draw(st.sampled_from([0, 1, 127, 128, 254, 255]) | st.integers(0, 255))
    before, after = data.draw(st.binary(max_size=20)), data.draw(st.binary(max_size=20))
    path = tmp_path / "a.bin"
    path.write_bytes(before + content + after)
    start, end = data.draw(st.sampled_from([(0.0, 0.0), (0.0, 0.2), (0.1, 0.3)]))
    sound = Sound(str(path), offset=len(before), size=len(content), start=start, end=end)
    try:
        for piece in read_pieces(sound, RATE, 480, piece_seconds=0.1):
            assert piece.dtype == np.float32
            assert 0 < len(piece) <= 2400
            assert np.isfinite(piece).all()
    except BadAudio as error:
        assert str(error)  # noqa: PT017
    assert "Traceback" not in capfd.readouterr().err  # of a callback of libsndfile
