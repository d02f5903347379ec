"""The times section: how long every stage and its parts took."""

from typing import Any

from .words import finite, flatten


def timings(stages: dict[str, Any]) -> list[dict[str, Any]]:
    """Each stage with its total and its parts; the bars share one scale."""
    found = []
    for stage, parts in stages.items():
        named = parts if isinstance(parts, dict) else {"seconds": parts}
        rows = [(name, value) for name, value in flatten(named) if name != "seconds"]
        timed = [{"name": name, "seconds": value} for name, part in rows if (value := finite(part)) is not None]
        other = [(name, value) for name, value in rows if finite(value) is None]
        total = finite(named.get("seconds"))
        if total is None and timed:
            total = sum(part["seconds"] for part in timed)
        found.append({"name": stage, "seconds": total, "parts": timed, "other": other})
    top = max((part["seconds"] or 0 for stage in found for part in [stage, *stage["parts"]]), default=0) or 1
    for stage in found:
        for part in [stage, *stage["parts"]]:
            part["percent"] = 100 * max(0, part["seconds"] or 0) / top
    return found
