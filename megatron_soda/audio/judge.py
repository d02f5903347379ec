"""Whether a generated sound is plausible speech. Uses no recogniser, only its length, level, silence and end."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

FRAME = 0.02  # seconds
SILENT = -60.0  # dBFS of a frame; a frame 40 dB below the loudest also counts
QUIETER = 20.0  # dB below a recording that went through the codec: not the level of speech
MOSTLY = 0.7
SHORTEST, TOO_SHORT, TOO_LONG = 0.5, 0.4, 2.5  # seconds; shares of the length that the text should have

CUT = "cut off at the length limit"


@dataclass
class Verdict:
    seconds: float
    level: float  # dBFS, RMS
    silence: float  # share of frames
    nats: float  # -log p per token, averaged over the generated part
    problems: list[str]

    @property
    def rank(self) -> tuple[int, float]:
        """Lowest first."""
        return len(self.problems), self.nats

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge(wave: np.ndarray, rate: int, *, level: float, expected: float | None, ended: bool, nats: float) -> Verdict:
    """`wave`: float32 (samples,). level: dBFS of speech in these data. expected: seconds that the text should take."""
    seconds, found, quiet = len(wave) / rate, level_of(wave), silence(wave, rate)
    problems = []
    if seconds < max(SHORTEST, TOO_SHORT * (expected or 0)):
        problems.append(f"too short: {seconds:.2f} s" + (f" for a text of about {expected:.1f} s" if expected else ""))
    elif expected and seconds > TOO_LONG * expected:
        problems.append(f"too long: {seconds:.1f} s for a text of about {expected:.1f} s")
    if found < level - QUIETER:
        problems.append(f"too quiet: {found:.0f} dB, speech here has {level:.0f} dB")
    if quiet > MOSTLY:
        problems.append(f"{quiet:.0%} silence")
    if not ended:
        problems.append(CUT)
    return Verdict(seconds, found, quiet, nats, problems)


def best_and_median(verdicts: list[Verdict]) -> tuple[int, int]:
    """The indices of the best and the median one (the lower of two)."""
    order = sorted(range(len(verdicts)), key=lambda i: verdicts[i].rank)
    return order[0], order[len(order) // 2]


def level_of(wave: np.ndarray) -> float:
    """RMS level in dBFS; -120 for digital silence."""
    return float(20 * np.log10(max(1e-6, np.sqrt(np.mean(np.square(wave, dtype=np.float64)))))) if len(wave) else -120.0


def silence(wave: np.ndarray, rate: int) -> float:
    size = max(1, round(FRAME * rate))
    frames = wave[: len(wave) // size * size].reshape(-1, size)
    if not len(frames):
        return 1.0
    levels = 20 * np.log10(np.maximum(1e-6, np.sqrt(np.mean(np.square(frames, dtype=np.float64), 1))))
    return float(np.mean(levels < max(SILENT, levels.max() - 40)))
