"""Source-filter analysis of speech: what the embedded codec quantises.

Speech is modelled as an excitation (pulses at F0 plus noise) through a slowly changing filter. Every 20 ms we measure
* the envelope: the filter, as 64 log-mel amplitudes from which the harmonics of F0 have been smoothed away,
* F0 in Hz, tracked by the Viterbi algorithm over normalised autocorrelations, and
* the voicing: in four frequency bands, which share of the power is periodic at F0.

Sources of the ideas: pitch-adaptive envelope smoothing and band aperiodicity as in WORLD (Morise, Yokomori and Ozawa,
2016); autocorrelation divided by that of the window as in Boersma (1993); dynamic programming over pitch candidates as
in RAPT (Talkin, 1995).
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

SAMPLE_RATE = 24_000  # Hz
SUBFRAME = 480  # samples: the features come every 20 ms
SUBFRAMES_PER_FRAME = 4
SAMPLES_PER_FRAME = SUBFRAME * SUBFRAMES_PER_FRAME  # 1920 samples = 80 ms, 12.5 frames/s as in Mimi

BANDS = 64
F0_MIN, F0_MAX = 62.0, 420.0  # Hz
VOICING_EDGES = (0.0, 1200.0, 3000.0, 6000.0, 12000.0)  # Hz
VOICING_BANDS = len(VOICING_EDGES) - 1

WINDOW = 1024  # samples (43 ms): more than two periods at F0_MIN
FFT_SIZE = 2048  # twice the window, so that the autocorrelation is linear and not circular
CANDIDATES = 120  # F0 candidates, evenly spaced in log F0
CHUNK = 3000  # sub-frames analysed at once: bounds the memory on long recordings (one minute here)

VOICED_THRESHOLD = 0.3  # normalised autocorrelation above which a sub-frame counts as voiced
UNVOICED_SMOOTHING = 150.0  # Hz: width of the smoothing where there is no F0
POWER_FLOOR = 1e-4  # about 65 dB under a full-scale sine; nothing below it is coded


@dataclass(frozen=True)
class Features:
    """The source-filter description of one utterance of `n` sub-frames (20 ms each)."""

    envelope: Tensor  # (n, BANDS): natural log of the amplitude spectrum, in units of the Hann-windowed DFT
    f0: Tensor  # (n,) Hz, interpolated through unvoiced stretches
    voicing: Tensor  # (n, VOICING_BANDS): periodic share of the power, 0 to 1

    def __len__(self) -> int:
        return len(self.f0)


def hz_to_mel(hz: np.ndarray | float) -> np.ndarray:
    return 2595 * np.log10(1 + np.asarray(hz) / 700)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return 700 * (10 ** (mel / 2595) - 1)


def mel_centres(bands: int) -> np.ndarray:
    """Centre frequencies in Hz of `bands` mel filters between 0 Hz and the Nyquist frequency."""
    return mel_to_hz(np.linspace(0.0, hz_to_mel(SAMPLE_RATE / 2), bands + 2))[1:-1]


def mel_filterbank(fft_size: int, bands: int) -> Tensor:
    """Triangular filters that each sum to one: (bands, fft_size // 2 + 1)."""
    edges = mel_to_hz(np.linspace(0.0, hz_to_mel(SAMPLE_RATE / 2), bands + 2))
    frequencies = np.arange(fft_size // 2 + 1) * SAMPLE_RATE / fft_size
    width = np.diff(edges)
    offset = edges[:, None] - frequencies[None]
    weights = np.maximum(0, np.minimum(-offset[:-2] / width[:-1, None], offset[2:] / width[1:, None]))
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return torch.tensor(weights, dtype=torch.float32)


_HANN = torch.hann_window(WINDOW)
_FREQUENCIES = torch.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE
_MEL = mel_filterbank(FFT_SIZE, BANDS)
_CANDIDATE_F0 = torch.exp(torch.linspace(math.log(F0_MAX), math.log(F0_MIN), CANDIDATES))
_window_autocorrelation = torch.fft.irfft(torch.fft.rfft(F.pad(_HANN, (0, FFT_SIZE - WINDOW))).abs() ** 2)
_WINDOW_AUTOCORRELATION = _window_autocorrelation / _window_autocorrelation[0]
# F0 is looked for below about 2.5 kHz, where the harmonics are strong, and above mains hum.
_F0_WEIGHT = ((_FREQUENCIES > 50) & (_FREQUENCIES < 2500)).float() * torch.exp(-((_FREQUENCIES / 1800) ** 2))


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread, so that the result is the same whatever the number of threads.

    For operations as short as here a second thread gains little anyway, and where other work shares the cores the
    threads wait for each other so long that everything is many times slower.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def analyse(waves: list[Tensor], progress: Callable[[float], None] | None = None) -> list[Features]:
    """Mono float32 waves at 24 kHz -> features, 4 * ceil(samples / 1920) sub-frames each.

    Each wave is measured on its own; only the Viterbi recursion, which is exact, runs on several waves at once. So the
    features of a wave do not depend on what else is in the list.
    """
    with one_thread():
        return _analyse(waves, progress)


def _analyse(waves: list[Tensor], progress: Callable[[float], None] | None) -> list[Features]:
    features: list[Features | None] = [None] * len(waves)
    by_length = sorted(range(len(waves)), key=lambda i: len(waves[i]))
    done, total = 0, max(1, sum(len(w) for w in waves))
    for group in _groups(by_length, waves):
        periodicities = [_periodicity(waves[i]) for i in group]
        for i, periodicity, path in zip(group, periodicities, viterbi(periodicities), strict=True):
            features[i] = _features_on_path(waves[i], periodicity, path)
            done += len(waves[i])
        if progress is not None:
            progress(done / total)
    return [f for f in features if f is not None]


def _groups(order: list[int], waves: list[Tensor], limit: int = 16) -> list[list[int]]:
    """Splits the waves, sorted by length, into groups for the Viterbi recursion. Long recordings go alone."""
    groups: list[list[int]] = []
    for i in order:
        if groups and len(groups[-1]) < limit and len(waves[i]) < 60 * SAMPLE_RATE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _power_chunks(wave: Tensor) -> list[Tensor]:
    """Power spectra (sub-frames, FFT_SIZE // 2 + 1) in chunks; sub-frame t is centred on its 480 samples."""
    if len(wave) == 0:
        return []
    subframes = SUBFRAMES_PER_FRAME * math.ceil(len(wave) / SAMPLES_PER_FRAME)
    margin = (WINDOW - SUBFRAME) // 2
    padded = F.pad(wave, (margin, subframes * SUBFRAME - len(wave) + margin))
    frames = padded.unfold(0, WINDOW, SUBFRAME)
    return [torch.fft.rfft(chunk * _HANN, n=FFT_SIZE).abs().square() for chunk in frames.split(CHUNK)]


def _periodicity(wave: Tensor) -> Tensor:
    """Normalised autocorrelation at every F0 candidate: (sub-frames, CANDIDATES)."""
    lags = SAMPLE_RATE / _CANDIDATE_F0
    low = lags.long()
    fraction = lags - low

    def at_lags(r: Tensor) -> Tensor:
        return r[:, low] * (1 - fraction) + r[:, low + 1] * fraction

    chunks = [torch.zeros(0, CANDIDATES)]
    for power in _power_chunks(wave):
        r = torch.fft.irfft(power * _F0_WEIGHT)
        # The small constant makes digital silence unperiodic.
        normalised = at_lags(r) / (r[:, :1] + 1e-3) / at_lags(_WINDOW_AUTOCORRELATION[None])
        chunks.append(normalised.clamp(-1.0, 1.0))
    return torch.cat(chunks)


def viterbi(
    periodicities: list[Tensor], *, reach: int = 12, glide_cost: float = 60.0, jump_cost: float = 0.5
) -> list[Tensor]:
    """The best F0 path through each (sub-frames, CANDIDATES) table of scores, as candidate indices (sub-frames,).

    A step of d in log F0 costs glide_cost * d^2 within `reach` candidates; any other jump costs `jump_cost`. Low F0
    pays a little, for a multiple of the period is as periodic as the period itself. The tables run together, padded to
    the longest; each one's path is traced back from its own last sub-frame, so the padding has no influence.
    """
    lengths = [len(p) for p in periodicities]
    longest = max(lengths, default=0)
    if longest == 0:
        return [torch.zeros(0, dtype=torch.long) for _ in periodicities]
    octave_bias = -0.05 * torch.linspace(0, 1, CANDIDATES)
    scores = torch.stack([F.pad(p + octave_bias, (0, 0, 0, longest - len(p))) for p in periodicities], 1)
    step = math.log(F0_MAX / F0_MIN) / (CANDIDATES - 1)
    cost = glide_cost * (torch.arange(-reach, reach + 1) * step).square()
    candidates = torch.arange(CANDIDATES)

    best = scores[0]
    came_from = torch.zeros(scores.shape, dtype=torch.int16)
    last = torch.zeros(scores.shape[:2], dtype=torch.long)  # the best last candidate, had the utterance ended here
    for t in range(longest):
        top, top_candidate = best.max(-1, keepdim=True)
        if t > 0:
            nearby = F.pad(best, (reach, reach), value=-1e9).unfold(1, 2 * reach + 1, 1) - cost
            glide, offset = nearby.max(-1)
            jumps = top - jump_cost > glide
            came_from[t] = torch.where(jumps, top_candidate, offset + candidates - reach).to(torch.int16)
            best = torch.where(jumps, top - jump_cost, glide) + scores[t]
            top_candidate = best.argmax(-1, keepdim=True)
        last[t] = top_candidate[:, 0]

    paths = []
    origin, ends = came_from.numpy(), last.numpy()
    for b, n in enumerate(lengths):
        path = np.zeros(n, dtype=np.int64)
        if n:
            path[-1] = ends[n - 1, b]
        for t in range(n - 1, 0, -1):
            path[t - 1] = origin[t, b, path[t]]
        paths.append(torch.from_numpy(path))
    return paths


def _features_on_path(wave: Tensor, periodicity: Tensor, path: Tensor) -> Features:
    f0 = _CANDIDATE_F0[path]
    voiced = periodicity.gather(1, path[:, None])[:, 0] > VOICED_THRESHOLD
    envelopes, voicings = [torch.zeros(0, BANDS)], [torch.zeros(0, VOICING_BANDS)]
    for power, f0_chunk, voiced_chunk in zip(_power_chunks(wave), f0.split(CHUNK), voiced.split(CHUNK), strict=False):
        voicings.append(_band_voicing(power, f0_chunk) * voiced_chunk[:, None])
        width = torch.where(voiced_chunk, f0_chunk, UNVOICED_SMOOTHING)
        mel_power = smooth_spectrum(power, width) @ _MEL.T
        envelopes.append(0.5 * torch.log(mel_power.clamp(min=POWER_FLOOR)))
    return Features(torch.cat(envelopes), _through_unvoiced(f0, voiced), torch.cat(voicings))


def _band_voicing(power: Tensor, f0: Tensor) -> Tensor:
    """Autocorrelation at the lag 1 / F0 of each band's signal: its power spectrum against a cosine of period F0."""
    cosine = power * torch.cos(2 * math.pi * _FREQUENCIES / f0[:, None])
    window = _WINDOW_AUTOCORRELATION[(SAMPLE_RATE / f0).long()]
    bands = []
    for low, high in itertools.pairwise(VOICING_EDGES):
        inside = (low <= _FREQUENCIES) & (_FREQUENCIES < high)  # noqa: SIM300
        bands.append(cosine[:, inside].sum(1) / (power[:, inside].sum(1) + 1e-4) / window)
    return torch.stack(bands, 1).clamp(0.0, 1.0)


def smooth_spectrum(power: Tensor, width: Tensor) -> Tensor:
    """Moving average of power spectra (n, bins) over `width` (n,) Hz.

    A width of F0 covers exactly one harmonic wherever it lies, so the ripple of the harmonics goes and the filter
    stays. The spectrum is mirrored at both ends; fractional widths come from interpolating the running sum.
    """
    mirror = 160
    mirrored = torch.cat([power[:, 1:mirror].flip(1), power, power[:, -mirror:-1].flip(1)], 1)
    running_sum = F.pad(mirrored.double().cumsum(1), (1, 0))
    half = width.double()[:, None] * (FFT_SIZE / SAMPLE_RATE) / 2
    centre = torch.arange(power.shape[1], dtype=torch.float64) + mirror - 0.5

    def sum_up_to(position: Tensor) -> Tensor:
        position = position.clamp(0, running_sum.shape[1] - 2)
        low = position.long()
        fraction = position - low
        return running_sum.gather(1, low) * (1 - fraction) + running_sum.gather(1, low + 1) * fraction

    return ((sum_up_to(centre + half) - sum_up_to(centre - half)) / (2 * half)).float()


def _through_unvoiced(f0: Tensor, voiced: Tensor) -> Tensor:
    """Replaces F0 in unvoiced sub-frames by a straight line in log F0 between the voiced neighbours."""
    if not voiced.any():
        return torch.full_like(f0, UNVOICED_SMOOTHING)
    where = np.flatnonzero(voiced.numpy())
    log_f0 = np.log(f0.numpy())
    filled = np.interp(np.arange(len(log_f0)), where, log_f0[where])
    return torch.from_numpy(np.exp(filled).astype(np.float32))
