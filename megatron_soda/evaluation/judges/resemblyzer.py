"""Resemblyzer: the voice."""

from collections.abc import Sequence

import numpy as np

from ...registry import JUDGES
from ..judge import EXTRA, Judge, Verdicts

SHORTEST = 1600  # samples: less has no voice


@JUDGES.register
class Resemblyzer(Judge):
    name = "resemblyzer"
    measures = "voice"
    about = "cosine of speaker embeddings (a GE2E encoder)"
    package, module = "Resemblyzer", "resemblyzer"
    install = f"{EXTRA}, then pip install --no-deps Resemblyzer==0.1.4 (it asks for packages that cannot be installed)"

    def load(self, model: str) -> Verdicts:
        import torch
        from resemblyzer import VoiceEncoder, preprocess_wav  # pyright: ignore[reportAttributeAccessIssue]

        encoder = VoiceEncoder("cuda" if torch.cuda.is_available() else "cpu", verbose=False)

        def embed(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[list[float] | None]:
            found: list[list[float] | None] = []
            for wave in waves:
                if np.abs(wave).max() > 0:
                    speech = preprocess_wav(wave)  # its level set, long pauses removed
                    wave = speech if len(speech) >= SHORTEST else wave
                silent = len(wave) < SHORTEST or not np.abs(wave).max() > 0
                found.append(None if silent else encoder.embed_utterance(wave).astype(float).tolist())
            return found

        return embed
