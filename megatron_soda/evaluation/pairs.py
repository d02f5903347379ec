"""Likelihood benchmarks: which of two recordings or texts, of which one is right, does the model find more likely?

Two ways of scoring stand side by side. `paper`: the mean log-probability over the tokens of all codebooks, a tie is
wrong; that is what the paper's figures are. The others: sums and means over the first codebooks only or all of them,
a tie counts one half. Markers are never scored.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import SodaError
from .bootstrap import intervals, resampled
from .suite import Row, Suite

if TYPE_CHECKING:
    from .bench import Bench
    from .pair_files import Pair, Side

NAMED = 20  # pairs left out that the result names
SCORING = "mean and sum of log-probabilities, version 1"
MEANINGS = {
    "paper": "the paper's score: mean over all tokens, ties are wrong",
    "mean": "mean over all tokens, ties count half",
    "sum": "sum over all tokens, ties count half",
    "semantic_mean": "mean over semantic tokens, ties count half",
    "semantic_sum": "sum over semantic tokens, ties count half",
}


class PairSuite(Suite):
    """Base of the benchmarks. They lie in evaluate.benchmarks, each in a folder of its name."""

    folder: ClassVar[str] = ""  # whose data it uses; empty: its own name
    spoken: ClassVar[bool] = True  # otherwise it scores the transcripts
    counted = "pairs"

    @abstractmethod
    def read(self, folder: Path) -> list["Pair"]:
        """The pairs of a folder (pair_files.py)."""

    def text(self, transcript: str) -> str:
        """What of a transcript is scored."""
        return transcript

    def check(self, bench: "Bench") -> None:
        self.pairs(bench)
        if self.spoken:
            _ = bench.codec

    def pairs(self, bench: "Bench") -> list["Pair"]:
        """SodaError if they are not there, or not all of them."""
        root = bench.recipe.evaluate.benchmarks
        folder = Path(root) / (self.folder or self.name)
        if not root or not folder.is_dir():
            raise SodaError(
                f"evaluate.benchmarks={root}: the suite {self.name} reads the folder {folder.name} in it, "
                f"{'and it is not set' if not root else 'which is not there'}. docs/evaluation.md says where the data "
                "come from and in which layouts they are read."
            )
        pairs = self.read(folder)
        if self.spoken:
            return pairs
        if empty := [pair.name for pair in pairs if not (pair.positive.text.strip() and pair.negative.text.strip())]:
            raise SodaError(f"{folder}: {len(empty)} pairs have no transcripts to score, the first is {empty[0]}")
        texts = {(pair.positive.text, pair.negative.text): pair for pair in reversed(pairs)}
        return sorted(texts.values(), key=lambda pair: pair.name)  # several voices say the same

    def measure(self, bench: "Bench") -> dict[str, Any]:
        from .likelihood import class_sums, context_of

        pairs = self.pairs(bench)
        sides = [side for pair in pairs for side in (pair.positive, pair.negative)]
        documents, hashes = self._spoken(bench, sides) if self.spoken else self._written(bench, sides)
        fits = [len(document) <= context_of(bench.model) for document in documents]
        chosen = [i for i in range(len(pairs)) if fits[2 * i] and fits[2 * i + 1]]
        too_long = [pairs[i].name for i in range(len(pairs)) if not (fits[2 * i] and fits[2 * i + 1])]
        if not chosen:
            raise SodaError(f"{self.name}: all {len(pairs)} pairs are longer than the model's context")
        scored = [documents[2 * i + side] for i in chosen for side in (0, 1)]
        slots = bench.slots if self.spoken else bench.model.space.codebooks
        sums = class_sums(bench, self.name, scored, slots)
        nats = sums[:, 2 : 2 + slots] if self.spoken else sums[:, :1]
        tokens = np.array([len(document) - 3 for document in scored])  # but BOS and the two markers
        data = [f"{pair.task}\t{pair.group}\t{pair.name}" for pair in pairs] + hashes
        return {
            "pairs": len(pairs),
            **accuracies([pairs[i] for i in chosen], nats.reshape(len(chosen), 2, -1), tokens.reshape(-1, 2)),
            "longer_than_the_context": {"count": len(too_long), "first": too_long[:NAMED], "policy": "left out"},
            "softmax": bench.softmax,
            "must_match": {
                "scoring": SCORING,
                "data": hashlib.sha256("\n".join(data).encode()).hexdigest()[:32],
            },
        }

    def _spoken(self, bench: "Bench", sides: Sequence["Side"]) -> tuple[list[np.ndarray], list[str]]:
        from .codes import encoded

        space, slots = bench.model.space, bench.slots
        sounds = [side.sound for side in sides]
        codes, hashes = encoded(sounds, bench.codec, Path(bench.recipe.evaluate.benchmarks), bench.run)
        ids = [space.audio_ids(one).reshape(-1, space.codebooks)[:, :slots].reshape(-1) for one in codes]
        return [np.array([space.bos, space.audio_start, *one, space.audio_end], np.int32) for one in ids], hashes

    def _written(self, bench: "Bench", sides: Sequence["Side"]) -> tuple[list[np.ndarray], list[str]]:
        space, texts = bench.model.space, [self.text(side.text) for side in sides]
        ids = bench.model.text.encode_batch(texts)
        return [np.array([space.bos, space.text_start, *one, space.text_end], np.int32) for one in ids], texts

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        return [
            Row(
                f"{task}: {rule}" if task else rule,
                row["accuracy"],
                label=f"{task}: {rule}" if task else rule,
                count=of_task["pairs"],
                interval=(row["low"], row["high"]),
                of=1.0,
                meaning="" if task else MEANINGS[rule],
                total=not task,
            )
            for task, of_task in (("", result["all"]), *result["tasks"].items())
            for rule, row in of_task["accuracies"].items()
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in result.items() if key not in ("all", "tasks", "items", "must_match")}


def accuracies(pairs: Sequence["Pair"], nats: np.ndarray, tokens: np.ndarray) -> dict[str, Any]:
    """nats: float64 (pairs, 2, levels) of the positive and the negative side by codebook (or of the text); tokens:
    (pairs, 2), of all levels together. Returns the accuracy by every rule, of all pairs and of each task."""
    levels = nats.shape[2]
    upto = nats.cumsum(2)  # of the first codebooks
    counts = tokens[..., None] / levels * np.arange(1, levels + 1)
    by_sum, by_mean = (_right(values) for values in (upto, upto / counts))
    right = {"paper": np.floor(by_mean[:, -1]), "mean": by_mean[:, -1], "sum": by_sum[:, -1]}
    if levels > 1:
        right |= {"semantic_mean": by_mean[:, 0], "semantic_sum": by_sum[:, 0]}
    groups = [pair.group or pair.name for pair in pairs]
    tasks = np.array([pair.task for pair in pairs])
    _, number, size = np.unique(groups, return_inverse=True, return_counts=True)
    weight = 1 / size[number]
    result: dict[str, Any] = {"all": _accuracies(right, weight, groups), "tasks": {}}
    for task in sorted(set(tasks.tolist()) - {""}):
        chosen = np.flatnonzero(tasks == task)
        some = {rule: values[chosen] for rule, values in right.items()}
        result["tasks"][task] = _accuracies(some, weight[chosen], [groups[i] for i in chosen])
    if levels > 1:
        result["first_codebooks"] = {
            str(level + 1): {
                name: float(weight @ values[:, level] / weight.sum())
                for name, values in (("mean", by_mean), ("sum", by_sum))
            }
            for level in range(levels)
        }
    figures = {rule: {"sums": (weight * values).tolist(), "counts": weight.tolist()} for rule, values in right.items()}
    names = [pair.name for pair in pairs]
    return result | {"items": {"names": names, "groups": groups, "tasks": tasks.tolist(), "figures": figures}}


def _right(nats: np.ndarray) -> np.ndarray:
    """(pairs, 2, ..) -> 1 where the positive side has less, .5 for a tie, otherwise 0."""
    return (nats[:, 0] < nats[:, 1]) + 0.5 * (nats[:, 0] == nats[:, 1])


def _accuracies(right: Mapping[str, np.ndarray], weight: np.ndarray, groups: Sequence[str]) -> dict[str, Any]:
    values = np.stack(list(right.values()), 1)
    sums, counts = weight[:, None] * values, np.repeat(weight[:, None], values.shape[1], 1)
    ranges = intervals(resampled(sums, counts, groups))
    return {
        "pairs": len(weight),
        "accuracies": {
            rule: {"accuracy": float(total / weight.sum()), "low": low, "high": high}
            for rule, total, (low, high) in zip(right, sums.sum(0), ranges, strict=True)
        },
    }
