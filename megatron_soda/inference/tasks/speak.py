"""Text to speech."""

import math

from ...errors import SodaError
from ...registry import TASKS
from ..task import Material, Prompt, Task

PAUSES, SLOWEST = 2.0, 3.0  # seconds, and letters a second: speech that takes longer is cut off


@TASKS.register
class Speak(Task):
    name = "speak"
    title = "Speak"
    meaning = "The model is given text and produces the sound."
    needs_text = True

    def prompt(self, material: Material) -> Prompt:
        space = material.space
        text = material.settings.text or material.row["text"]
        ids = [space.bos, space.text_start, *material.encode(text), space.text_end, space.audio_start]
        room = (material.context - len(ids) - 2) // space.codebooks
        if room < 1:
            raise SodaError(
                f"generate.text: with its {len(ids) - 4} tokens there is no room for sound in the model's context of "
                f"{material.context} tokens. Give a shorter text."
            )
        if not material.settings.text:
            room = min(room, material.longest)
        frames = min(room, math.ceil((PAUSES + len(text) / SLOWEST) * material.frame_rate))
        return Prompt(ids, {space.audio_end}, frames * space.codebooks + 2, text=text)
