"""Text to speech, in the voice of a recording if there is one."""

from ...registry import TASKS
from ..task import Material, Prompt, Task


@TASKS.register
class Speak(Task):
    name = "speak"
    title = "Speak"
    meaning = "The model is given text and produces the sound."
    needs_text = True
    temperature, top_p = 0.9, 0.8

    def prompt(self, material: Material) -> Prompt:
        ids = material.start()
        if material.voice:
            said, codes = material.voice
            ids += [*material.words(said), *material.audio(codes)]
        ids += [*material.words(material.text), material.space.audio_start]
        limit = material.speech_tokens(ids, material.text)
        return Prompt(ids, {material.space.audio_end}, limit, text=material.text)

    def example(self, material: Material) -> list[int]:
        words, audio = material.words(material.text), material.audio(material.codes)
        return [material.space.bos, *words, *audio, material.space.eos]
