"""The data section: what was prepared, in which languages and splits, and what was rejected."""

from collections import Counter
from typing import Any

from .reading import as_dict, as_list
from .words import finite, flatten, public

MOST_REJECTS = 50


def data_summary(data: dict[str, Any]) -> dict[str, Any] | None:
    if not data:
        return None
    rejects = as_list(data.get("rejects"))
    rows = [
        {"where": as_dict(reject).get("where"), "reason": as_dict(reject).get("reason")}
        if isinstance(reject, dict)
        else {"where": None, "reason": reject}
        for reject in rejects
    ]
    languages = [
        {"name": str(name), "utterances": row.get("utterances"), "seconds": finite(row.get("seconds"))}
        for name, row in as_dict(data.get("languages")).items()
        if isinstance(row, dict)
    ]
    languages.sort(key=lambda row: -(row["seconds"] or 0))
    longest = max((row["seconds"] or 0 for row in languages), default=0) or 1
    for row in languages:
        row["percent"] = 100 * (row["seconds"] or 0) / longest
    documents, tokens = as_dict(data.get("documents")), as_dict(data.get("tokens"))
    known = ("rejects", "languages", "documents", "tokens", "codec", "attribution", "classes", "reject_count")
    known += ("reject_reasons", "stores")
    reasons = as_dict(data.get("reject_reasons")) or Counter(str(row["reason"]).split(":")[0] for row in rows)
    return {
        "facts": flatten(public({key: value for key, value in data.items() if key not in known})),
        "codec": flatten(public(data.get("codec"))) if data.get("codec") else [],
        "splits": [
            {"name": name, "documents": documents.get(name), "tokens": tokens.get(name)} for name in documents | tokens
        ],
        "classes": flatten(data.get("classes")) if data.get("classes") else [],
        "languages": languages,
        "rejects": rows[:MOST_REJECTS],
        "reject_count": data.get("reject_count", len(rows)),
        "reject_reasons": Counter(reasons).most_common(8),
    }
