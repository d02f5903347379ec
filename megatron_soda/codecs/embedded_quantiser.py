"""The quantiser of the embedded codec: residual codebooks of envelope and prosody, and how they are fitted."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .features import (
    BANDS,
    F0_MAX,
    F0_MIN,
    POWER_FLOOR,
    SUBFRAMES_PER_FRAME,
    VOICING_BANDS,
    Features,
)

PREFIX = "quantiser."

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
