"""What every speech source yields: utterances, and a reason for each input that is not one."""

import unicodedata
from dataclasses import dataclass

from megatron_soda.audio.sound import Sound


@dataclass(frozen=True)
class Utterance:
    """A recording of one sentence, or the stretch of a recording that contains it.

    `id` is unique within its source. It may contain '/' and any other character, so it is not a file name. `prompt`
    identifies what is said, regardless of speaker and language: all utterances of a prompt are on one side of the split
    (see split.py for what else keeps utterances together). `recording`: consecutive utterances of one recording make
    one document; empty: each makes its own.
    """

    id: str
    audio: Sound  # of a translation that is not spoken: without a path
    text: str  # empty: there is none, so only audio-only documents can be made from it
    speaker: str = ""
    language: str = ""
    prompt: str = ""
    recording: str = ""

    @property
    def heard(self) -> bool:
        """Whether it has sound."""
        return bool(self.audio.path)


@dataclass(frozen=True)
class Reject:
    """A rejected input. `where` is a file, file:line or id; `reason` is a short sentence whose part before ':' is one
    of a few fixed phrases, to count by."""

    where: str
    reason: str


def one_line(text: str) -> str:
    """The text with every run of white space, including line breaks, as one space."""
    return " ".join(text.split())


def prompt_key(text: str, otherwise: str) -> str:
    """A transcript for comparisons: no case, no punctuation, single spaces; `otherwise` if nothing is left."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    kept = (" " if unicodedata.category(letter)[0] in "PS" else letter for letter in folded)
    return one_line("".join(kept)) or otherwise
