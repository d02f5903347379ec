"""A length that a file declares is neither the truth nor a verdict: whole recordings are read to their real end, and
what its container knows to be cut off is rejected."""

import io
import struct
from pathlib import Path
from typing import cast

import av
import numpy as np
import pytest
import soundfile

from megatron_soda.audio.containers import _ogg_crc, examine
from megatron_soda.audio.reading import read_audio
from megatron_soda.audio.sound import BadAudio, Sound
from tests.voices import voice

RATE = 16000
SECONDS = 6.0
KINDS = {  # suffix: codec, ffmpeg's format, options of the format
    "vbr.mp3": ("libmp3lame", "mp3", {}),
    "vbr_bare.mp3": ("libmp3lame", "mp3", {"write_xing": "0"}),
    "mp2": ("mp2", "mp2", {}),
    "flac": ("flac", "flac", {}),
    "ogg": ("", "", {}),  # ffmpeg as it comes has no encoder of Vorbis
    "opus": ("libopus", "ogg", {}),
    "oga": ("flac", "ogg", {}),
    "wav": ("pcm_s16le", "wav", {}),
    "rf64.wav": ("pcm_s16le", "wav", {"rf64": "always"}),
    "w64": ("pcm_s16le", "w64", {}),
    "aiff": ("pcm_s16be", "aiff", {}),
    "au": ("pcm_s16be", "au", {}),
    "caf": ("pcm_s16le", "caf", {}),
    "m4a": ("aac", "mp4", {}),
    "frag.mp4": ("aac", "mp4", {"movflags": "frag_keyframe+empty_moov"}),
    "aac": ("aac", "adts", {}),
    "webm": ("libopus", "webm", {}),
    "mka": ("flac", "matroska", {}),
    "wma": ("wmav2", "asf", {}),
    "tta": ("tta", "tta", {}),
    "wv": ("wavpack", "wv", {}),
    "ts": ("mp2", "mpegts", {}),
}
VBR = {"flags": "+qscale", "global_quality": "472"}
DOES_NOT_TELL = {"vbr_bare.mp3", "mp2", "ts"}
PIPES = sorted(set(KINDS) - {"ogg", "m4a", "rf64.wav", "tta", "wv", "wma"})
PIPE_DOES_NOT_TELL = {*DOES_NOT_TELL, "vbr.mp3", "wav", "w64", "aiff", "au", "caf"}


class Pipe(io.RawIOBase):
    """What cannot go back to fill in the length."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data) -> int:
        self.data += data
        return len(data)

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return False


def speech(seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """Half of it loud, half faint: a variable bit rate varies."""
    wave = voice(seed, seconds, RATE).copy()
    wave[len(wave) // 2 :] *= 0.02
    return wave


def encoded(kind: str, pipe: bool = False, wave: np.ndarray | None = None) -> bytes:
    codec, form, options = KINDS[kind]
    pcm = ((speech() if wave is None else wave) * 32767).astype(np.int16)
    file = Pipe() if pipe else io.BytesIO()
    if kind == "ogg":
        soundfile.write(file, pcm, RATE, format="OGG")
        return cast(io.BytesIO, file).getvalue()
    with av.open(file, "w", format=form, options=options) as output:
        stream = output.add_stream(codec, rate=RATE, options=VBR if "vbr" in kind else {})
        stream.layout = "mono"
        stream.bit_rate = 48_000
        fifo = av.AudioResampler(stream.format, "mono", RATE, stream.frame_size or 1024)
        for start in range(0, len(pcm), 4000):
            frame = av.AudioFrame.from_ndarray(pcm[None, start : start + 4000], format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            for part in fifo.resample(frame):
                output.mux(stream.encode(part))
        for part in fifo.resample(None):
            output.mux(stream.encode(part))
        output.mux(stream.encode(None))
    return bytes(file.data) if isinstance(file, Pipe) else file.getvalue()


def seconds(data: bytes, kind: str, tmp_path: Path, inside: bool = False) -> float:
    """Read as a file, or as a member of an archive."""
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"xyz" + data + b"z" if inside else data)
    sound = Sound(str(path), offset=3, size=len(data), name=path.name) if inside else Sound(str(path))
    return len(read_audio(sound, RATE)) / RATE


@pytest.mark.parametrize(
    ("kind", "pipe"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in PIPES)], ids=str
)
def test_to_the_real_end_and_no_less(tmp_path, kind, pipe):
    inside = pipe != (len(kind) > 3)  # both ways, in turns
    data = encoded(kind, pipe)
    assert seconds(data, kind, tmp_path, inside) == pytest.approx(SECONDS, abs=0.15)  # what encoders add
    tells = kind not in (PIPE_DOES_NOT_TELL if pipe else DOES_NOT_TELL)
    for share in (0.2, 0.6, 0.97):
        cut = data[: int(share * len(data))]
        if tells:
            with pytest.raises(BadAudio, match=r"cut off|cannot be read"):
                seconds(cut, kind, tmp_path, inside)
        else:
            assert 0 < seconds(cut, kind, tmp_path, inside) < SECONDS


def test_libsndfile_alone_would_take_less(tmp_path):
    """Or the tests above show nothing."""
    for kind, times in (("vbr_bare.mp3", 1), ("ogg", 2), ("opus", 2), ("flac", 2)):
        believed = soundfile.info(io.BytesIO(times * encoded(kind))).duration
        assert believed < 0.9 * times * SECONDS


@pytest.mark.parametrize("kind", ["vbr.mp3", "vbr_bare.mp3", "flac", "ogg", "opus", "oga", "aac"])
def test_one_after_the_other(tmp_path, kind):
    """Concatenated files are recordings too: radio streams and dictation machines make them."""
    data = encoded(kind)
    second = encoded(kind, wave=speech(3.0, 1))
    assert seconds(data + second, kind, tmp_path) == pytest.approx(SECONDS + 3.0, abs=0.3)
    assert seconds(second + data, kind, tmp_path) == pytest.approx(SECONDS + 3.0, abs=0.3)


LENGTHS = {  # where a header declares the length of the samples, and how
    "wav": (b"data", 4, "<I"),
    "rf64.wav": (b"ds64", 16, "<Q"),
    "w64": (b"data\xf3\xac", 16, "<Q"),
    "aiff": (b"SSND", 4, ">I"),
    "au": (b".snd", 8, ">I"),
    "caf": (b"data", 4, ">Q"),
}


@pytest.mark.parametrize("kind", LENGTHS)
def test_samples_behind_the_declared_end(tmp_path, kind):
    data = bytearray(encoded(kind))
    name, skip, form = LENGTHS[kind]
    at = data.index(name) + skip
    (right,) = struct.unpack_from(form, data, at)
    for wrong in (0, 24, 1000, 50_001, right // 2, right - 1000, right + 8, right + 100):
        struct.pack_into(form, data, at, wrong)
        for inside in (False, True):
            found = seconds(bytes(data), kind, tmp_path, inside)
            assert found == pytest.approx(SECONDS, abs=0.07), wrong
    for wrong in (right + 10_000, 2 * right):
        struct.pack_into(form, data, at, wrong)
        with pytest.raises(BadAudio, match="cut off"):
            seconds(bytes(data), kind, tmp_path)


def test_chunks_and_tags_behind_the_samples_are_no_sound(tmp_path):
    data = encoded("wav")
    (riff,) = struct.unpack_from("<I", data, 4)
    for chunk in (b"LIST", b"id3 ", b"bext"):
        body = np.random.default_rng(0).integers(0, 256, 40_000, np.uint8).tobytes()
        longer = data + chunk + struct.pack("<I", len(body)) + body
        longer = longer[:4] + struct.pack("<I", riff + 8 + len(body)) + longer[8:]
        assert seconds(longer, "wav", tmp_path) == SECONDS
    tag = b"TAG" + bytes(125)
    for kind in ("wav", "vbr.mp3", "flac", "ogg"):
        assert seconds(encoded(kind) + tag, kind, tmp_path) == pytest.approx(SECONDS, abs=0.1)
    ape = b"APETAGEX" + struct.pack("<IIII", 2000, 40_032, 1, 0x80000000) + bytes(8)
    ape = ape + bytes(40_000) + ape[:20] + bytes(4) + bytes(8)
    assert seconds(encoded("vbr.mp3") + ape, "vbr.mp3", tmp_path) == pytest.approx(SECONDS, abs=0.1)
    id3 = b"ID3\x04\0\0" + bytes([0, 2, 0x20, 0]) + bytes(0x9000)
    for kind in ("vbr.mp3", "vbr_bare.mp3", "flac"):
        assert seconds(id3 + encoded(kind), kind, tmp_path) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("wrong", [1, 16_000, 95_000, 96_000 - 4096])
def test_flac_that_declares_too_little(tmp_path, wrong):
    data = bytearray(encoded("flac"))
    assert int.from_bytes(data[21:26], "big") & 0xF_FFFF_FFFF == 96_000
    data[21:26] = (int.from_bytes(data[21:26], "big") - 96_000 + wrong).to_bytes(5, "big")
    assert seconds(bytes(data), "flac", tmp_path) == SECONDS


@pytest.mark.parametrize("kind", ["ogg", "opus", "oga"])
def test_ogg_pages(tmp_path, kind):
    whole = encoded(kind)
    starts = [at for at in range(len(whole)) if whole[at : at + 4] == b"OggS"]
    assert len(starts) >= 4
    at = starts[-2]
    cases = {
        "pages are missing": whole[: starts[-3]] + whole[at:],
        "a page whose checksum is wrong": whole[: at + 60] + bytes([whole[at + 60] ^ 1]) + whole[at + 61 :],
        "bytes between its pages": whole[:at] + bytes(600) + whole[at:],
        "cut off": whole[: starts[-1]],
    }
    for said, data in cases.items():
        with pytest.raises(BadAudio, match=said):
            seconds(data, kind, tmp_path)
    # A stream joined on the way: its clock does not begin at zero, and its numbers do not either.
    moved = bytearray(whole)
    for number, start in enumerate(starts):
        (granule,) = struct.unpack_from("<q", moved, start + 6)
        if granule > 0:
            struct.pack_into("<q", moved, start + 6, granule + 1_000_000)
        struct.pack_into("<I", moved, start + 18, number)
        end = starts[number + 1] if number + 1 < len(starts) else len(moved)
        struct.pack_into("<I", moved, start + 22, 0)
        moved[start + 22 : start + 26] = _ogg_crc(bytes(moved[start:end]))
    assert seconds(bytes(moved), kind, tmp_path) == pytest.approx(SECONDS, abs=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_segments_of_what_is_not_trusted(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(encoded(kind, kind in PIPES))
    whole = read_audio(path, RATE)
    for start, end in ((0.0, 1.0), (1.5, 2.5), (3.5, 5.5), (5.0, 0.0)):
        part = read_audio(Sound(str(path), start=start, end=end), RATE)
        assert len(part) / RATE == pytest.approx((end or len(whole) / RATE) - start, abs=0.1)
        expected = whole[round(start * RATE) :][: len(part)]
        window = slice(2000, min(len(part), len(expected)) - 2000)
        shift = np.correlate(expected[window], part[window][1000:-1000], "valid")
        assert abs(int(np.argmax(shift)) - 1000) < 1000, (start, end)


def test_examine_reads_a_segmented_recording_once(tmp_path, monkeypatch):
    from megatron_soda.audio import reading as audio

    calls = []
    monkeypatch.setattr(audio, "examine", lambda file: calls.append(1) or examine(file))
    (tmp_path / "a.ogg").write_bytes(encoded("ogg"))
    for start in range(5):
        read_audio(Sound(str(tmp_path / "a.ogg"), start=start, end=start + 1), RATE)
    assert len(calls) == 1
    (tmp_path / "a.ogg").write_bytes(encoded("ogg", wave=speech(6.0)))
    read_audio(Sound(str(tmp_path / "a.ogg"), start=0, end=1), RATE)
    assert len(calls) == 2


SURROUND = {"5.1": ["FL", "FR", "FC", "LFE", "BL", "BR"], "7.1": ["FL", "FR", "FC", "LFE", "BL", "BR", "SL", "SR"]}


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
@pytest.mark.parametrize("layout", SURROUND)
def test_speech_in_the_centre(tmp_path, layout, suffix):
    wave = voice(0, 2.0, 48000)
    names = SURROUND[layout]
    order = names
    if suffix == "ogg":  # Vorbis has an order of its own
        order = {6: ["FL", "FC", "FR", "BL", "BR", "LFE"], 8: ["FL", "FC", "FR", "SL", "SR", "BL", "BR", "LFE"]}[
            len(names)
        ]

    def heard(levels: dict[str, float]) -> np.ndarray:
        channels = np.stack([levels.get(name, 0.0) * wave for name in order], axis=1)
        soundfile.write(tmp_path / f"a.{suffix}", channels, 48000)
        return read_audio(tmp_path / f"a.{suffix}", 48000)

    def decibels(levels: dict[str, float]) -> float:
        sound = heard(levels)
        return 20 * float(np.log10(np.linalg.norm(sound) / np.linalg.norm(wave)))

    assert decibels({"FC": 1.0}) == pytest.approx(0.0, abs=0.2)
    assert decibels({"FL": 1.0, "FR": 1.0}) == pytest.approx(0.0, abs=0.2)
    assert decibels({"BL": 1.0}) == pytest.approx(-9.0, abs=0.2)
    with pytest.raises(BadAudio, match="silent"):
        heard({"LFE": 1.0})


def test_microphones_are_averaged(tmp_path):
    """Four channels without labels, as an array of microphones writes them."""
    wave = voice(0, 2.0, RATE)
    soundfile.write(tmp_path / "a.wav", np.stack([wave, wave, wave, 0 * wave], axis=1), RATE, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav", RATE), 0.75 * wave, atol=1e-6)
