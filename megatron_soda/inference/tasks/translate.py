"""Speech to speech in another language, by way of both texts (paper, section 9)."""

import re

from ...errors import SodaError
from ...registry import TASKS
from ..task import Material, Prompt, Task
from .transcribe import text_tokens

LANGUAGE = re.compile("<language>([^<>]*)</language>")


def tag(language: str) -> str:
    return f"<language>{language}</language>"


@TASKS.register
class Translate(Task):
    name = "translate"
    title = "Translate"
    meaning = "The model writes down what it hears, translates it, and says that."
    needs_text = translates = True
    temperature, top_p = 0.9, 0.8

    def prompt(self, material: Material) -> Prompt:
        if not material.to:
            raise SodaError("translate needs a language to translate to: soda translate FILE --to LANG")
        ids = [*material.start(), *material.audio(material.codes), material.space.text_start]
        if material.language:
            ids += material.encode(tag(material.language))
        limit = self._text(material, ids)
        material.room(ids + (2 * limit + 2) * [0] + material.encode(tag(material.to)))  # both texts, then sound
        return Prompt(ids, {material.space.text_end}, limit)

    def _text(self, material: Material, ids: list[int]) -> int:
        """The limit of a text: as for a transcript, but most of the context is for what comes after it."""
        return min(text_tokens(material, ids), max(8, material.room(ids) // 4))

    def then(self, material: Material, prompt: Prompt, ids: list[int], said: str) -> Prompt | None:
        space = material.space
        if prompt.stop == {space.audio_end}:
            return None
        if ids[len(material.examples) :].count(space.text_start) == 1:
            ids = [*ids, space.text_start, *material.encode(tag(material.to))]
            return Prompt(ids, {space.text_end}, self._text(material, ids))
        ids = [*ids, space.audio_start]
        return Prompt(ids, {space.audio_end}, material.speech_tokens(ids, said), text=said)

    def example(self, material: Material) -> list[int]:
        assert material.translation
        text, codes = material.translation
        source = [*material.audio(material.codes), *material.words(tag(material.language) + material.text)]
        target = [*material.words(tag(material.to) + text), *material.audio(codes)]
        return [material.space.bos, *source, *target, material.space.eos]
