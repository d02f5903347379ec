"""The top of the page: the model's name, the verdict, short facts, and tiles with key figures."""

import math
import re
from pathlib import Path
from typing import Any

from .reading import as_dict, last
from .words import big, finite, plain, span


def title(evaluation: dict, recipe: str, run: Path) -> str:
    named = re.search(r"^name:[ \t]*[\"']?([^\"'#\n]+)", recipe, re.MULTILINE)
    model = str(evaluation.get("model") or "").rstrip("/")
    return Path(model).name or (named and named[1].strip()) or run.resolve().name


def verdict(nll: dict[str, Any], trained: bool) -> tuple[str, str]:
    """A one-line verdict on the run, and its tone: good, mixed, bad or none."""
    compared = [row for row in nll["classes"] if row["change"] is not None]
    won = [row for row in compared if row["change"] < 0]
    if not compared:
        return "Not evaluated yet" if trained else "Not trained yet", "none"
    if len(won) == len(compared):
        return "Beats the per-slot unigram baseline on every class of token", "good"
    lost = ", ".join(plain(row["name"]) for row in compared if row not in won)
    if won:
        text = f"Beats the per-slot unigram baseline on {len(won)} of {len(compared)} classes of token; not on {lost}"
        return text, "mixed"
    return "Does not beat the per-slot unigram baseline on any class of token yet", "bad"


def parameters(*places: dict) -> float | None:
    names = ("parameters", "n_parameters", "num_parameters", "parameter_count", "params")
    found = (finite(as_dict(place).get(name)) for place in places for name in names)
    return next((value for value in found if value is not None), None)


def header(evaluation: dict, facts: dict, data: dict, train: list[dict]) -> list[str]:
    """Short facts below the name of the model."""
    count = parameters(evaluation, facts, as_dict(facts.get("model")), train[0] if train else {})
    tokens = last(train, "tokens")
    codec = as_dict(data.get("codec")).get("name")
    return [
        *([f"{big(count, digits=2)} parameters"] if count is not None else []),
        *([f"{big(tokens)} training tokens"] if tokens is not None else []),
        *([f"{span(hours * 3600)} of audio"] if (hours := finite(data.get("hours"))) is not None else []),
        *([f"codec {codec}"] if codec else []),
        *([str(facts["device"])] if isinstance(facts.get("device"), str) else []),
    ]


def tiles(train: list[dict], valid: list[dict], nll: dict, grammar: dict, data: dict) -> list[dict[str, str]]:
    """The key figures: name, value, and a short explanation."""
    found: list[dict[str, str]] = []

    def tile(name: str, value: str, note: str) -> None:
        found.append({"name": name, "value": value, "note": note})

    points, key = (valid, "valid_loss") if last(valid, "valid_loss") is not None else (train, "loss")
    end, start = last(points, key), last(points[::-1], key)
    if end is not None:
        kind = "Validation loss" if points is valid else "Training loss"
        tile(kind, f"{end:.3f}", "nats per token" + (f", from {start:.3f}" if start not in (None, end) else ""))
    for row, name in ((nll["all"], "All tokens"), (nll["acoustic_mean"], "Acoustic tokens")):
        if row and row["change"] is not None:
            bits = row["change"] / math.log(2)
            tile(name, f"{abs(bits):.2f} bits", f"{'saved' if bits < 0 else 'lost'} per token against the unigram")
    for share in (row for row in grammar["rows"] if row["name"] == "valid" and row["of"]):
        tile("Valid generations", f"{share['percent']:.3g} %", f"{share['value']:,} of {share['of']:,} sampled")
    tokens, step = last(train, "tokens"), last(train, "step")
    if tokens is not None:
        tile("Tokens trained", big(tokens), f"in {step:,.0f} steps" if step is not None else "")
    speeds = sorted(s for point in train if (s := finite(point.get("tokens_per_second"))) is not None)
    if speeds:
        tile("Speed", f"{speeds[len(speeds) // 2]:,.0f} /s", "tokens per second, median")
    seconds = last(train, "seconds")
    if seconds is not None:
        tile("Training time", span(seconds), "wall clock, from start to last step")
    hours, utterances = finite(data.get("hours")), finite(data.get("utterances"))
    if hours is not None:
        tile("Data", span(hours * 3600), f"of audio in {utterances:,.0f} utterances" if utterances else "of audio")
    return found
