"""Word error rates: what of a text counts as a word, and how many words two texts differ by."""

import re
import string
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata

from ..errors import SodaError
from .judge import EXTRA

Normaliser = Callable[[str, str], list[str]]  # a text and its language ("": unknown, taken for English) -> words
WITHOUT_SPACES = ("zh", "ja", "th")  # languages: every character is a word, so the rate is one of characters


def authors_recognition(text: str, language: str) -> list[str]:
    """The authors' for recognition: lower case, without punctuation; hyphens leave no space."""
    return _split(_without_punctuation(text, ""), language)


def authors_synthesis(text: str, language: str) -> list[str]:
    """The authors' for synthesis: the same, but apostrophes stay."""
    return _split(_without_punctuation(text.replace("’", "'"), "'"), language)


def whisper(text: str, language: str) -> list[str]:
    """Whisper's: for English, numbers, contractions and spelling are unified, too."""
    english, other = _whisper()
    return _split(english(text) if (language or "en").startswith("en") else other(text), language)


def check_whisper() -> str:
    """The name and version of Whisper's normaliser. SodaError if it is not installed."""
    _whisper()
    return f"EnglishTextNormalizer and, for other languages, BasicTextNormalizer of {_version()}"


def _version() -> str:
    return f"whisper_normalizer {metadata.version('whisper_normalizer')}"


@cache
def _whisper() -> tuple[Callable[[str], str], Callable[[str], str]]:
    try:
        from whisper_normalizer.basic import BasicTextNormalizer  # pyright: ignore[reportMissingImports]
        from whisper_normalizer.english import EnglishTextNormalizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SodaError(
            f"whisper_normalizer, which word error rates are computed with, is not installed: {EXTRA}"
        ) from None
    return EnglishTextNormalizer(), BasicTextNormalizer()


def _without_punctuation(text: str, but: str) -> str:
    return "".join(
        letter
        for letter in text.lower()
        if letter in but or not (letter in string.punctuation or unicodedata.category(letter).startswith("P"))
    )


def _split(text: str, language: str) -> list[str]:
    without = re.split("[-_]", language.lower())[0] in WITHOUT_SPACES  # zh, zh-CN, zh_CN
    return list("".join(text.split())) if without else text.split()


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Words replaced, left out and put in, at least: Levenshtein's distance."""
    above = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        row = [i]
        for j, other in enumerate(heard, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (word != other)))
        above = row
    return above[-1]
