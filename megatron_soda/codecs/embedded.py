"""The embedded codec: a source-filter residual quantiser with Mimi's token shape that needs no download.

A frame of 80 ms holds four sub-frames of `Features`. Its envelope (4 x 64 numbers, reduced by PCA) and its
prosody (4 x (log F0 + 4 voicings)) are quantised by residual k-means codebooks (Gersho and Gray, "Vector Quantization
and Signal Compression", 1992, multistage VQ; Zeghidour et al., "SoundStream", 2021, call it RVQ). Codebook 0 codes the
envelope without any pitch, so it is the most phonetic one; codebooks 1 and 2 code prosody; the others code what
is left of the envelope. `embedded_decoder` turns the features back into sound.
"""

import dataclasses
import hashlib
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import SodaError
from ..files import atomic_path, reading
from .embedded_decoder import SHIPPED_WEIGHTS, load_decoder, pulse_train, read_safetensors
from .embedded_quantiser import (
    FRAMES_PER_ENTRY,
    PREFIX,
    PROSODY_SCALE,
    Quantiser,
    fit_quantiser,
    stage_kinds,
)
from .features import (
    BANDS,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    SUBFRAMES_PER_FRAME,
    analyse,
    one_thread,
)

FORMAT = "megatron_soda embedded codec quantiser"
VERSION = "1"  # increment it whenever encode or decode changes its result for the same tensors, but for decode's noise
# Frames on either side that a frame's sound depends on: 20 sub-frames through network and transform.
CONTEXT = 5


def load_quantiser(path: Path) -> Quantiser:
    """Reads a quantiser that `EmbeddedCodec.save` wrote, or the shipped one."""
    tensors, metadata = read_safetensors(path)
    names = [field.name for field in dataclasses.fields(Quantiser)]
    if metadata.get("format") != FORMAT or any(PREFIX + name not in tensors for name in names):
        raise SodaError(f"{path}: not a quantiser of the embedded codec. Fit a new one, or omit the path.")
    if metadata.get("version") != VERSION:
        raise SodaError(
            f"{path}: a quantiser of version {metadata.get('version')}, but this program has version {VERSION}, whose "
            "codes differ. Fit it again and encode the audio again."
        )
    quantiser = Quantiser(**{name: tensors[PREFIX + name].float() for name in names})
    with reading(path, "not a whole quantiser of the embedded codec"):
        _check_shapes(quantiser)
    return quantiser


def _check_shapes(q: Quantiser) -> None:
    """Raises ValueError unless the tensors fit together."""
    envelope, prosody = SUBFRAMES_PER_FRAME * BANDS, len(PROSODY_SCALE)
    stages, entries, dimensions = q.envelope_codebooks.shape
    wanted = [(envelope,), (envelope, dimensions), (prosody,), (stages, entries, dimensions)]
    wanted.append((stage_kinds(q.codebooks).count("prosody"), entries, prosody))
    for (name, tensor), shape in zip(vars(q).items(), wanted, strict=True):
        if tuple(tensor.shape) != shape or not tensor.isfinite().all():
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {shape}, or is not finite")
    if not (stages and 2 <= entries <= 32767):
        raise ValueError(f"{stages} codebooks of {entries} entries")


class EmbeddedCodec:
    """A `Codec` with a quantiser fitted on the user's speech (or the shipped one) and the shipped decoder.

    Attributes are those of `Codec`. Encoding and decoding are deterministic: k-means is seeded, and the noise in the
    decoder is seeded by the codes of the first frame, so that it is known before the last.
    """

    name = "embedded"
    sample_rate = SAMPLE_RATE
    samples_per_frame = SAMPLES_PER_FRAME
    lookahead: int | None = CONTEXT

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser
        self.codebooks = quantiser.codebooks
        self.entries = quantiser.entries
        self._decoder = load_decoder()
        self.fingerprint = fingerprint({**quantiser.tensors(), **self._decoder.state_dict()})

    @classmethod
    def fit(
        cls,
        waves: list[np.ndarray],
        *,
        codebooks: int = 8,
        entries: int = 2048,
        seed: int = 0,
        progress: Callable[[float, str], None] | None = None,
    ) -> "EmbeddedCodec":
        """Fits the quantiser on mono float32 waves at 24 kHz; about 80 s per hour of speech on two cores.

        Args:
            waves: at least `FRAMES_PER_ENTRY * entries` frames of 80 ms in all.
            codebooks: how many codes a frame has.
            entries: how many values each code can take.
            seed: of k-means.
            progress: called with the share done (0 to 1) and what is being done.
        """
        report = progress or (lambda share, text: None)
        if codebooks < 1 or not 2 <= entries <= 32767:
            raise SodaError(
                f"embedded codec: {codebooks} codebooks of {entries} entries: at least 1 codebook and 2 to 32767 "
                "entries are possible (codes are 16-bit integers)."
            )
        frames = sum(math.ceil(len(w) / SAMPLES_PER_FRAME) for w in waves)
        if frames < FRAMES_PER_ENTRY * entries:
            seconds = SAMPLES_PER_FRAME / SAMPLE_RATE
            raise SodaError(
                f"embedded codec: {frames * seconds:.0f} s of audio are too few to fit codebooks of {entries} entries; "
                f"at least {FRAMES_PER_ENTRY * entries * seconds:.0f} s are needed. Add audio, ask for at most "
                f"{frames // FRAMES_PER_ENTRY} entries, or use the shipped quantiser, which needs no fit."
            )
        report(0.0, "analysing speech")
        tensors = [_as_tensor(w, f"wave {i}") for i, w in enumerate(waves)]
        analysed = analyse(tensors, progress=lambda share: report(0.35 * share, "analysing speech"))
        quantiser = fit_quantiser(
            analysed, codebooks, entries, seed, lambda share: report(0.35 + 0.65 * share, "fitting codebooks")
        )
        return cls(quantiser)

    def save(self, path: str | Path) -> None:
        """Writes the quantiser as one .safetensors file; the decoder stays the shipped one."""
        tensors = {name: tensor.half().contiguous() for name, tensor in self.quantiser.tensors().items()}
        with atomic_path(path) as temporary:
            temporary.write_bytes(safetensors.torch.save(tensors, {"format": FORMAT, "version": VERSION}))

    @classmethod
    def load(cls, path: str | Path | None = None) -> "EmbeddedCodec":
        """Reads what `save` wrote; without a path the shipped quantiser."""
        return cls(load_quantiser(Path(path) if path is not None else SHIPPED_WEIGHTS))

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Mono float32 waves in [-1, 1] at 24 kHz -> int16 codes (frames, codebooks), frames = ceil(samples / 1920)."""
        tensors = [_as_tensor(wave, f"wave {i}") for i, wave in enumerate(waves)]
        with one_thread():
            return [self.quantiser.encode(f).to(torch.int16).numpy() for f in analyse(tensors)]

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Codes (frames, codebooks) -> mono float32 waves of 1920 * frames samples at 24 kHz."""
        checked = [self._checked(c, i) for i, c in enumerate(codes)]
        with one_thread():
            return [self._synthesise(c, 0, len(c)) for c in checked]

    def decode_part(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
        """The samples of frames [first, end) of what `decode` makes of one wave's codes, up to rounding."""
        with one_thread():
            return self._synthesise(self._checked(codes, 0), first, end)

    def _synthesise(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
        if first >= end:
            return np.zeros(0, dtype=np.float32)
        low, high = max(0, first - CONTEXT), min(len(codes), end + CONTEXT)
        coded = self.quantiser.decode(torch.from_numpy(codes.astype(np.int64)))
        seed = zlib.crc32(codes[0].tobytes())
        noise = torch.cat([_noise(seed + i) for i in range(low, high)])
        # The pulses' phase is a sum from the start.
        pulses = pulse_train(coded.f0[None], len(codes) * SAMPLES_PER_FRAME)
        pulses = pulses[:, low * SAMPLES_PER_FRAME : high * SAMPLES_PER_FRAME]
        some = slice(low * SUBFRAMES_PER_FRAME, high * SUBFRAMES_PER_FRAME)
        envelope, f0, voicing = (part[None, some] for part in (coded.envelope, coded.f0, coded.voicing))
        with torch.inference_mode():
            wave = self._decoder.filter(envelope, f0, voicing, pulses, noise[None])[0]
        wave = wave[(first - low) * SAMPLES_PER_FRAME : (end - low) * SAMPLES_PER_FRAME]
        return wave.clamp(-1.0, 1.0).numpy()

    def _checked(self, codes: np.ndarray, i: int) -> np.ndarray:
        codes = np.asarray(codes)
        if codes.ndim != 2 or codes.shape[1] != self.codebooks or not np.issubdtype(codes.dtype, np.integer):
            raise SodaError(
                f"embedded codec: codes {i} have shape {codes.shape} and type {codes.dtype}; "
                f"(frames, {self.codebooks}) integers are needed."
            )
        if codes.size and not (codes.min() >= 0 and codes.max() < self.entries):
            raise SodaError(
                f"embedded codec: codes {i} range from {codes.min()} to {codes.max()}; "
                f"this codec has codes 0 to {self.entries - 1}."
            )
        return codes.astype(np.int16)


def _noise(seed: int) -> Tensor:
    """Standard normal samples of one frame."""
    return torch.randn(SAMPLES_PER_FRAME, generator=torch.Generator().manual_seed(seed))


def _as_tensor(wave: np.ndarray, what: str) -> Tensor:
    """Checks a wave and clips it to [-1, 1], as writing a sound file would."""
    wave = np.asarray(wave)
    if wave.ndim != 1 or not np.issubdtype(wave.dtype, np.floating):
        raise SodaError(
            f"embedded codec: {what} has shape {wave.shape} and type {wave.dtype}; mono float32 samples in [-1, 1] at "
            f"{SAMPLE_RATE} Hz are needed."
        )
    if not np.isfinite(wave).all():
        bad = int(np.flatnonzero(~np.isfinite(wave))[0])
        raise SodaError(f"embedded codec: {what} is not a finite number at sample {bad}. Repair or leave out the file.")
    return torch.from_numpy(np.clip(wave, -1.0, 1.0).astype(np.float32))


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """16 hex digits that change with any tensor and with the version of encode and decode."""
    digest = hashlib.sha256(f"{FORMAT} {VERSION}".encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].half().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
