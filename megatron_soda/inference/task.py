"""Defines generation tasks. Each is one class in one file in tasks/, marked `@TASKS.register`. Nothing else has to
change: the recipe, `soda generate` and the page find it through the registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..vocab import TokenSpace


@dataclass(frozen=True)
class Material:
    """The input for a task's prompt."""

    row: dict[str, Any]  # a held-out utterance: id, codes int16 (frames, codebooks), text, language, audio
    space: "TokenSpace"
    encode: Callable[[str], list[int]]  # text to ids
    longest: int  # frames of sound in the document, including the prompt's
    frame_rate: float  # Hz
    settings: Any  # config.Generate
    context: int  # tokens that the model can take


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
    writes: ClassVar[bool] = False  # the result is text; otherwise the document's last audio span

    @abstractmethod
    def prompt(self, material: Material) -> Prompt: ...
