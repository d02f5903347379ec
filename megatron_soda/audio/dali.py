"""Decoding with NVIDIA DALI, in batches: `prepare.decoder=dali` and `dali_gpu`.

DALI decodes wav, flac, ogg and opus on the CPU, with its own build of libsndfile, faster than soundfile's. The samples
match those of read_pieces: exactly for wav and flac, within 1e-6 for formats decoded in floating point
(tests/audio/test_dali.py).

Its resampler is slower than soxr on a CPU, so `dali` takes each file at its own rate and leaves the rest to reading.py.
`dali_gpu` resamples on the device. That resampler does not filter out what the lower rate cannot hold (a tone of 14 kHz
at 48 kHz comes out at 10 kHz, as loud as it was), so a filter goes before it. The result has as many samples as soxr's.
It differs from it by -63 dB or less up to 0.9 times what both rates can hold (noise; telephone prompts: -74 dB); above,
soxr fades out earlier, which makes -40 dB of the whole for prompts at 16 kHz.

Everything else is left to read_pieces: other formats, long recordings, segments, and every file that DALI or a look at
its header finds fault with, for which read_pieces has an error message.
"""

import importlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import lru_cache
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
QUALITY = 100.0  # of DALI's resampler: 64 zero crossings of the sinc. With 50 (16 of them) 0.9 Nyquist is at -45 dB
CROSSINGS = 64  # of the low-pass filter's sinc, at the lower rate
BETA = 10.0  # of its Kaiser window: -100 dB from Nyquist on, flat up to 0.9 Nyquist


class DaliDecoder:
    """Decodes lists of recordings, with the arguments of read_pieces, in so many threads of DALI. `resample_on` is the
    torch device where DALI resamples; empty: soxr does. For one thread at a time."""

    def __init__(
        self,
        sample_rate: int,
        samples_per_frame: int,
        *,
        piece_seconds: float = 60.0,
        trim: bool = False,
        threads: int = 1,
        resample_on: str = "",
    ):
        self.sample_rate, self.samples_per_frame = sample_rate, samples_per_frame
        self.piece_seconds, self.trim, self.threads = piece_seconds, trim, threads
        self.pipeline: Any = None
        package()  # fails now rather than at the first file
        self.resampler = Resampler(sample_rate, resample_on) if resample_on else None

    def decode(self, sounds: Sequence[Sound]) -> list[Iterator[np.ndarray]]:
        """For each recording its pieces as read_pieces yields them, float32 [samples] mono at `sample_rate` Hz.
        Iterating over those of a bad recording raises BadAudio."""
        results: list[Iterator[np.ndarray]] = []
        for start in range(0, len(sounds), BATCH):
            batch = sounds[start : start + BATCH]
            loaded = [_load(sound) for sound in batch]
            decoded = iter(self._run([data for data, _, _ in filter(None, loaded)]))
            waves: dict[int, tuple[np.ndarray, int]] = {}  # at the file's rate
            for i, encoded in enumerate(loaded):
                samples = next(decoded) if encoded else None
                if encoded and samples is not None and len(samples) >= encoded[2]:
                    waves[i] = samples, encoded[1]
            resampled = self._resample(waves)
            for i, sound in enumerate(batch):
                if i in waves:
                    results.append(self._pieces(*waves[i], resampled.get(i)))
                else:
                    shape = self.sample_rate, self.samples_per_frame
                    results.append(read_pieces(sound, *shape, piece_seconds=self.piece_seconds, trim=self.trim))
        return results

    def _resample(self, waves: dict[int, tuple[np.ndarray, int]]) -> dict[int, np.ndarray]:
        """Those that DALI is to resample."""
        due = [i for i, (samples, rate) in waves.items() if len(samples) and rate != self.sample_rate]
        if not self.resampler or not due:
            return {}
        resampled = self.resampler([waves[i][0] for i in due], [waves[i][1] for i in due])
        return dict(zip(due, resampled, strict=True))

    def _pieces(self, samples: np.ndarray, rate: int, resampled: np.ndarray | None) -> Iterator[np.ndarray]:
        with reasons():
            blocks = finish(
                iter([samples[:, None]]),
                rate,
                self.sample_rate,
                shortest=self.samples_per_frame / self.sample_rate,
                longest=LONGEST,
                trim=self.trim,
                resampled=resampled,
            )
            yield from cut(blocks, self.sample_rate, self.samples_per_frame, self.piece_seconds)

    def _run(self, encoded: list[np.ndarray]) -> list[np.ndarray | None]:
        """float32 [samples] at each file's own rate; None for a file that DALI cannot decode."""
        if not encoded:
            return []
        if self.pipeline is None:
            self.pipeline = _build(self.threads)
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


class Resampler:
    """Resamples at most BATCH mono waves at once, on a torch device."""

    def __init__(self, sample_rate: int, device: str):
        self.sample_rate, self.device = sample_rate, device
        self.pipeline: Any = None

    def __call__(self, waves: Sequence[np.ndarray], rates: Sequence[int]) -> list[np.ndarray]:
        """float32 [samples] at `sample_rate` Hz, of waves at these rates."""
        try:
            if self.pipeline is None:
                self.pipeline = self._build()
            self.pipeline.feed_input("waves", [wave[None] for wave in waves])
            self.pipeline.feed_input("filters", [_low_pass(rate, self.sample_rate) for rate in rates])
            self.pipeline.feed_input("rates", [np.float32(rate) for rate in rates])
            (resampled,) = self.pipeline.run()
            resampled = resampled.as_cpu()
        except RuntimeError as error:  # not a file's fault: these waves are numbers of any value
            self.pipeline = None
            raise SodaError(
                f"DALI cannot resample on {self.device}: {str(error).strip() or 'no reason given'}\n"
                "(prepare.decoder=dali resamples on the CPU)"
            ) from error
        lengths = [resampled_length(len(wave), rate, self.sample_rate) for wave, rate in zip(waves, rates, strict=True)]
        return [np.array(resampled.at(i))[:length] for i, length in enumerate(lengths)]

    def _build(self) -> Any:
        dali, fn = package(), importlib.import_module("nvidia.dali.fn")
        kind, _, number = self.device.partition(":")
        gpu = kind == "cuda"
        pipeline = dali.Pipeline(
            batch_size=BATCH, num_threads=1, device_id=int(number or 0) if gpu else None, prefetch_queue_depth=1
        )
        with pipeline:
            waves = fn.external_source(name="waves", dtype=dali.types.FLOAT, ndim=2)
            filters = fn.external_source(name="filters", dtype=dali.types.FLOAT, ndim=2)
            rates = fn.external_source(name="rates", dtype=dali.types.FLOAT, ndim=0)
            if gpu:
                waves, filters = waves.gpu(), filters.gpu()
            filtered = fn.reshape(fn.filter(waves, filters, border="constant"), shape=[-1])
            pipeline.set_outputs(
                fn.audio_resample(filtered, in_rate=rates, out_rate=float(self.sample_rate), quality=QUALITY)
            )
        pipeline.build()
        return pipeline


def resampled_length(samples: int, rate: int, sample_rate: int) -> int:
    """soxr's: rounded. DALI rounds up."""
    return (2 * samples * sample_rate + rate) // (2 * rate)


@lru_cache(maxsize=32)
def _low_pass(rate: int, sample_rate: int) -> np.ndarray:
    """The filter, float32 [1, taps], that a wave at `rate` Hz needs before it is resampled; [[1]] if none."""
    if rate <= sample_rate:
        return np.ones((1, 1), np.float32)
    half = CROSSINGS * rate // sample_rate
    cutoff = 0.95 * sample_rate / rate  # of what `rate` can hold: the middle of the fading band
    taps = np.sinc(cutoff * np.arange(-half, half + 1)) * np.kaiser(2 * half + 1, BETA)
    return (taps / taps.sum()).astype(np.float32)[None]


def package() -> Any:
    """Raises SodaError if it is not installed."""
    try:
        return importlib.import_module("nvidia.dali")
    except ImportError:
        raise SodaError(
            "decoding with DALI needs the package nvidia-dali-cuda130: pip install megatron-soda[dali] "
            "(or decode with soundfile)"
        ) from None


def _build(threads: int) -> Any:
    dali, fn = package(), importlib.import_module("nvidia.dali.fn")
    pipeline = dali.Pipeline(  # no prefetching: batches come one at a time
        batch_size=BATCH,
        num_threads=threads,
        device_id=None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
    )
    with pipeline:
        encoded = fn.external_source(name="encoded", dtype=dali.types.UINT8, ndim=1)
        pipeline.set_outputs(fn.decoders.audio(encoded, dtype=dali.types.FLOAT, downmix=True)[0])
    pipeline.build()
    return pipeline
