"""Word error rates: the distance against its definition, and what counts as a word."""

from functools import lru_cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_soda.errors import SodaError
from megatron_soda.evaluation import words

TEXT = "“Don't” press 1–2 — it’s well-known, O'Brien… (OK?)"


def by_definition(said: tuple[str, ...], heard: tuple[str, ...]) -> int:
    """The fewest words replaced, left out or put in: whatever is done to the last word of both."""

    @lru_cache(None)
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        same = said[i - 1] == heard[j - 1]
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (not same))

    return distance(len(said), len(heard))


SOME = st.lists(st.sampled_from("abc"), max_size=7).map(tuple)


@given(SOME, SOME)
def test_word_errors(said, heard):
    assert words.word_errors(said, heard) == by_definition(said, heard)


def test_the_authors_normalisers():
    assert words.authors_recognition(TEXT, "en") == "dont press 12 its wellknown obrien ok".split()
    assert words.authors_synthesis(TEXT, "en") == "don't press 12 it's wellknown o'brien ok".split()
    assert words.authors_recognition("  A\tb\n ", "") == ["a", "b"]
    for language in ("zh", "zh-CN", "zh_CN", "ZH"):
        assert words.authors_recognition("你好，世界", language) == list("你好世界")


def test_whispers_normaliser_is_asked_by_language(monkeypatch):
    monkeypatch.setattr(words, "_whisper", lambda: (lambda text: f"english {text}", lambda text: f"other {text}"))
    assert [words.whisper("x", language)[0] for language in ("", "en", "en-GB", "es")] == [*3 * ["english"], "other"]


def test_whispers_normaliser_is_not_installed(monkeypatch):
    import sys

    words._whisper.cache_clear()
    monkeypatch.setitem(sys.modules, "whisper_normalizer.basic", None)
    with pytest.raises(SodaError, match=r"whisper_normalizer.*not installed: pip install 'megatron-soda\[judges\]'"):
        words.check_whisper()
    words._whisper.cache_clear()
