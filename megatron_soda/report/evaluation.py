"""The results section: the likelihood against the unigram, and the counts of the token grammar."""

import math
from typing import Any

from .classes import class_order
from .reading import as_dict
from .words import finite, flatten

GRAMMAR = {
    "valid": "follow the token grammar from start to end",
    "duration_exact": "every audio span decodes to exactly its number of frames",
    "audio_spans": "spans of audio in all these generations together",
    "ended_by_itself": "were ended by the model, not by the length limit",
    "legal_mass_mean": "mean probability that the model gives to legal tokens, before the grammar removes the others",
    "free_valid": "follow the grammar without being held to it",
    "free_legal_mass_mean": "mean probability the model itself puts on tokens the grammar allows",
}
PROBABILITIES = ("legal_mass_mean", "free_legal_mass_mean")
PLAIN_COUNTS = ("audio_spans",)  # not out of the generations
TOTALS = ("acoustic_mean", "all")
NLL_KEYS = ("tokens", "model_nats", "model_bits", "unigram_nats", "unigram_bits")
NATS_TO_BITS = 1 / math.log(2)


def nll_table(nll: dict[str, Any]) -> dict[str, Any]:
    """Rows of the table; `change` is model minus unigram in nats, negative where the model is better."""
    classes = [nll_row(str(name), row) for name, row in as_dict(nll.get("classes")).items() if isinstance(row, dict)]
    classes.sort(key=lambda row: class_order(row["name"]))
    totals = {name: nll_row(name, nll[name]) if isinstance(nll.get(name), dict) else None for name in TOTALS}
    rows = classes + [row for row in totals.values() if row]
    shown = [value for row in rows for value in (row["model_nats"], row["unigram_nats"])]
    top = max((value for value in map(finite, shown) if value is not None), default=1.0) or 1.0
    for row in rows:
        for name in ("model", "unigram"):
            value = finite(row[f"{name}_nats"])
            row[f"{name}_percent"] = None if value is None else max(0.0, 100 * value / top)
    rest = {key: value for key, value in nll.items() if key not in ("classes", *TOTALS)}
    return {"classes": classes, "rows": rows, **totals, "more": flatten(rest)}


def nll_row(name: str, row: dict[str, Any]) -> dict[str, Any]:
    model, unigram = finite(row.get("model_nats")), finite(row.get("unigram_nats"))
    change = None if model is None or unigram is None else model - unigram
    found = {key: row.get(key) for key in NLL_KEYS}
    rest = flatten({key: value for key, value in row.items() if key not in NLL_KEYS})
    bits = None if change is None else change * NATS_TO_BITS
    return {"name": name, "change": change, "change_bits": bits, "total": name in TOTALS, "more": rest, **found}


def grammar_rows(grammar: dict[str, Any]) -> dict[str, Any]:
    """Counts out of all generations and probabilities as bars, plain counts without; the rest as plain facts."""
    of = finite(grammar.get("generations"))
    rows: list[dict[str, Any]] = []
    for key, meaning in GRAMMAR.items():
        value = finite(grammar.get(key))
        if value is None:
            continue
        row = {"key": key, "meaning": meaning, "value": int(value), "percent": None, "of": None}
        if key in PROBABILITIES:
            rows.append(row | {"value": value, "percent": 100 * value})
        elif key in PLAIN_COUNTS:
            rows.append(row)
        elif of and value <= of:
            rows.append(row | {"percent": 100 * value / of, "of": int(of)})
    shown = {row["key"] for row in rows}
    return {"rows": rows, "more": flatten({key: value for key, value in grammar.items() if key not in shown})}
