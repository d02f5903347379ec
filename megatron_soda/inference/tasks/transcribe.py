"""Speech to text."""

import math

from ...registry import TASKS
from ..task import Material, Prompt, Task

MOST_TOKENS = 200  # the paper's limit
FASTEST = 25.0  # letters a second: long sounds may have more tokens than that, at most one a letter


def text_tokens(material: Material, ids: list[int]) -> int:
    """The limit of a text that says what the sound does."""
    seconds = len(material.codes) / material.frame_rate
    return min(material.room(ids), max(MOST_TOKENS, math.ceil(FASTEST * seconds)))


@TASKS.register
class Transcribe(Task):
    name = "transcribe"
    title = "Transcribe"
    meaning = "The model is given the sound and writes down the text."
    needs_text = True
    writes = True
    temperature, top_p = 0.0, 1.0  # the paper's 0.0001, with top_p 0.8, is the same

    def prompt(self, material: Material) -> Prompt:
        ids = [*material.start(), *material.audio(material.codes), material.space.text_start]
        return Prompt(ids, {material.space.text_end}, text_tokens(material, ids))

    def example(self, material: Material) -> list[int]:
        audio, words = material.audio(material.codes), material.words(material.text)
        return [material.space.bos, *audio, *words, material.space.eos]
