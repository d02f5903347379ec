"""Text to speech."""

from ...registry import TASKS
from ..task import Material, Prompt, Task


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
        return Prompt(ids, {space.audio_end}, material.longest * space.codebooks + 2, text=text)
