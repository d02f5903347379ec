"""What every speech source gives: utterances, and a counted reason for each input that is not one."""

import unicodedata
from dataclasses import dataclass

from megatron_soda.audio.sound import Sound


@dataclass(frozen=True)
class Utterance:
    """One recording of one sentence, or the stretch of a recording that has it.

    `id` is unique within its source. It may hold '/' and any other character, so it is no file name.
    `prompt` is a key of what is said, whoever says it in whatever language: of one prompt, all are on one side of a
    split (see split.py for what else keeps utterances together).
    `recording`: utterances of one recording that follow each other make one document; empty: each is its own.
    """

    id: str
    audio: Sound
    text: str  # empty: there is none, and only documents of audio alone can be made of it
    speaker: str = ""
    language: str = ""
    prompt: str = ""
    recording: str = ""


@dataclass(frozen=True)
class Reject:
    """An input that was left out: `where` is a file, file:line or id; `reason` is a short sentence, up to its ':' one
    of a few fixed phrases, to count by."""

    where: str
    reason: str


def one_line(text: str) -> str:
    """The text with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def prompt_key(text: str, otherwise: str) -> str:
    """A transcript to compare by: no case, no punctuation, single spaces; `otherwise` where nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (" " if unicodedata.category(letter)[0] in "PS" else letter for letter in folded)
    return one_line("".join(kept)) or otherwise
