"""Sound like speech, made up: a pulse train with a moving pitch through moving formants, with pauses and noise."""

import json
from pathlib import Path

import numpy as np
import soundfile

RATE = 24_000
WORDS = "please enter your number followed by the pound key or stay on line for a person who can help you now".split()


def voice(seed: int, seconds: float, rate: int = RATE) -> np.ndarray:
    """float32 mono, peak 0.5."""
    rng = np.random.default_rng(seed)
    n = int(seconds * rate)
    t = np.arange(n) / rate
    pitch = rng.uniform(90, 220) * (1 + 0.15 * np.sin(2 * np.pi * rng.uniform(0.5, 2) * t + rng.uniform(0, 6)))
    phase = np.cumsum(pitch) / rate
    wave = np.zeros(n)
    centres = [f * (1 + 0.3 * np.sin(2 * np.pi * rng.uniform(1, 4) * t + rng.uniform(0, 6))) for f in (550, 1500, 2600)]
    for k in range(1, 30):
        frequency = k * pitch
        gain = sum(np.exp(-(((frequency - c) / 220) ** 2)) for c in centres) / k**0.3
        wave += gain * np.sin(2 * np.pi * k * phase) * (frequency < 0.45 * rate)
    wave *= 0.6 + 0.4 * np.sin(2 * np.pi * 3 * t)
    wave += 0.01 * rng.normal(size=n)
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


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
