"""Whisper, by faster-whisper: the words that are heard."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from ...errors import SodaError
from ...registry import JUDGES
from ..judge import Judge, Verdicts

LONGEST = 29.9  # seconds that Whisper takes at once
BATCH = 8
GREEDY: dict[str, Any] = {"beam_size": 1, "temperature": 0.0}


@JUDGES.register
class Whisper(Judge):
    name = "whisper"
    measures = "words"
    about = "what Whisper hears, with greedy decoding"
    package, module = "faster-whisper", "faster_whisper"
    model = "large-v3"  # the paper's for synthesis

    def load(self, model: str) -> Verdicts:
        from faster_whisper import BatchedInferencePipeline, WhisperModel  # pyright: ignore[reportMissingImports]

        device, numbers = _device()
        try:
            recogniser = WhisperModel(model, device=device, compute_type=numbers)
        except Exception as error:  # of the hub, of the files, of CTranslate2
            raise SodaError(
                f"whisper: cannot load {model} ({str(error).splitlines()[0]}). Without a network, name a folder in "
                "CTranslate2's format: evaluate.judges=[whisper:FOLDER]"
            ) from None
        pipeline = BatchedInferencePipeline(recogniser)
        known = set(recogniser.supported_languages)

        def hear(waves: Sequence[np.ndarray], languages: Sequence[str]) -> list[str]:
            heard = [""] * len(waves)
            together: dict[str, list[int]] = defaultdict(list)
            for i, (wave, language) in enumerate(zip(waves, languages, strict=True)):
                code = language.lower().replace("_", "-").partition("-")[0]
                code = code if code in known else ""
                if code and len(wave) <= LONGEST * self.rate:
                    together[code].append(i)
                else:
                    segments, _ = recogniser.transcribe(
                        wave, language=code or None, condition_on_previous_text=False, **GREEDY
                    )
                    heard[i] = "".join(segment.text for segment in segments).strip()
            for code, chosen in together.items():
                for i, text in zip(chosen, _batch(pipeline, [waves[i] for i in chosen], code, self.rate), strict=True):
                    heard[i] = text
            return heard

        return hear

    def identity(self, model: str) -> dict[str, Any]:
        return {**super().identity(model), "numbers": _device()[1], "beams": 1}


def _device() -> tuple[str, str]:
    import torch

    return ("cuda", "float16") if torch.cuda.is_available() else ("cpu", "int8")


def _batch(pipeline: Any, waves: Sequence[np.ndarray], language: str, rate: int) -> list[str]:
    """Short sounds of one language, each on its own, as pieces of one long recording: the way that the package takes
    several at once. A second of silence between them keeps the starts apart."""
    lengths = [len(wave) + rate for wave in waves]
    starts = [int(start) for start in np.cumsum([0, *lengths[:-1]])]
    clips = [{"start": s / rate, "end": (s + len(wave)) / rate} for s, wave in zip(starts, waves, strict=True)]
    joined = np.concatenate([np.pad(wave, (0, rate)) for wave in waves]).astype(np.float32)
    segments, _ = pipeline.transcribe(
        joined, language=language, clip_timestamps=clips, batch_size=BATCH, without_timestamps=True, **GREEDY
    )
    heard = [""] * len(waves)
    for segment in segments:
        nearest = int(np.abs(np.array(starts) - segment.start * rate).argmin())
        heard[nearest] = f"{heard[nearest]} {segment.text}".strip()
    return heard
