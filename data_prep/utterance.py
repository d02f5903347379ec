"""What every speech source gives: utterances, and a counted reason for each input that is not one."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Utterance:
    """One recording of one sentence.

    `id` is unique within its source. It may hold '/' and any other character, so it is no file name.
    `prompt` is the key that must never stand on two sides of a split: what is said, not who says it.
    """

    id: str
    audio: Path
    text: str | None
    speaker: str = ""
    language: str = ""
    prompt: str = ""


@dataclass(frozen=True)
class Reject:
    """An input that was left out: `where` is a file, file:line or id; `reason` is a short sentence."""

    where: str
    reason: str


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def prompt_key(text: str, otherwise: str) -> str:
    """The split key of a transcript: no case, no punctuation, single spaces; `otherwise` where nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (" " if unicodedata.category(letter)[0] in "PS" else letter for letter in folded)
    return one_line("".join(kept)) or otherwise
