"""What a generation task is. Each is one class in one file of tasks/, marked `@TASKS.register`, and nothing else has to
change: the recipe, `soda generate` and the page find it through the registry."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from ..vocab import TokenSpace


@dataclass(frozen=True)
class Material:
    """What a task makes a prompt from."""

    row: dict[str, Any]  # a held-out utterance: id, codes int16 (frames, codebooks), text, language, audio
    space: "TokenSpace"
    encode: Callable[[str], list[int]]  # text to ids
    longest: int  # frames of sound in the document, those of the prompt included
    frame_rate: float  # Hz
    settings: Any  # config.Generate


@dataclass(frozen=True)
class Prompt:
    """The start of a document, and when its continuation ends."""

    ids: list[int]
    stop: set[int]  # the continuation ends with one of these
    max_tokens: int  # of the continuation
    text: str | None = None  # what the sound is to say
    given: int = 0  # frames at the start of the resulting sound that are part of the prompt


class Task(ABC):
    """Something a model does when prompted (paper, section 8)."""

    name: ClassVar[str]  # in recipes and samples.json; the file's name
    title: ClassVar[str]
    meaning: ClassVar[str]  # one sentence for the page
    needs_text: ClassVar[bool] = False  # a transcript of the utterance, and a model that knows text beside speech
    writes: ClassVar[bool] = False  # its result is text; else it is the document's last audio span

    @abstractmethod
    def prompt(self, material: Material) -> Prompt: ...
