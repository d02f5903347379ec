"""Sound file -> mono float32 samples at the codec's rate, or one clear reason why not."""

import math
import os
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 24000
FRAME_SECONDS = 0.08  # one codec frame (12.5 Hz): shorter audio gives no token
SILENT_PEAK = 1e-3  # -60 dBFS
LOUDEST_PEAK = 10.0  # +20 dBFS: a float file scaled like integers, not merely a hot recording
SAMPLE_RATES = (4000, 384000)  # anything else is a damaged header
UNKNOWN_LENGTH = 0x7FFF_0000  # programs that write a wav into a pipe put a size from here on


class BadAudio(ValueError):  # noqa: N818  (a verdict on the file, not a failure of the program)
    """This file is no usable audio. The message is the reason, without the path; up to its ':' it is one of a few
    fixed phrases, to count by."""


def read_audio(path: Path, sample_rate: int = SAMPLE_RATE, max_seconds: float = 60.0) -> np.ndarray:
    """Reads a sound file: float32 [samples], mono (the mean of the channels), full scale +-1, at `sample_rate` Hz.

    Raises BadAudio, and nothing else, for a file that cannot be read, is cut off (where the format tells), has
    NaN or infinite samples, is silent (peak below -60 dBFS), shorter than one codec frame (80 ms) or longer than
    `max_seconds`. Long recordings are not cut into pieces here: that is a later matter.
    """
    try:
        samples, rate = _decode(Path(path), max_seconds)
        seconds = len(samples) / rate
        if len(samples) == 0:
            raise BadAudio("no samples")
        if seconds < FRAME_SECONDS:
            raise BadAudio(f"too short: {seconds * 1000:.0f} ms; one codec frame is {FRAME_SECONDS * 1000:.0f} ms")
        if seconds > max_seconds:
            raise BadAudio(f"too long: over {max_seconds:g} s")
        if not np.isfinite(samples).all():
            raise BadAudio("NaN or infinite samples")
        mono = samples.mean(axis=1, dtype=np.float64)
        peak = float(np.abs(mono).max())
        if peak < SILENT_PEAK:
            raise BadAudio("silent: peak below -60 dBFS")
        if peak > LOUDEST_PEAK:
            raise BadAudio(f"too loud: peak {peak:.3g}; full scale is 1.0")
        if rate != sample_rate:
            mono = soxr.resample(mono, rate, sample_rate, quality="HQ")
        return mono.astype(np.float32)
    except BadAudio:
        raise
    except Exception as error:  # decoders fail in many ways on damaged bytes; a worker must go on to the next file
        raise BadAudio(f"cannot be read: {_why(error)}") from error


def _decode(path: Path, max_seconds: float) -> tuple[np.ndarray, int]:
    """-> float32 [samples, channels] and the file's own rate in Hz."""
    if not path.is_file():
        raise BadAudio("no such file")
    if path.stat().st_size == 0:
        raise BadAudio("empty file")
    if path.suffix.lower() == ".g722":  # headerless: only the name tells what it is
        return _decode_av(path, max_seconds, "g722")
    try:
        file = soundfile.SoundFile(path)
    except Exception as first:  # not a format of libsndfile's
        try:
            return _decode_av(path, max_seconds, None)
        except BadAudio:
            raise
        except Exception as second:
            raise BadAudio(f"cannot be read: {_why(first)} {_why(second)}") from None
    with file:
        rate, frames = file.samplerate, file.frames
        _check_rate(rate)
        if frames > max_seconds * rate:  # before decoding: a small file can unpack to hours
            raise BadAudio(f"too long: {frames / rate:.1f} s; the limit is {max_seconds:g} s")
        samples = file.read(dtype="float32", always_2d=True)
    if len(samples) < frames or _wav_is_cut(path):
        raise BadAudio("cut off: the file is shorter than its header says")
    return samples, rate


def _decode_av(path: Path, max_seconds: float, format: str | None) -> tuple[np.ndarray, int]:
    # ffmpeg lets a local file open no network address (a playlist in disguise); the tests hold it to that.
    with av.open(str(path), format=format) as container:
        if not container.streams.audio:
            raise BadAudio("no audio in this file")
        stream = container.streams.audio[0]
        rate = stream.rate
        _check_rate(rate)
        to_float = av.AudioResampler(format="fltp")  # same rate and channels
        blocks: list[np.ndarray] = []
        count = 0
        for frame in container.decode(stream):
            for part in to_float.resample(frame):
                blocks.append(part.to_ndarray().T)
                count += part.samples
            if count > max_seconds * rate:
                raise BadAudio(f"too long: over {max_seconds:g} s")
        declared = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
        # Only mp4 states a length; for the others ffmpeg guesses it from the size.
        if "mov" in container.format.name and count / rate < 0.98 * declared - 0.1:
            raise BadAudio("cut off: the file is shorter than its header says")
    return np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32), rate


def _why(error: Exception) -> str:
    """A decoder's own words, without the path."""
    words = getattr(error, "error_string", None) or getattr(error, "strerror", None) or error
    return f"{type(error).__name__}: {words}"


def _check_rate(rate: int) -> None:
    if not SAMPLE_RATES[0] <= rate <= SAMPLE_RATES[1]:
        raise BadAudio(f"bad sample rate: {rate} Hz")


def _wav_is_cut(path: Path) -> bool:
    """Whether a RIFF wav's data chunk goes past the end of the file (libsndfile reads what is there in silence)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] != b"RIFF" or head[8:] != b"WAVE":
            return False
        while len(chunk := file.read(8)) == 8:
            length = int.from_bytes(chunk[4:], "little")
            if chunk[:4] == b"data":
                return length < UNKNOWN_LENGTH and file.tell() + length > size
            file.seek(math.ceil(length / 2) * 2, os.SEEK_CUR)
    return False
