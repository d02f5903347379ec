"""What the suites of recognition, synthesis, continuation and translation share: figures of three columns, one for the
recordings, one for what the codec makes of them, which is the best that a model could reach, and one for the model."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import SodaError
from ..files import write_json
from .bootstrap import intervals, resampled
from .suite import Row, Suite
from .words import Normaliser, word_errors

if TYPE_CHECKING:
    from .bench import Bench

SYSTEMS = ("original", "codec", "model")
SHOWN = 3  # of the worst and of the best items, with their sounds
Values = tuple[np.ndarray, np.ndarray]  # of each item: sums, and counts


class SpokenSuite(Suite):
    needs = ("codec",)
    beside = SYSTEMS[:2]
    unit = "model"
    counted = "items"

    def check(self, bench: "Bench") -> None:
        super().check(bench)
        if bench.slots < bench.model.space.codebooks:
            raise SodaError(f"{self.name}: a model of semantic codes alone makes no sound that could be judged")
        _ = bench.panel

    def normalisers(self, bench: "Bench") -> dict[str, str]:
        """Of what is heard in generated speech; none are needed without a recogniser. SodaError if one is not
        installed."""
        from .words import check_whisper

        authors = {"authors": "lower case, punctuation but apostrophes removed (version 1)"}
        return authors | {"whisper": check_whisper()} if bench.panel.that("words") else {}

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        return [
            Row(
                name,
                row["model"],
                count=row.get("items"),
                beside=tuple(row.get(system) for system in SYSTEMS[:2]),
                of=row.get("of"),
                interval=(row["low"], row["high"]) if "low" in row else None,
                meaning=row.get("meaning", ""),
            )
            for name, row in result["figures"].items()
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in result.items() if key not in ("figures", "items", "must_match", "shown")}


@dataclass
class Figures:
    """A suite's figures by name, in order: each is sum / count over the items, in up to three columns."""

    names: Sequence[str]  # of the items
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    items: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # for `soda compare`: the model's

    def count(self, name: str, value: int, meaning: str) -> None:
        self.rows[name] = {"model": value, "of": len(self.names), "meaning": meaning}

    def mean(self, name: str, meaning: str, columns: Mapping[str, Values | None], of: float | None = None) -> None:
        """`of`: the largest that the value can be."""
        there = {system: values for system, values in columns.items() if values and values[1].sum()}
        row: dict[str, Any] = {system: float(sums.sum() / counts.sum()) for system, (sums, counts) in there.items()}
        row |= {"model": row.get("model"), "of": of, "meaning": meaning, "items": 0}
        if "model" in there:
            sums, counts = there["model"]
            row["items"] = int((counts > 0).sum())
            (row["low"], row["high"]) = intervals(resampled(sums[:, None], counts[:, None]))[0]
            self.items[name] = {"sums": sums.tolist(), "counts": counts.tolist()}
        if "original" in there and "codec" in there:
            row["codec_less_original"] = _difference(there["original"], there["codec"])
        self.rows[name] = row

    def result(self) -> dict[str, Any]:
        return {"figures": self.rows, "items": {"names": list(self.names), "figures": self.items}}


def _difference(first: Values, second: Values) -> dict[str, float]:
    """Over the items that both columns have."""
    both = (first[1] > 0) & (second[1] > 0)
    draws = [resampled(sums[both, None], counts[both, None]) for sums, counts in (first, second)]
    values = [sums[both].sum() / counts[both].sum() for sums, counts in (first, second)]
    low, high = intervals(draws[1] - draws[0])[0]
    return {"value": float(values[1] - values[0]), "low": low, "high": high}


@dataclass(frozen=True)
class Heard:
    """Texts of the items, as one column has them. said: what should be in them; heard: None for an item that this
    column lacks, which only the recordings may."""

    said: Sequence[str]
    heard: Sequence[str | None]

    def errors(self, normaliser: Normaliser, languages: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each item float64: wrong words, words, and 1 if there is a text."""
        found = np.zeros((3, len(self.said)))
        for i, (said, heard, language) in enumerate(zip(self.said, self.heard, languages, strict=True)):
            if heard is not None:
                words = normaliser(said, language)
                found[:, i] = word_errors(words, normaliser(heard, language)), max(1, len(words)), 1
        return found[0], found[1], found[2]


def error_figures(
    figures: Figures,
    normalisers: Mapping[str, Normaliser],
    languages: Sequence[str],
    columns: Mapping[str, Heard],
    order: Sequence[str] = ("corpus", "utterance"),
    title: str = "WER",
) -> np.ndarray:
    """Adds the word error rates by each normaliser, over all words (corpus) and as the mean over the utterances.
    Returns the model's in each item, by the first normaliser."""
    first = np.zeros(0)
    for name, normaliser in normalisers.items():
        errors = {system: column.errors(normaliser, languages) for system, column in columns.items()}
        rates: dict[str, dict[str, Values | None]] = {
            "corpus": {system: (wrong, words) for system, (wrong, words, _) in errors.items()},
            "utterance": {
                system: (wrong / np.maximum(words, 1), there) for system, (wrong, words, there) in errors.items()
            },
        }
        for kind in order:
            meaning = "wrong words / words" if kind == "corpus" else "mean over the utterances"
            figures.mean(
                f"{title} {kind}, {name}", f"{meaning}, with the {name} normaliser; lower is better", rates[kind]
            )
        if not len(first):
            first = rates["utterance"]["model"][0]  # pyright: ignore[reportOptionalSubscript]
    return first


def cosines(verdicts: Sequence[Any], references: Sequence[Any], worst: float | None) -> Values:
    """Of voices to those of the references; worst: for an item without a voice, None to leave it out. An item whose
    reference has no voice is left out."""
    found = np.zeros((2, len(verdicts)))
    for i, (one, other) in enumerate(zip(verdicts, references, strict=True)):
        if other is not None and one is not None:
            a, b = np.array(one), np.array(other)
            found[:, i] = a @ b / np.sqrt((a @ a) * (b @ b)), 1
        elif other is not None and worst is not None:
            found[:, i] = worst, 1
    return found[0], found[1]


def scores(verdicts: Sequence[Any], worst: float | None) -> Values:
    """Of how good sounds are; worst: as for `cosines`."""
    found = [worst if verdict is None else verdict for verdict in verdicts]
    return np.array([value or 0.0 for value in found]), np.array([float(value is not None) for value in found])


def chosen(items: Sequence[Any], most: int) -> list[Any]:
    return list(items[: most or len(items)])


def digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def keep_items(
    bench: "Bench",
    suite: str,
    items: Sequence[dict[str, Any]],
    rank: np.ndarray,
    sounds: Mapping[str, Callable[[int], np.ndarray]],
) -> dict[str, list[dict[str, Any]]]:
    """Writes RUN/evaluate/SUITE/items.json, and the sounds of the worst and the best items beside it. rank: lower is
    better. Returns those items."""
    folder = bench.studio.out / suite
    write_json(folder / "items.json", items)
    for old in folder.glob("*.wav"):
        old.unlink()
    order = np.argsort(rank, kind="stable").tolist()
    found: dict[str, list[dict[str, Any]]] = {}
    for which, numbers in (("worst", order[::-1][:SHOWN]), ("best", order[:SHOWN])):
        found[which] = []
        for place, i in enumerate(numbers):
            audio = {}
            for system, sound in sounds.items():
                if len(wave := sound(i)):
                    audio[system] = bench.studio.save(f"{suite}/{which}_{place}_{system}", wave)
            found[which].append({**items[i], "audio": audio})
    return found
