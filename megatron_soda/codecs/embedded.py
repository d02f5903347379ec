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
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import SodaError
from ..files import atomic_path, reading
from .embedded_decoder import SHIPPED_WEIGHTS, load_decoder, read_safetensors
from .features import (
    BANDS,
    F0_MAX,
    F0_MIN,
    POWER_FLOOR,
    SAMPLE_RATE,
    SAMPLES_PER_FRAME,
    SUBFRAMES_PER_FRAME,
    VOICING_BANDS,
    Features,
    analyse,
    one_thread,
)

FORMAT = "megatron_soda embedded codec quantiser"
PREFIX = "quantiser."
VERSION = "1"  # increment it whenever encode or decode changes its result for the same tensors

# Principal components kept of the 256 envelope numbers. More would lower the error on the fitted speech, but on a
# held-out speaker 48 were better than 64 and 96: k-means cannot learn small dimensions from an hour of speech.
ENVELOPE_DIMENSIONS = 48
PROSODY_CODEBOOKS = (1, 2)  # if there are enough codebooks; see `stage_kinds`
ITERATIONS = 5  # of k-means per codebook
FRAMES_PER_ENTRY = 3  # frames of audio needed per codebook entry
SAMPLED_FRAMES = 75_000  # most frames k-means runs on, including copies
GAIN_RANGE = 1.2  # nepers, 10 dB: of the copies in `fit_quantiser`

# Distances in prosody space: log F0 matters most (5 per neper: 20 % in F0 weighs as much as a whole step from unvoiced
# to voiced in the lowest band), then voicing from the lowest band up. Plausible, not tuned.
LOG_F0_CENTRE = 5.1  # 164 Hz
PROSODY_SCALE = torch.tensor([5.0, 1.0, 0.7, 0.5, 0.3]).repeat(SUBFRAMES_PER_FRAME)


@dataclass(frozen=True)
class Quantiser:
    """Everything that is fitted on audio: float32 tensors whose values are exact in float16, so saving loses
    nothing."""

    envelope_mean: Tensor  # (256,)
    components: Tensor  # (256, dimensions): the principal components of envelopes
    prosody_mean: Tensor  # (20,) in prosody space
    envelope_codebooks: Tensor  # (stages, entries, dimensions)
    prosody_codebooks: Tensor  # (stages, entries, 20)

    @property
    def codebooks(self) -> int:
        return len(self.envelope_codebooks) + len(self.prosody_codebooks)

    @property
    def entries(self) -> int:
        return self.envelope_codebooks.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {PREFIX + name: tensor for name, tensor in vars(self).items()}

    def stages(self) -> list[tuple[str, Tensor]]:
        """Kind ("envelope" or "prosody") and codebook of every stage, in the order of the codes."""
        codebooks = {"envelope": iter(self.envelope_codebooks), "prosody": iter(self.prosody_codebooks)}
        return [(kind, next(codebooks[kind])) for kind in stage_kinds(self.codebooks)]

    def encode(self, analysed: Features) -> Tensor:
        """Features of 4n sub-frames -> codes (n, codebooks), int64."""
        envelope, prosody = to_vectors(analysed)
        residual = {
            "envelope": (envelope - self.envelope_mean) @ self.components,
            "prosody": prosody - self.prosody_mean,
        }
        codes = []
        for kind, codebook in self.stages():
            code = nearest(residual[kind], codebook)
            residual[kind] = residual[kind] - codebook[code]
            codes.append(code)
        return torch.stack(codes, 1)

    def decode(self, codes: Tensor) -> Features:
        """Codes (n, codebooks), int64 -> the features that they stand for, 4n sub-frames."""
        coded = {
            "envelope": torch.zeros(len(codes), self.components.shape[1]),
            "prosody": self.prosody_mean.expand(len(codes), -1),
        }
        for q, (kind, codebook) in enumerate(self.stages()):
            coded[kind] = coded[kind] + codebook[codes[:, q]]
        return from_vectors(coded["envelope"] @ self.components.T + self.envelope_mean, coded["prosody"])


def stage_kinds(codebooks: int) -> list[str]:
    """What each codebook codes: codebooks 1 and 2, if they exist, prosody; all others the envelope."""
    return ["prosody" if q in PROSODY_CODEBOOKS else "envelope" for q in range(codebooks)]


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
    decoder is seeded by the codes themselves.
    """

    name = "embedded"
    sample_rate = SAMPLE_RATE
    samples_per_frame = SAMPLES_PER_FRAME

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
            return [self._synthesise(c) for c in checked]

    def _synthesise(self, codes: np.ndarray) -> np.ndarray:
        if len(codes) == 0:
            return np.zeros(0, dtype=np.float32)
        coded = self.quantiser.decode(torch.from_numpy(codes.astype(np.int64)))
        generator = torch.Generator().manual_seed(zlib.crc32(np.ascontiguousarray(codes).tobytes()))
        noise = torch.randn(1, len(codes) * SAMPLES_PER_FRAME, generator=generator)
        with torch.inference_mode():
            wave = self._decoder(coded.envelope[None], coded.f0[None], coded.voicing[None], noise)[0]
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


def to_vectors(analysed: Features) -> tuple[Tensor, Tensor]:
    """Features of 4n sub-frames -> envelopes (n, 256) and prosody (n, 20), one row per frame of 80 ms."""
    log_f0 = analysed.f0.log()[:, None] - LOG_F0_CENTRE
    prosody = torch.cat([log_f0, analysed.voicing], 1).reshape(-1, SUBFRAMES_PER_FRAME * (1 + VOICING_BANDS))
    return analysed.envelope.reshape(-1, SUBFRAMES_PER_FRAME * BANDS), prosody * PROSODY_SCALE


def from_vectors(envelope: Tensor, prosody: Tensor) -> Features:
    """The inverse of `to_vectors`, with F0 and voicing brought into their ranges."""
    prosody = (prosody / PROSODY_SCALE).reshape(-1, 1 + VOICING_BANDS)
    f0 = (prosody[:, 0] + LOG_F0_CENTRE).clamp(math.log(F0_MIN), math.log(F0_MAX)).exp()
    return Features(envelope.reshape(-1, BANDS), f0, prosody[:, 1:].clamp(0.0, 1.0))


def nearest(x: Tensor, codebook: Tensor, chunk: int = 8192) -> Tensor:
    """Index of the nearest entry (Euclidean) for each row of x."""
    half_square = 0.5 * codebook.square().sum(1)
    found = [torch.addmm(half_square, rows, codebook.T, alpha=-1).argmin(1) for rows in x.split(chunk)]
    return torch.cat(found) if len(x) else torch.zeros(0, dtype=torch.long)


def fit_quantiser(
    analysed: list[Features],
    codebooks: int,
    entries: int,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Quantiser:
    """Fits the codebooks one after another, each on the residual of the ones before it."""
    generator = torch.Generator().manual_seed(seed)
    copies = [shifted_copy(f, generator) for f in analysed if len(f) > SUBFRAMES_PER_FRAME]
    envelopes, prosodies = zip(*(to_vectors(f) for f in analysed + copies), strict=True)
    envelope, prosody = torch.cat(envelopes), torch.cat(prosodies)
    if len(envelope) > SAMPLED_FRAMES:
        sample = torch.randperm(len(envelope), generator=generator)[:SAMPLED_FRAMES]
        envelope, prosody = envelope[sample], prosody[sample]

    # Loud frames count fully, pauses a tenth, because errors there are barely audible.
    level = envelope.mean(1)
    quiet, loud = level.quantile(0.02), level.quantile(0.9)
    loudness = ((level - quiet) / (loud - quiet).clamp(min=1e-6)).clamp(0.1, 1.0)
    lowest_band = prosody.reshape(-1, SUBFRAMES_PER_FRAME, 1 + VOICING_BANDS)[:, :, 1] / PROSODY_SCALE[1]
    voicedness = (loudness * lowest_band.mean(1)).clamp(0.03, 1.0)

    envelope_mean = envelope.mean(0).half().float()
    prosody_mean = prosody.mean(0).half().float()
    centred = envelope - envelope_mean
    covariance = centred.T @ (centred * loudness[:, None]) / loudness.sum()
    _, eigenvectors = torch.linalg.eigh(covariance.double())
    components = eigenvectors.flip(1)[:, :ENVELOPE_DIMENSIONS].float().half().float()

    residual = {"envelope": centred @ components, "prosody": prosody - prosody_mean}
    weight = {"envelope": loudness, "prosody": voicedness}
    fitted: dict[str, list[Tensor]] = {"envelope": [], "prosody": []}
    for q, kind in enumerate(stage_kinds(codebooks)):
        codebook, residual[kind] = fit_codebook(residual[kind], weight[kind], entries, generator)
        fitted[kind].append(codebook)
        if progress is not None:
            progress((q + 1) / codebooks)
    return Quantiser(
        envelope_mean,
        components.contiguous(),
        prosody_mean,
        torch.stack(fitted["envelope"]),
        torch.stack(fitted["prosody"]) if fitted["prosody"] else torch.zeros(0, entries, prosody.shape[1]),
    )


def shifted_copy(analysed: Features, generator: torch.Generator) -> Features:
    """Copies of an utterance, half a frame later and up to 10 dB louder or softer.

    With these copies in the fit, the codebooks also work at other levels (6 dB above the fitted speech, the held-out
    error falls by a third), at no cost at the level of the fitted speech.
    """
    gain = GAIN_RANGE * (2 * torch.rand((), generator=generator) - 1)
    half = SUBFRAMES_PER_FRAME // 2
    part = slice(half, len(analysed) - half)
    envelope = (analysed.envelope[part] + gain).clamp(min=0.5 * math.log(POWER_FLOOR))
    return Features(envelope, analysed.f0[part], analysed.voicing[part])


def fit_codebook(x: Tensor, weight: Tensor, entries: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One stage: weighted k-means and then shrinkage. Returns the codebook (entries, d) and the residual of x.

    With only tens of frames per entry, centroids are partly noise. Leave-one-out centroids (a frame's centroid without
    that frame) help in two ways: every dimension is scaled by the factor that best predicts the left-out frames, and
    the next stage is fitted on the residuals of left-out frames, which are as large as those of unseen speech. This
    lowered the held-out error by 10 to 15 %.
    """
    codebook = kmeans(x, weight, entries, generator)
    code = nearest(x, codebook)
    mass, total = _weighted_sums(x, weight, code, entries)
    mass_without = mass[code] - weight
    alone = mass_without < 1e-3
    without = (total[code] - weight[:, None] * x) / mass_without.clamp(min=1e-3)[:, None]
    without[alone] = 0.0
    predicted = (weight[:, None] * x * without).sum(0)
    shrinkage = (predicted / (weight[:, None] * without.square()).sum(0).clamp(min=1e-9)).clamp(0.0, 1.0)
    codebook = (codebook * shrinkage).half().float()
    return codebook, x - without * shrinkage


def kmeans(x: Tensor, weight: Tensor, entries: int, generator: torch.Generator) -> Tensor:
    """Weighted k-means (Lloyd) on x (n, d): centroids (entries, d). At first, rare entries are redrawn."""

    def draw(count: int) -> Tensor:
        return x[torch.multinomial(weight, count, replacement=count > len(x), generator=generator)]

    centroids = draw(entries)
    for iteration in range(ITERATIONS):
        code = nearest(x, centroids)
        mass, total = _weighted_sums(x, weight, code, entries)
        used = mass > 0
        centroids = torch.where(used[:, None], total / mass.clamp(min=1e-9)[:, None], centroids)
        rare = mass < 0.2 * weight.sum() / entries if iteration < ITERATIONS - 2 else ~used
        if rare.any():
            centroids[rare] = draw(int(rare.sum()))
    return centroids


def _weighted_sums(x: Tensor, weight: Tensor, code: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    mass = torch.zeros(entries).index_add_(0, code, weight)
    total = torch.zeros(entries, x.shape[1]).index_add_(0, code, x * weight[:, None])
    return mass, total
