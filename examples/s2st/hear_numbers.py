"""Counts how many of the number words of composed translations (compose.py) are heard, in order:

    soda evaluate runs/s2st suite=[translation]
    python examples/s2st/hear_numbers.py runs/s2st

Recognisers write some numbers in digits, so word error rates mislead. Here a number is heard as its word or in digits:
"72" is 70 2 or 7 2, whichever matches more. What matches is the longest common subsequence with the reference; other
words that are heard cost nothing. In Spanish, "treintaidos" and 18 heard as "10 y 8" count as missed, in recordings,
too. Prints a table, with 95 % bootstrap intervals over the translations, and the same as a line of JSON.
"""

import json
import re
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.numbers import NUMBERS, PREFIX
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.evaluation.bootstrap import intervals, resampled
from megatron_soda.evaluation.spoken import SYSTEMS
from megatron_soda.files import read_json


def tokens(text: str) -> list[str]:
    """Words without accents and punctuation, and strings of digits: "3,027" is one."""
    plain = re.sub(r"(?<=\d)[.,](?=\d{3}\b)", "", unicodedata.normalize("NFKD", text.lower()))
    return re.findall(r"\d+|[^\W\d_]+", "".join(letter for letter in plain if not unicodedata.combining(letter)))


def in_order(heard: str, reference: Sequence[str], words: dict[str, str]) -> int:
    """How many of the reference's numbers are heard, in order. words: the number of each word."""
    best = [0] * (len(reference) + 1)  # by the length of the reference's beginning
    for token in tokens(heard):
        if token.isdigit():
            best = _digits(best, token, reference)
        elif token in words:
            best = _number(best, words[token], reference)
    return best[-1]


def _number(best: Sequence[int], number: str, reference: Sequence[str]) -> list[int]:
    """`best` after one more number."""
    found = [0]
    for i, wanted in enumerate(reference):
        found.append(max(best[i + 1], found[i], best[i] + (number == wanted)))
    return found


def _digits(best: list[int], digits: str, reference: Sequence[str]) -> list[int]:
    """`best` after digits, over all ways to split them into numbers."""
    at = [best] + [[0] * len(best) for _ in digits]
    for start in range(len(digits)):
        for end, numbers in _begins(digits, start):
            found = at[start]
            for number in numbers:
                found = _number(found, number, reference)
            at[end] = list(map(max, at[end], found))
    return at[-1]


def _begins(digits: str, start: int) -> Iterator[tuple[int, list[str]]]:
    """What may be said first from `start` on, and where it ends: a digit, a number of two, or tens and a digit."""
    one, two = digits[start], digits[start : start + 2]
    yield start + 1, [one]
    if two in NUMBERS[10:]:
        yield start + 2, [two]
    elif len(two) == 2 and f"{one}0" in NUMBERS:
        yield start + 2, [f"{one}0", two[1]]


def counts(items: Sequence[dict[str, Any]], system: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each item float64: numbers heard, and numbers; 0 and 0 for one that the column lacks."""
    found = np.zeros((2, len(items)))
    for i, item in enumerate(items):
        reference, said = item["prompt"].removeprefix(PREFIX).split(), tokens(item["reference"])
        if len(said) != len(reference) or not set(reference) <= set(NUMBERS):
            raise SodaError(f"{item['name']}: {item['reference']!r} is no string of numbers, as compose.py makes them")
        if item[system] is not None:
            found[:, i] = in_order(item[system], reference, dict(zip(said, reference, strict=True))), len(reference)
    return found[0], found[1]


def main(run: Annotated[Path, typer.Argument(help="An evaluated run.")]) -> None:
    path = run / "evaluate" / "translation" / "items.json"
    items = read_json(path, list)
    if not items or SYSTEMS[-1] not in items[0]:
        raise SodaError(f"{path}: nothing was heard; evaluate with a recogniser, such as evaluate.judges=[whisper]")
    result: dict[str, dict[str, Any]] = {}
    print(f"{'language':<10}{'column':<10}" + "".join(f"{name:>8}" for name in ("heard", "of", "share", "from", "to")))
    for language in (*sorted({item["language"] for item in items}), "all"):
        some = [item for item in items if language in (item["language"], "all")]
        result[language] = {}
        for system in SYSTEMS:
            heard, of = counts(some, system)
            if not of.any():
                continue
            ((low, high),) = intervals(resampled(heard[:, None], of[:, None]))
            total, every = int(heard.sum()), int(of.sum())
            row = {"heard": total, "of": every, "share": total / every, "low": low, "high": high}
            result[language][system] = row
            shares = "".join(f"{row[name]:>8.3f}" for name in ("share", "low", "high"))
            print(f"{language:<10}{system:<10}{total:>8}{every:>8}{shares}")
    print(json.dumps(result))


if __name__ == "__main__":
    run_tool(main)
