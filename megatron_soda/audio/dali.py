"""Decoding with NVIDIA DALI, in batches, on the CPU: `decoder="dali"`.

DALI decodes wav, flac, ogg and opus with its own build of libsndfile, faster than soundfile's. Its resampler is slower
than soxr, so it returns each file at the file's own rate and reading.py does the rest. The samples match those of
read_pieces: exactly for wav and flac, within 1e-6 for formats decoded in floating point (tests/audio/test_dali.py).

Everything else is left to read_pieces: other formats, long recordings, segments, and every file that DALI or a look at
its header finds fault with, for which read_pieces has an error message.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from ..errors import SodaError
from .containers import Container, examine
from .reading import cut, finish, is_as_long, open_decoder, read_pieces, reasons
from .sound import BadAudio, Sound
from .sound_bytes import open_sound

BATCH = 16  # files decoded at once
LONGEST = 60.0  # seconds: a whole batch is in memory
LARGEST = 1 << 25  # bytes, encoded
FORMATS = (b"RIFF", b"fLaC", b"OggS")  # the first bytes of files that DALI can decode


class DaliDecoder:
    """Decodes lists of recordings, with the arguments of read_pieces. For one thread of one process."""

    def __init__(self, sample_rate: int, samples_per_frame: int, *, piece_seconds: float = 60.0, trim: bool = False):
        self.sample_rate, self.samples_per_frame = sample_rate, samples_per_frame
        self.piece_seconds, self.trim = piece_seconds, trim
        self.pipeline: Any = None
        _dali()  # fails now rather than at the first file

    def decode(self, sounds: Sequence[Sound]) -> list[Iterator[np.ndarray]]:
        """For each recording its pieces as read_pieces yields them, float32 [samples] mono at `sample_rate` Hz.
        Iterating over those of a bad recording raises BadAudio."""
        results: list[Iterator[np.ndarray]] = []
        for start in range(0, len(sounds), BATCH):
            batch = sounds[start : start + BATCH]
            loaded = [_load(sound) for sound in batch]
            decoded = iter(self._run([data for data, _, _ in filter(None, loaded)]))
            for sound, encoded in zip(batch, loaded, strict=True):
                samples = next(decoded) if encoded else None
                if encoded is None or samples is None or len(samples) < encoded[2]:
                    shape = self.sample_rate, self.samples_per_frame
                    results.append(read_pieces(sound, *shape, piece_seconds=self.piece_seconds, trim=self.trim))
                else:
                    results.append(self._pieces(samples, encoded[1]))
        return results

    def _pieces(self, samples: np.ndarray, rate: int) -> Iterator[np.ndarray]:
        with reasons():
            blocks = finish(
                iter([samples[:, None]]),
                rate,
                self.sample_rate,
                shortest=self.samples_per_frame / self.sample_rate,
                longest=LONGEST,
                trim=self.trim,
            )
            yield from cut(blocks, self.sample_rate, self.samples_per_frame, self.piece_seconds)

    def _run(self, encoded: list[np.ndarray]) -> list[np.ndarray | None]:
        """float32 [samples] at each file's own rate; None for a file that DALI cannot decode."""
        if not encoded:
            return []
        if self.pipeline is None:
            self.pipeline = _build()
        try:
            self.pipeline.feed_input("encoded", encoded)
            (decoded,) = self.pipeline.run()
            return [np.array(decoded.at(i)).reshape(-1) for i in range(len(encoded))]
        except RuntimeError:
            self.pipeline = None  # one bad file breaks a pipeline for good (NVIDIA/DALI issue 4076)
        if len(encoded) == 1:
            return [None]
        return [self._run([one])[0] for one in encoded]


def _load(sound: Sound) -> tuple[np.ndarray, int, int] | None:
    """The encoded bytes (uint8), rate in Hz and number of samples of a recording that DALI can decode; otherwise
    None."""
    if sound.start or sound.end:
        return None
    try:
        with reasons(), ExitStack() as stack:
            file, _ = open_sound(sound, stack)
            if file.read(4) not in FORMATS or file.seek(0, 2) > LARGEST:
                return None
            container = examine(file)
            if container != Container():  # DALI trusts the header
                return None
            decoder = open_decoder(sound, file, container, stack)
            if decoder.frames > LONGEST * decoder.samplerate or decoder.channels > 2:
                return None
            if sound.seconds and not is_as_long(decoder.frames / decoder.samplerate, sound.seconds):
                return None
            file.seek(0)
            return np.frombuffer(file.read(), np.uint8), decoder.samplerate, decoder.frames
    except BadAudio:
        return None


def _dali() -> Any:
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError:
        raise SodaError(
            "decoding with DALI needs the package nvidia-dali-cuda130: pip install megatron-soda[dali] "
            "(or decode with soundfile)"
        ) from None


def _build() -> Any:
    dali, fn = _dali(), importlib.import_module("nvidia.dali.fn")
    # One thread and no prefetching: there are many processes, and batches come one at a time.
    pipeline = dali.Pipeline(
        batch_size=BATCH, num_threads=1, device_id=None, prefetch_queue_depth=1, exec_pipelined=False, exec_async=False
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.audio(encoded, dtype=dali.types.FLOAT, downmix=True)[0])
    pipeline.build()
    return pipeline
