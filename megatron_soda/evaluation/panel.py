"""The judges that a recipe names, and their verdicts on sounds: in batches, each sound once."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from rich.progress import track

from ..console import console
from ..registry import JUDGES
from .judge import Judge, Verdicts
from .kept import Kept

BATCH = 16  # sounds in memory
Lazy = Callable[[], np.ndarray]  # makes a sound, float32 (samples,), when it is needed


class Panel:
    """named: as in evaluate.judges, NAME or NAME:MODEL. SodaError if one is not installed or cannot be loaded.
    folder: where verdicts are kept, by what the judge is and by the sound's content."""

    def __init__(self, named: Sequence[str], folder: Path) -> None:
        self.folder = folder
        self.judges: list[Judge] = []
        self.identities: dict[str, dict[str, Any]] = {}
        self._load: dict[str, str] = {}
        self._loaded: dict[str, Verdicts] = {}
        for one in named:
            name, _, model = one.partition(":")
            judge = JUDGES[name]
            judge.check()
            self.judges.append(judge)
            self._load[name] = model or judge.model
            self._loaded[name] = judge.load(self._load[name])
            self.identities[name] = judge.identity(self._load[name])

    def that(self, measures: str) -> list[Judge]:
        return [judge for judge in self.judges if judge.measures == measures]

    def judged(
        self, sounds: Sequence[Lazy], rate: int, languages: Sequence[str], what: str, measures: Sequence[str] = ()
    ) -> dict[str, list[Any]]:
        """By judge, the verdict on each sound; None for one without samples. rate: of the sounds, in Hz. measures:
        what is asked; empty: everything."""
        judges = [judge for judge in self.judges if not measures or judge.measures in measures]
        found: dict[str, list[Any]] = {judge.name: [] for judge in judges}
        if not judges:
            return found
        starts = range(0, len(sounds), BATCH)
        with ExitStack() as stack:
            names = sorted(judge.name for judge in judges)  # in one order, or two processes would wait for each other
            kept = {name: stack.enter_context(self._kept(name)) for name in names}
            for start in track(starts, f"judge {what}", console=console):
                waves = [sound() for sound in sounds[start : start + BATCH]]
                spoken = languages[start : start + BATCH]
                digests = [_digest(wave, rate, language) for wave, language in zip(waves, spoken, strict=True)]
                for judge in judges:
                    self._judge(judge, kept[judge.name], waves, digests, rate, spoken)
                    values = kept[judge.name].values
                    found[judge.name] += [values[d] if len(w) else None for d, w in zip(digests, waves, strict=True)]
        return found

    def _judge(
        self,
        judge: Judge,
        kept: Kept,
        waves: Sequence[np.ndarray],
        digests: Sequence[str],
        rate: int,
        languages: Sequence[str],
    ) -> None:
        new = {d: i for i, d in enumerate(digests) if d not in kept.values and len(waves[i])}
        if new:
            heard = [resampled_to(waves[i], rate, judge.rate) for i in new.values()]
            verdicts = self._loaded[judge.name](heard, [languages[i] for i in new.values()])
            for digest, verdict in zip(new, verdicts, strict=True):
                kept.add(digest, verdict)

    def _kept(self, name: str) -> Kept:
        digest = hashlib.sha256(json.dumps(self.identities[name], sort_keys=True).encode()).hexdigest()[:12]
        return Kept(self.folder / f"{name}-{digest}.jsonl", self.identities[name])


def place_for_kept(benchmarks: str, run: str) -> Path:
    """Beside the benchmarks, where other runs find it, if that is possible."""
    there = bool(benchmarks) and os.access(benchmarks, os.W_OK)
    return Path(benchmarks) if there else Path(run) / "evaluate"


def resampled_to(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    return wave if rate == to else soxr.resample(wave, rate, to).astype(np.float32)


def _digest(wave: np.ndarray, rate: int, language: str) -> str:
    """Of the sound to 16 bits, and of the language, which decides what a recogniser hears."""
    samples = np.round(np.clip(wave, -1, 1) * 32767).astype("<i2")
    return hashlib.sha256(f"{rate} {language}\n".encode() + samples.tobytes()).hexdigest()[:32]
