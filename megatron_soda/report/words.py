"""Formats values for the page: numbers, durations, names, and nested facts as labelled rows."""

import json
import math
from typing import Any

INTERNAL = ("key", "fingerprint", "fingerprints", "checksum", "checksums", "crc32", "sha256")


def finite(value: Any) -> float | None:
    """The value as a float if it is a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def number(value: Any) -> str:
    """Any scalar, for reading."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if not math.isfinite(value):
            return "not a number" if math.isnan(value) else "infinite"
        if value == int(value) and abs(value) < 1e15:
            return f"{value:,.0f}"
        if abs(value) >= 1000:
            return f"{value:,.1f}"
        return f"{value:.4g}"
    return str(value)


def fixed(value: Any) -> str:
    """With three decimals, for columns to compare."""
    return f"{value:,.3f}" if finite(value) is not None else number(value)


def exact(value: Any) -> str:
    """The same at full precision, for the attribute of a <data> element."""
    return json.dumps(value) if isinstance(value, int | float) else str(value)


def big(value: float, digits: int = 3) -> str:
    """1234567 becomes 1.23 M; `digits` is the minimum number of digits shown if there is a fraction."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scaled = value / (1e3 if unit == "k" else limit)
            return f"{scaled:.{max(0, digits - 1 - int(math.log10(abs(scaled))))}f} {unit}"
    return number(value)


def span(seconds: float | None) -> str:
    """A duration in its two largest units."""
    if seconds is None:
        return "–"
    if seconds < 10:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    if minutes < 60 * 48:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


def plain(name: Any) -> str:
    """acoustic_3 becomes acoustic 3."""
    return str(name).replace("_", " ")


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def flatten(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """All scalars of a nested value, each with its path as a label."""
    if isinstance(value, dict):
        return [row for key, part in value.items() for row in flatten(part, f"{name} › {key}" if name else str(key))]
    if isinstance(value, list):
        if not any(isinstance(part, dict | list) for part in value):
            return [(name, ", ".join(map(number, value)) or "none")]
        return [row for index, part in enumerate(value, 1) for row in flatten(part, f"{name} › {index}")]
    return [(name, value)]


def groups(facts: dict[str, Any]) -> list[tuple[str, list[tuple[str, Any]]]]:
    """Scalars first without a heading, then each nested part under its own."""
    nested = {key: part for key, part in facts.items() if isinstance(part, dict | list) and part}
    plain_facts = [(key, part) for key, part in facts.items() if key not in nested]
    named = [(key, flatten(part)) for key, part in nested.items()]
    return ([("", plain_facts)] if plain_facts else []) + named


def public(value: Any) -> Any:
    """Without keys and fingerprints, which only mean something to the program."""
    if isinstance(value, dict):
        return {key: public(part) for key, part in value.items() if not str(key).endswith(INTERNAL)}
    return [public(part) for part in value] if isinstance(value, list) else value
