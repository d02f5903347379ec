"""Defines generation tasks. Each is one class in one file in tasks/, marked `@TASKS.register`. Nothing else has to
change: the recipe, `soda generate` and the page find it through the registry."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import SodaError

if TYPE_CHECKING:
    from ..vocab import TokenSpace

PAUSES, SLOWEST = 2.0, 3.0  # seconds, and letters a second: speech that takes longer is cut off


@dataclass(frozen=True)
class Material:
    """The input for a task's prompt."""

    space: "TokenSpace"
    encode: Callable[[str], list[int]]  # text to ids
    frame_rate: float  # Hz
    context: int  # tokens that the model can take
    longest: int  # frames of sound in the document, including the prompt's
    text: str = ""  # to be spoken; in an example, what is said in the sound
    codes: Any = None  # int16 (frames, codebooks): the sound that the task is about
    given: int = 0  # leading frames of it that a continuation hears
    voice: tuple[str, Any] | None = None  # what a speaker said, and its codes: to speak in this voice
    language: str = ""  # of the sound, if it is known
    to: str = ""  # the language to translate to
    translation: tuple[str, Any] | None = None  # in an example: the text and the codes in that language
    examples: tuple[int, ...] = ()  # ids of whole documents that come first

    def audio(self, codes: Any) -> list[int]:
        """An audio span."""
        space = self.space
        return [space.audio_start, *space.audio_ids(codes).tolist(), space.audio_end]

    def words(self, text: str) -> list[int]:
        """A text span."""
        return [self.space.text_start, *self.encode(text), self.space.text_end]

    def start(self) -> list[int]:
        """The examples, and the start of a document."""
        return [*self.examples, self.space.bos]

    def room(self, ids: list[int]) -> int:
        """Tokens that can follow `ids`. SodaError if there is no room for one of text, or for a frame."""
        left = self.context - len(ids)
        if left < self.space.codebooks + 2:
            raise SodaError(
                f"the prompt's {len(ids):,} tokens leave no room for an answer in the model's context of "
                f"{self.context:,} tokens. Give less sound, a shorter text or fewer examples."
            )
        return left

    def speech_tokens(self, ids: list[int], text: str) -> int:
        """The limit of speech that says `text` after `ids`."""
        most = min((self.room(ids) - 2) // self.space.codebooks, self.longest)
        frames = min(most, math.ceil((PAUSES + len(text) / SLOWEST) * self.frame_rate))
        return frames * self.space.codebooks + 2


@dataclass(frozen=True)
class Prompt:
    """The start of a document, and where its continuation ends."""

    ids: list[int]
    stop: set[int]  # the continuation ends with one of these
    max_tokens: int  # most tokens of the continuation
    text: str | None = None  # the text that the sound should say
    given: int = 0  # leading frames of the resulting sound that belong to the prompt


class Task(ABC):
    """Something a model can be prompted to do (paper, section 8)."""

    name: ClassVar[str]  # used in recipes and samples.json; also the file name
    title: ClassVar[str]
    meaning: ClassVar[str]  # one sentence for the page
    needs_text: ClassVar[bool] = False  # needs a transcript, and a model trained on text beside speech
    translates: ClassVar[bool] = False  # needs a recording with its translation
    writes: ClassVar[bool] = False  # the result is text; otherwise the document's last audio span
    temperature: ClassVar[float] = 1.0  # those of the paper, for people's own sounds and texts; 0: the likeliest token
    top_p: ClassVar[float] = 0.9

    @abstractmethod
    def prompt(self, material: Material) -> Prompt:
        """SodaError if the model's context has no room for it."""

    def then(self, material: Material, prompt: Prompt, ids: list[int], said: str) -> Prompt | None:
        """What follows the answer to a prompt, for a task of several steps. ids: the document so far; said: the text in
        the answer."""
        return None

    def example(self, material: Material) -> list[int]:
        """A whole document in which the task is done."""
        raise SodaError(f"{self.name} takes no examples")
