"""WavLM for speaker verification, from a folder: the voice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...errors import SodaError
from ...files import reading
from ...registry import JUDGES
from ..judge import Judge, Verdicts

SHORTEST = 1600  # samples


@JUDGES.register
class Wavlm(Judge):
    name = "wavlm"
    measures = "voice"
    about = "cosine of x-vectors (WavLM)"
    package, module = "transformers", "transformers"

    def load(self, model: str) -> Verdicts:
        if not Path(model).is_dir() or not model:
            raise SodaError(
                f"wavlm: {model or 'no folder'}: name the folder of a WavLMForXVector, such as a copy of "
                "microsoft/wavlm-base-plus-sv: evaluate.judges=[wavlm:FOLDER]"
            )
        import torch
        from transformers import AutoFeatureExtractor, WavLMForXVector

        device = "cuda" if torch.cuda.is_available() else "cpu"
        with reading(Path(model), "not a WavLMForXVector with its feature extractor"):
            prepare = AutoFeatureExtractor.from_pretrained(model, local_files_only=True)
            loaded = WavLMForXVector.from_pretrained(model, local_files_only=True, use_safetensors=True)
        network = loaded.eval().to(device)  # pyright: ignore[reportArgumentType]

        def embed(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[list[float] | None]:
            found: list[list[float] | None] = []
            for wave in waves:  # one by one: padding would change the statistics over time
                if len(wave) < SHORTEST:
                    found.append(None)
                    continue
                inputs = prepare(wave, sampling_rate=self.rate, return_tensors="pt").to(device)
                with torch.no_grad():
                    found.append(network(**inputs).embeddings[0].double().tolist())
            return found

        return embed
