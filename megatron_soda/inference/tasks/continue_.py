"""Continues speech."""

from ...registry import TASKS
from ..task import Material, Prompt, Task


@TASKS.register
class Continue(Task):
    name = "continue"
    title = "Continue"
    meaning = "The model hears the prompt and continues on its own."

    def prompt(self, material: Material) -> Prompt:
        space = material.space
        ids = [*material.start(), *material.audio(material.codes[: material.given])[:-1]]
        frames = min(material.longest - material.given, (material.room(ids) - 2) // space.codebooks)
        return Prompt(ids, {space.audio_end}, frames * space.codebooks + 2, given=material.given)

    def example(self, material: Material) -> list[int]:
        return [material.space.bos, *material.audio(material.codes), material.space.eos]
