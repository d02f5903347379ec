"""Sound as bytes of a file or stream, piece by piece."""

import io
import struct
from typing import Any

import av
import numpy as np

TYPES = {  # response_format: media type
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm",
}
_FFMPEG = {"mp3": ("mp3", "libmp3lame"), "opus": ("ogg", "libopus"), "aac": ("adts", "aac"), "flac": ("flac", "flac")}
_USUAL = 48_000  # Hz, which every codec takes: Opus, for one, takes no 44,100
_UNKNOWN = 0xFFFFFFFF  # the length in the header of a wav that has no end yet


def to_int16(wave: np.ndarray) -> bytes:
    """Little-endian samples of float32 ones in [-1, 1]."""
    return (np.clip(wave, -1, 1) * 32767).round().astype("<i2").tobytes()


class Stream:
    """Turns float32 (samples,) at `rate` Hz into a format of TYPES."""

    def __init__(self, format: str, rate: int) -> None:
        self._format, self._file, self._container = format, io.BytesIO(), None
        if format == "wav":
            sizes = struct.pack("<IHHIIHH", 16, 1, 1, rate, 2 * rate, 2, 16)
            unknown = struct.pack("<I", _UNKNOWN)
            self._file.write(b"RIFF" + unknown + b"WAVEfmt " + sizes + b"data" + unknown)
        elif format in _FFMPEG:
            container, codec = _FFMPEG[format]
            write = _Pipe(self._file)
            self._container: Any = av.open(write, "w", format=container, options={"fflags": "+flush_packets"})
            known = av.Codec(codec, "w").audio_rates  # None: any
            self._stream: Any = self._container.add_stream(
                codec, rate=rate if not known or rate in known else _USUAL, layout="mono"
            )
            self._rate, self._at = rate, 0

    def push(self, wave: np.ndarray) -> bytes:
        """The bytes that are known by now, perhaps none."""
        if self._container is None:
            self._file.write(to_int16(wave))
        else:
            samples = np.frombuffer(to_int16(wave), np.int16)
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = self._rate, self._at
            self._at += len(samples)
            self._container.mux(self._stream.encode(frame))
        return self._taken()

    def finish(self) -> bytes:
        """The rest."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
        return self._taken()

    def _taken(self) -> bytes:
        found = self._file.getvalue()
        self._file.seek(0)
        self._file.truncate()
        return found


class _Pipe:
    """A file that can only be written, so that no format goes back to its header."""

    def __init__(self, file: io.BytesIO) -> None:
        self.write = file.write
