"""Sound like speech, made up: a pulse train with a moving pitch through moving formants, with pauses and noise."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

RATE = 24_000
WORDS = "please enter your number followed by the pound key or stay on line for a person who can help you now".split()


STEP = 64  # samples between two gains of a harmonic: formants move slowly


@functools.lru_cache(128)
def voice(seed: int, seconds: float, rate: int = RATE) -> np.ndarray:
    """float32 mono, peak 0.5. Read-only: it is kept."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rate)

    def wobble(depth: float, slowest: float, fastest: float) -> Callable[[np.ndarray], np.ndarray]:
        frequency, phase = rng.uniform(slowest, fastest), rng.uniform(0, 6)
        return lambda t: 1 + depth * np.sin(2 * np.pi * frequency * t + phase)

    height, pitch = rng.uniform(90, 220), wobble(0.15, 0.5, 2)
    formants = [(f, wobble(0.3, 1, 4)) for f in (550, 1500, 2600)]
    t, coarse = np.arange(n) / rate, np.arange(0, n + STEP, STEP) / rate
    turn = np.exp(2j * np.pi * np.cumsum(height * pitch(t)) / rate)
    wave, tone, ramp = np.zeros(n), np.ones(n, complex), np.arange(STEP) / STEP
    for k in range(1, 30):
        frequency = k * height * pitch(coarse)
        gain = sum(np.exp(-(((frequency - f * moves(coarse)) / 220) ** 2)) for f, moves in formants) / k**0.3
        gain *= frequency < 0.45 * rate
        tone *= turn
        wave += (gain[:-1, None] + np.diff(gain)[:, None] * ramp).ravel()[:n] * tone.imag
    wave *= 0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)
    wave += 0.01 * rng.normal(size=n)
    wave = (0.5 * wave / np.abs(wave).max()).astype(np.float32)
    wave.flags.writeable = False
    return wave


def write_speech(folder: Path, count: int = 12) -> Path:
    """`count` files of a second or two with a manifest.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        name = f"clip_{i:03d}.wav"
        soundfile.write(folder / name, voice(i, float(rng.uniform(0.8, 2.0))), RATE)
        text = " ".join(rng.choice(WORDS, 5)) + f" {i}"
        lines.append(json.dumps({"audio": name, "text": text, "language": "en", "speaker": f"s{i % 2}"}))
    (folder / "manifest.jsonl").write_text("\n".join(lines) + "\n")
    return folder
