"""What all samples of a run share: turning prompts into tokens, tokens into sound, and sound into files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from ..codecs.base import Codec
from ..config import Recipe
from ..files import atomic_path
from ..hf.load import LoadedModel
from ..vocab import TokenSpace
from .decoder import Decoder
from .sample import Constraint, Sampled, sample
from .task import Material, Prompt, Task

TEXT_AND_MARKERS = 64  # tokens of the context reserved for other than sound
SAME_CODES = 0.9  # share of an utterance's codes that its recording must give


@dataclass
class Studio:
    model: LoadedModel
    recipe: Recipe
    codec: Codec
    out: Path  # where the wav files go

    def __post_init__(self) -> None:
        self.decoder = Decoder(self.model.model, self.recipe.generate.weights)
        self.constraint = Constraint(self.model.space, self.model.device)
        self.frame_rate = self.codec.sample_rate / self.codec.samples_per_frame  # Hz
        self.fitting = (self.decoder.context - TEXT_AND_MARKERS) // self.model.space.codebooks  # frames
        # Frames in an utterance, and in what is generated.
        self.longest = max(1, min(round(self.recipe.generate.max_seconds * self.frame_rate), self.fitting))

    def material(self, longest: int | None = None, **rest: Any) -> Material:
        """longest: frames of sound in the document; by default, as many as the context takes."""
        longest = self.decoder.context if longest is None else longest
        space, encode = self.model.space, self.model.text.encode
        return Material(space, encode, self.frame_rate, self.decoder.context, longest, **rest)

    def material_of(self, task: Task, row: dict[str, Any], longest: int) -> Material:
        """Of a held-out utterance, or of generate.text, which may take as long as it needs."""
        settings, codes = self.recipe.generate, row["codes"]
        given = max(1, min(round(settings.prompt_seconds * self.frame_rate), len(codes) // 2))
        own = settings.text if task.needs_text and not task.translates else ""
        to = row["translation"]["language"] if task.translates else ""
        return self.material(None if own else longest, text=own or row["text"], codes=codes, given=given, to=to)

    def draw(self, decoder: Decoder, prompt: Prompt, count: int, seed: int) -> list[Sampled]:
        """`count` continuations by a model with this one's token space."""
        chosen = self.recipe.generate
        return sample(
            *(decoder, self.constraint, [prompt]),
            count=count,
            seed=seed,
            temperature=chosen.temperature,
            top_p=chosen.top_p,
            statistics=True,
        )

    def hear(self, result: Sampled) -> np.ndarray:
        """float32 (samples,): the last audio span, including the prompt's frames."""
        codes = generated_codes(result.ids, self.model.space)
        return self.codec.decode([codes])[0] if len(codes) else np.zeros(0, np.float32)

    def read(self, result: Sampled, prompt: Prompt) -> str:
        """The generated text."""
        generated = result.ids[len(prompt.ids) :]
        return self.model.text.decode(token for token in generated if token < self.model.space.text_size)

    def recording(self, row: dict[str, Any]) -> np.ndarray | None:
        """float32 (samples,): the recording that the row's codes were made from, None if the file is gone or another
        one. The path comes with the data, and the sound is published with the page."""
        from ..audio.reading import read_audio
        from ..audio.sound import BadAudio

        codes = row["codes"]
        longest = (len(codes) + 1) * self.codec.samples_per_frame / self.codec.sample_rate
        try:
            wave = read_audio(Path(row["audio"]), self.codec.sample_rate, longest)
        except (BadAudio, OSError):
            return None
        found = self.codec.encode([wave])[0]
        # Only of the first codebook, and not all: codes that were made on another device may differ.
        return wave if len(found) == len(codes) and np.mean(found[:, 0] == codes[:, 0]) > SAME_CODES else None

    def original(self, row: dict[str, Any]) -> np.ndarray:
        """float32 (samples,): the recording, or its decoded codes if there is none."""
        wave = self.recording(row)
        return self.codec.decode([row["codes"]])[0] if wave is None else wave

    def save(self, name: str, wave: np.ndarray) -> str:
        """Writes NAME.wav and returns the file name."""
        with atomic_path(self.out / f"{name}.wav") as temporary:
            soundfile.write(temporary, np.clip(wave, -1, 1), self.codec.sample_rate, format="WAV", subtype="PCM_16")
        return f"{name}.wav"


def generated_codes(ids: list[int], space: TokenSpace) -> np.ndarray:
    """int16 (frames, codebooks): the complete frames of the last audio span in `ids`."""
    ids_array = np.array(ids)
    start = int(np.flatnonzero(ids_array == space.audio_start)[-1]) + 1
    span = ids_array[start:]
    span = span[span >= space.audio_base]
    return space.codes(span[: len(span) // space.codebooks * space.codebooks])
