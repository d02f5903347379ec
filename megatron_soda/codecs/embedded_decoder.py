"""The embedded codec's decoder: a pulse train and noise through filters whose gains a small ConvNeXt refines.

The signal model is harmonic plus noise (Serra and Smith, 1990): S = H_h * pulses(F0) + H_n * noise, filtered in the
short-time Fourier domain. The decoded envelope and voicing give first gains; a network of ConvNeXt blocks (Liu et al.,
2022; for vocoders Siuzdak, "Vocos", 2023) adds corrections in log amplitude. As the phases come from the excitation, a
spectral loss suffices to train it and an untrained network already speaks: its corrections start at zero.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors import safe_open
from torch import Tensor, nn

from ..files import reading
from .features import (
    BANDS,
    SAMPLE_RATE,
    SUBFRAME,
    VOICING_BANDS,
    VOICING_EDGES,
    WINDOW,
    hz_to_mel,
    mel_centres,
)

SHIPPED_WEIGHTS = Path(__file__).with_name("embedded.safetensors")
PREFIX = "decoder."  # prefix of its tensors in that file, which also holds a quantiser

FFT_SIZE = 1024
HOP = 240  # samples: the filters change every 10 ms, two steps per sub-frame
CORRECTION_BANDS = 96
PULSE_LIMIT = 11_800.0  # Hz: no harmonics above this, so that the pulses do not alias
LOG_GAIN_LIMITS = (-12.0, 4.0)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int, kernel: int = 7) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels)
        self.expand = nn.Linear(channels, 3 * channels)
        self.contract = nn.Linear(3 * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), 0.3))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, time) -> the same shape"""
        y = self.norm(self.depthwise(x).transpose(1, 2))
        y = self.scale * self.contract(F.gelu(self.expand(y)))
        return x + y.transpose(1, 2)


class FilterGainDecoder(nn.Module):
    """Features (batch, sub-frames, ...) -> waves (batch, 480 * sub-frames) at 24 kHz. 1.5 M parameters."""

    bands_to_bins: Tensor
    voicing_to_bins: Tensor
    corrections_to_bins: Tensor
    window: Tensor

    def __init__(self, channels: int = 192, blocks: int = 5, blocks_after_upsampling: int = 1) -> None:
        super().__init__()
        self.input = nn.Conv1d(BANDS + 1 + VOICING_BANDS, channels, 5, padding=2)
        self.blocks = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(blocks)))
        self.upsample = nn.ConvTranspose1d(channels, channels, 2, stride=2)
        self.blocks_after_upsampling = nn.Sequential(*(ConvNeXtBlock(channels) for _ in range(blocks_after_upsampling)))
        self.output = nn.Linear(channels, 2 * CORRECTION_BANDS)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

        frequencies = np.arange(FFT_SIZE // 2 + 1) * SAMPLE_RATE / FFT_SIZE
        correction_centres = np.linspace(0.0, hz_to_mel(SAMPLE_RATE / 2), CORRECTION_BANDS)
        voicing_centres = (np.array(VOICING_EDGES[:-1]) + np.array(VOICING_EDGES[1:])) / 2
        # Constants, not weights: they turn values per band into values per bin by linear interpolation.
        self.register_buffer("bands_to_bins", interpolation(mel_centres(BANDS), frequencies), persistent=False)
        self.register_buffer("voicing_to_bins", interpolation(voicing_centres, frequencies), persistent=False)
        self.register_buffer(
            "corrections_to_bins", interpolation(correction_centres, hz_to_mel(frequencies)), persistent=False
        )
        self.register_buffer("window", torch.hann_window(FFT_SIZE), persistent=False)
        # The envelope is in units of a Hann-windowed DFT; both excitations have a flat spectrum of power one.
        self.envelope_unit = -0.5 * math.log(float(torch.hann_window(WINDOW).square().sum()))

    def forward(
        self, envelope: Tensor, f0: Tensor, voicing: Tensor, noise: Tensor, pulse_f0: Tensor | None = None
    ) -> Tensor:
        """Synthesises waves.

        Args:
            envelope: (batch, n, BANDS) log amplitudes.
            f0: (batch, n) Hz.
            voicing: (batch, n, VOICING_BANDS), 0 to 1.
            noise: (batch, 480 * n) standard normal samples, the aperiodic excitation.
            pulse_f0: (batch, n) Hz, what the pulses follow if not `f0`: in training the exact F0, so that harmonics
                lie where the target has them while the network sees what it will get from the codes.
        """
        pulses = pulse_train(f0 if pulse_f0 is None else pulse_f0, f0.shape[1] * SUBFRAME)
        return self.filter(envelope, f0, voicing, pulses, noise)

    def filter(self, envelope: Tensor, f0: Tensor, voicing: Tensor, pulses: Tensor, noise: Tensor) -> Tensor:
        """`forward` with its periodic excitation given: pulses (batch, 480 * n)."""
        inputs = torch.cat([0.3 * envelope, (f0.log() - 5.1)[..., None], voicing], 2).transpose(1, 2)
        hidden = self.blocks_after_upsampling(self.upsample(self.blocks(self.input(inputs))))
        harmonic, aperiodic = self.output(hidden.transpose(1, 2)).split(CORRECTION_BANDS, 2)

        envelope_bins = twice_as_often(envelope) @ self.bands_to_bins + self.envelope_unit
        periodic_share = (twice_as_often(voicing) @ self.voicing_to_bins).clamp(0.02, 0.98)
        harmonic_gain = envelope_bins + 0.5 * periodic_share.log() + harmonic @ self.corrections_to_bins
        noise_gain = envelope_bins + 0.5 * (1 - periodic_share).log() + aperiodic @ self.corrections_to_bins

        spectrum = self._amplitude(harmonic_gain) * self._stft(pulses) + self._amplitude(noise_gain) * self._stft(noise)
        return torch.istft(spectrum, FFT_SIZE, HOP, window=self.window, length=noise.shape[1])

    def _amplitude(self, log_gain: Tensor) -> Tensor:
        """(batch, 2n, bins) -> (batch, bins, 2n + 1), as many frames as the centred STFT has."""
        log_gain = torch.cat([log_gain, log_gain[:, -1:]], 1)
        return log_gain.clamp(*LOG_GAIN_LIMITS).exp().transpose(1, 2)

    def _stft(self, wave: Tensor) -> Tensor:
        return torch.stft(wave, FFT_SIZE, HOP, window=self.window, return_complex=True)


def twice_as_often(x: Tensor) -> Tensor:
    """(batch, n, bands) -> (batch, 2n, bands) by linear interpolation in time"""
    return F.interpolate(x.transpose(1, 2), scale_factor=2, mode="linear").transpose(1, 2)


def interpolation(centres: np.ndarray, points: np.ndarray) -> Tensor:
    """The matrix (len(centres), len(points)) that interpolates linearly from centres to points, constant outside."""
    right = np.searchsorted(centres, points).clip(1, len(centres) - 1)
    fraction = ((points - centres[right - 1]) / (centres[right] - centres[right - 1])).clip(0, 1)
    matrix = np.zeros((len(centres), len(points)), dtype=np.float32)
    columns = np.arange(len(points))
    matrix[right - 1, columns] = 1 - fraction
    matrix[right, columns] = fraction
    return torch.from_numpy(matrix)


def pulse_train(f0: Tensor, samples: int) -> Tensor:
    """Band-limited pulses at F0 (batch, n) Hz, of power one: (batch, samples).

    The sum of all cosines k * F0 below PULSE_LIMIT, in Dirichlet's closed form.
    """
    f0 = F.interpolate(f0.log()[:, None], size=samples, mode="linear")[:, 0].exp()
    cycles = torch.cumsum(f0.double() / SAMPLE_RATE, 1)
    phase = (cycles - cycles.floor()).float()
    harmonics = torch.floor(PULSE_LIMIT / f0)
    denominator = torch.sin(math.pi * phase)
    at_pulse = denominator.abs() < 1e-4
    numerator = torch.sin((2 * harmonics + 1) * math.pi * phase)
    cosines = 0.5 * (numerator / torch.where(at_pulse, 1.0, denominator) - 1)
    return torch.where(at_pulse, harmonics, cosines) * torch.sqrt(4 * f0 / SAMPLE_RATE)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a .safetensors file."""
    with reading(path, "not a readable .safetensors file"), safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def load_decoder() -> FilterGainDecoder:
    """The shipped decoder, in float32 from float16 weights."""
    tensors, _ = read_safetensors(SHIPPED_WEIGHTS)
    decoder = FilterGainDecoder()
    decoder.load_state_dict({n.removeprefix(PREFIX): t.float() for n, t in tensors.items() if n.startswith(PREFIX)})
    return decoder.eval().requires_grad_(False)
