"""Speech to text."""

from ...registry import TASKS
from ..task import Material, Prompt, Task

MOST_TOKENS = 200  # the paper's limit


@TASKS.register
class Transcribe(Task):
    name = "transcribe"
    title = "Transcribe"
    meaning = "The model is given the sound and writes down the text."
    needs_text = True
    writes = True

    def prompt(self, material: Material) -> Prompt:
        space = material.space
        audio = space.audio_ids(material.row["codes"]).tolist()
        ids = [space.bos, space.audio_start, *audio, space.audio_end, space.text_start]
        return Prompt(ids, {space.text_end}, MOST_TOKENS)
