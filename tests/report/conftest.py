"""A run folder as a finished run leaves it, made up in a second: numbers, texts, and voice-like sound."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

CLASSES = ["text", "marker", "semantic", *(f"acoustic_{level}" for level in range(1, 8))]
START = dict(zip(CLASSES, [7.9, 2.2, 7.6, 7.1, 7.2, 7.3, 7.4, 7.4, 7.5, 7.5], strict=True))
END = dict(zip(CLASSES, [3.21, 0.084, 3.93, 4.61, 5.12, 5.44, 5.71, 5.93, 6.08, 6.21], strict=True))
UNIGRAM = dict(zip(CLASSES, [6.03, 1.31, 6.62, 6.18, 6.31, 6.42, 6.53, 6.59, 6.66, 6.71], strict=True))
RECIPE = """\
name: soda-demo
seed: 1234
data:
  audio: recordings/   # a folder of sound files, transcripts beside them
  languages: [en, de, sw]
codec:
  frames_per_second: 12.5
  levels: 8
model:
  layers: 12
  hidden: 768
  heads: 12
train:
  steps: 2000
  batch_tokens: 65536
  learning_rate: 3.0e-4
  schedule: warmup-stable-decay
"""


def voice(seconds: float, rate: int = 24000, seed: int = 0) -> np.ndarray:
    """Something like speech: a gliding, shivering pitch through moving formants, in syllables, with hisses."""
    random = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    syllables = np.arange(0, seconds + 0.5, 0.21) + random.uniform(-0.03, 0.03, len(np.arange(0, seconds + 0.5, 0.21)))
    glide = np.interp(time, syllables, random.uniform(-1, 1, len(syllables)))
    pitch = random.uniform(105, 190) * 2 ** (0.25 * glide + 0.02 * np.sin(2 * np.pi * 5.3 * time))
    phase = 2 * np.pi * np.cumsum(pitch) / rate
    formants = [
        np.interp(time, syllables, random.uniform(low, high, len(syllables)))
        for low, high in ((300, 800), (900, 2200), (2400, 3200))
    ]
    sound = np.zeros_like(time)
    for harmonic in range(1, 30):
        hertz = harmonic * pitch
        gain = sum(np.exp(-(((hertz - middle) / (0.12 * middle + 60)) ** 2)) for middle in formants)
        sound += (gain + 0.02) / harmonic**0.5 * np.sin(harmonic * phase)
    loudness = np.clip(np.interp(time, syllables, random.uniform(-0.25, 1, len(syllables))), 0, 1)
    hiss = np.diff(random.normal(size=len(time) + 1)) * np.clip(0.7 - loudness, 0, 1) * (random.random() * 0.2 + 0.15)
    sound = sound * loudness + hiss * np.interp(time, syllables, random.random(len(syllables)) > 0.6)
    return 0.6 * sound / max(1e-9, np.abs(sound).max())


def through_codec(sound: np.ndarray, seed: int, noise: float = 0.006) -> np.ndarray:
    """A duller, slightly noisy copy."""
    soft = np.convolve(sound, np.hanning(9) / np.hanning(9).sum(), mode="same")
    return soft + noise * np.random.default_rng(seed).normal(size=len(sound)) * (0.2 + np.abs(soft))


def metrics_text(steps: int = 400, every: int = 5, valid_every: int = 200) -> str:
    random = np.random.default_rng(7)
    lines: list[dict[str, Any]] = []
    for step in range(every, steps * every + 1, every):
        left = np.exp(-3.2 * step / (steps * every)) - np.exp(-3.2)
        nll = {name: END[name] + (START[name] - END[name]) * left + random.normal() * 0.07 for name in CLASSES}
        nll = {name: max(value, 0.01) for name, value in nll.items()}
        if step % 35 == 0:
            del nll["text"]  # as in a batch with no token of it
        spike = 6.0 if step == 200 * every else 0.0
        lines.append(
            {
                "step": step,
                "tokens": step * 65536,
                "loss": float(np.mean(list(nll.values()))),
                "grad_norm": float(0.4 + 2.1 * left + abs(random.normal()) * 0.12 + spike),
                "learning_rate": 3e-4 * min(1, step / 100) * min(1, (steps * every + 20 - step) / 400),
                "tokens_per_second": float(181_000 + random.normal() * 2500),
                "seconds": step * 0.362,
                "nll": nll,
            }
        )
        if step % valid_every == 0:
            valid = {name: END[name] + (START[name] - END[name]) * left + 0.05 for name in CLASSES}
            lines.append({"step": step, "valid_loss": float(np.mean(list(valid.values()))), "valid_nll": valid})
    return "".join(json.dumps(line) + "\n" for line in lines)


def evaluation() -> dict[str, Any]:
    bits = 1 / np.log(2)

    def row(tokens: int, model: float, unigram: float) -> dict[str, Any]:
        nats = {"model_nats": float(model), "unigram_nats": float(unigram)}
        return {"tokens": tokens, **nats, "model_bits": float(model * bits), "unigram_bits": float(unigram * bits)}

    counts = dict.fromkeys(CLASSES, 48_211) | {"text": 9_377, "marker": 1_204}
    acoustic = [name for name in CLASSES if name.startswith("acoustic")]
    weights = [counts[name] for name in CLASSES]
    return {
        "model": "soda-demo",
        "split": "test",
        "documents": 301,
        "nll": {
            "classes": {name: row(counts[name], END[name] + 0.0413, UNIGRAM[name]) for name in CLASSES},
            "acoustic_mean": row(
                sum(counts[name] for name in acoustic),
                float(np.mean([END[name] + 0.0413 for name in acoustic])),
                float(np.mean([UNIGRAM[name] for name in acoustic])),
            ),
            "all": row(
                sum(weights),
                float(np.average([END[name] + 0.0413 for name in CLASSES], weights=weights)),
                float(np.average([UNIGRAM[name] for name in CLASSES], weights=weights)),
            ),
        },
        "grammar": {
            "generations": 100,
            "valid": 100,
            "duration_exact": 99,
            "audio_spans": 214,
            "ended_by_itself": 37,
            "legal_mass_mean": 0.94258,
            "free_legal_mass_mean": 0.99731,
            "free_valid": 88,
            "temperature": 0.9,
            "longest_tokens": 2417,
        },
    }


def write_samples(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    made = 0

    def clip(seconds: float, rate: int = 24000, copy_of: np.ndarray | None = None) -> tuple[str, np.ndarray]:
        nonlocal made
        made += 1
        sound = voice(seconds, rate, made) if copy_of is None else through_codec(copy_of, made)
        soundfile.write(folder / f"{made}.wav", sound, rate)
        return f"{made}.wav", sound

    samples: list[dict[str, Any]] = []

    def sample(task: str, name: str, language: str, note: str = "", **rest: Any) -> None:
        words = {key: rest.pop(key, None) for key in ("prompt_text", "reference_text", "output_text")}
        samples.append({"task": task, "id": name, "language": language, **words, "note": note, "audio": rest})

    original, sound = clip(4.2)
    codec, again = clip(0, copy_of=sound)
    start, _ = clip(0, copy_of=again[: round(1.6 * 24000)])
    sample(
        *("continue", "en-0007", "en", "1.6 seconds of prompt, temperature 0.9"),
        **{"original": original, "codec": codec, "prompt": start, "model": clip(4.0)[0]},
    )
    asked = "The north wind and the sun were disputing which was the stronger."
    heard = "the north wind and the son were disputing which was stronger"
    original, sound = clip(3.3, 16000)
    made += 1
    soundfile.write(folder / f"{made}.wav", through_codec(sound, 3), 16000)
    sample(
        *("speak", "en-0031", "en", "Read back by a speech recogniser."),
        **{"prompt_text": asked, "reference_text": asked, "output_text": heard},
        **{"original": original, "codec": f"{made}.wav", "model": clip(3.6)[0]},
    )
    said, heard = "Einst stritten sich <b>Nordwind</b> & Sonne", "Einst stritten Nordwind und Sonne"
    original, sound = clip(2.7)
    sample(
        *("transcribe", "de-0002", "de"),
        **{"reference_text": said, "output_text": heard},
        **{"original": original, "codec": clip(0, copy_of=sound)[0]},
    )
    (folder / "samples.json").write_text(json.dumps(samples, ensure_ascii=False))


def make_fake_run(run: Path) -> Path:
    """Fills `run` with all the pieces of a finished run."""
    prepared = {
        "utterances": 4211,
        "hours": 7.25,
        "rejects": [
            {"where": "recordings/a/0031.wav", "reason": "shorter than 0.5 s"},
            {"where": "recordings/a/0077.wav", "reason": "no transcript"},
            {"where": "recordings/b/0002.wav", "reason": "shorter than 0.5 s"},
        ],
        "documents": {"train": 3911, "valid": 150, "test": 150},
        "tokens": {"train": 2_702_113, "valid": 101_220, "test": 99_804},
        "classes": {"text": 171_004, "marker": 25_266, "semantic": 326_400, "acoustic": 2_284_800},
        "languages": {
            "en": {"utterances": 2800, "seconds": 17_000.0},
            "de": {"utterances": 1000, "seconds": 6_800.5},
            "sw": {"utterances": 411, "seconds": 2_299.5},
        },
        "codec": {"name": "demo-codec", "fingerprint": "9f2c41d7a0b3"},
        "attribution": "Recordings made up for this test; nobody's voice.",
    }
    environment = {
        "python": "3.11.9",
        "torch": "2.11.0",
        "megatron_core": "0.16.1",
        "device": "1 × demo accelerator",
        "parameters": 113_246_208,
        "layout": {"tensor": 1, "pipeline": 1, "data": 2, "context": 1},
        "accelerated": {"fused attention": True, "fused cross entropy": False, "why not": "head size"},
        "deterministic": True,
    }
    stages = {
        "prepare": {"seconds": 93.1, "fit codec": 30.2, "encode": 51.7, "pack": 4.4},
        "train": {"seconds": 724.0, "steps": 650.3, "validation": 41.9, "checkpoints": 22.0},
        "evaluate": {"seconds": 61.8, "likelihood": 22.5, "grammar": 39.3},
        "export": {"seconds": 4.9},
    }
    (run / "data").mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(RECIPE)
    (run / "metrics.jsonl").write_text(metrics_text())
    (run / "eval.json").write_text(json.dumps(evaluation()))
    (run / "data/prepare.json").write_text(json.dumps(prepared))
    (run / "environment.json").write_text(json.dumps(environment))
    (run / "timings.json").write_text(json.dumps(stages))
    write_samples(run / "samples")
    return run


@pytest.fixture(scope="session")
def fake_run_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_fake_run(tmp_path_factory.mktemp("fake") / "soda-demo")


@pytest.fixture
def fake_run(fake_run_once: Path, tmp_path: Path) -> Path:
    """A run folder of the test's own, free to be damaged."""
    return shutil.copytree(fake_run_once, tmp_path / "soda-demo")


@pytest.fixture
def quick_run(fake_run: Path) -> Path:
    """The same without sounds and with few points, for pages in which these do not matter."""
    shutil.rmtree(fake_run / "samples")
    (fake_run / "samples").mkdir()
    (fake_run / "metrics.jsonl").write_text('{"step": 1, "tokens": 10, "loss": 2.5}\n')
    return fake_run
