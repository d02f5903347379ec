"""Speech-to-speech translation: whether the model says in the target language what it heard, by likelihood and by what
it writes on the way (paper, section 9)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SodaError
from ...registry import SUITES
from ..bootstrap import intervals, resampled
from ..suite import Row, Suite, row_of_gain
from ..translations import Pair, Side, Written, document, pairs_of, write_texts

if TYPE_CHECKING:
    from ..bench import Bench

CHOICES = 50  # translations that a source is matched with
PARTS = {  # what is predicted, and what is wrong in the comparison
    "audio": "The translation's sound; sound and texts of another source",
    "audio_own_texts": "The translation's sound; only the sound of another source",
    "text": "Both texts; the sound of another source",
}
TEXTS = {
    "source_text": "Share of sources not written down exactly",
    "target_text": "Share of translations not written exactly, after the model's own source text",
    "chain": "Share of sources with an error in either text",
}


@SUITES.register
class SpeechTranslation(Suite):
    name = "s2st"
    title = "Speech-to-speech translation"
    about = (
        "How surprised the model is by a recorded translation that follows its own source, against the same "
        "translation after another source of the same length; how many sources it writes down and translates without "
        "an error; and how often the right translation among many gains the most likelihood from the source."
    )
    needs = ("utterances",)
    small_unit, counted, against = "bits", "items", "wrong one"

    def check(self, bench: "Bench") -> None:
        from ..speech_files import translated

        super().check(bench)
        translated(bench, self.name)

    def measure(self, bench: "Bench") -> dict[str, Any]:
        from ...data.units import translations
        from ..likelihood import context_of, digest_of

        every = pairs_of(bench)
        chosen = with_partners(every, bench.recipe.seed, context_of(bench.model))
        pairs, space = [own for own, _ in chosen], bench.model.space
        if not pairs:
            raise SodaError(
                f"{bench.recipe.data_folder}: none of the {len(every)} pairs that fit the model's context has another "
                "of the same languages whose source is at least as long"
            )
        written = write_texts(bench, pairs)
        documents = [document(own, own.target, space)[0] for own in pairs]
        parts, figures = likelihoods(bench, chosen)
        wrong = mistakes(pairs, written)
        figures |= {
            f"errors_{part}": {"sums": column.tolist(), "counts": [1.0] * len(pairs)}
            for part, column in zip(TEXTS, wrong.T, strict=True)
        }
        return {
            **parts,
            "errors": errors(wrong),
            "retrieval": retrieval(bench, pairs, written),
            "pairs": len(pairs),
            "left_out": len(translations(bench.utterances)) - len(pairs),
            "softmax": bench.softmax,
            "texts": [
                {"id": own.id, "texts": [own.source.said, own.target.said], "written": list(wrote.said)}
                for own, wrote in zip(pairs, written, strict=True)
            ],
            "items": {"names": [own.id for own in pairs], "figures": figures},
            "must_match": {
                "tokens": bench.model.made_by,
                "softmax": bench.softmax,
                "seed": bench.recipe.seed,
                "data": digest_of(documents),
            },
        }

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        found = [
            row_of_gain(part, label, row, total=part == "audio")
            for part, label in PARTS.items()
            if isinstance(row := result.get(part), Mapping)
        ]
        found += [
            Row(f"errors_{part}", row["share"], label=label, count=row["count"], interval=(row["low"], row["high"]))
            for part, label in TEXTS.items()
            if isinstance(row := result.get("errors", {}).get(part), Mapping)
        ]
        return found + [
            Row(
                f"retrieval_{direction}",
                row["missed"],
                label=f"{direction}: share of sources whose translation is not the first of {row['choices']}; "
                "the wrong one: chosen by length",
                count=row["count"],
                baseline=row["missed_by_length"],
                interval=(row["low"], row["high"]),
            )
            for direction, row in result.get("retrieval", {}).items()
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: result[key] for key in ("pairs", "left_out", "softmax", "texts") if key in result}


# ---- partners


def with_partners(pairs: Sequence[Pair], seed: int, longest: int) -> list[tuple[Pair, Pair]]:
    """Each pair with another of the same languages and other words, whose source is cut to the same length. Pairs for
    which there is none are left out.

    It is the one whose texts are closest in length, so that lengths give nothing away, and of those the one whose
    source is closest. Ties are broken by lot.
    """
    lot = np.random.default_rng(seed).permutation(len(pairs))
    found = []
    for own in pairs:

        def distance(i: int, own: Pair = own) -> tuple[int, int, int]:
            other = pairs[i]
            texts = [len(other.source.text) - len(own.source.text), len(other.target.text) - len(own.target.text)]
            return abs(texts[0]) + abs(texts[1]), len(other.source.audio), int(lot[i])

        room = longest - len(own.source.audio) - len(own.target.audio) - 10
        allowed = [
            i
            for i, other in enumerate(pairs)
            if other.direction == own.direction
            and other.source.said != own.source.said
            and other.target.said != own.target.said
            and len(other.source.audio) >= len(own.source.audio)
            and len(other.source.text) + len(other.target.text) <= room
        ]
        if allowed:
            other = pairs[min(allowed, key=distance)]
            cut = replace(other.source, audio=other.source.audio[: len(own.source.audio)])
            found.append((own, replace(other, source=cut)))
    return found


# ---- likelihood


def likelihoods(bench: "Bench", chosen: Sequence[tuple[Pair, Pair]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """PARTS, in nats a token; and the sums of every pair, for `soda compare`."""
    from ..likelihood import class_sums

    space = bench.model.space
    documents: list[np.ndarray] = []
    first: list[int] = []
    for own, other in chosen:
        right, text, _ = document(own, own.target, space)
        mixed, *_ = document(other, own.target, space, texts=own)
        wrong, _, sound = document(other, own.target, space)
        documents += [right, mixed, wrong]
        first += [text, text, sound]
    sums = class_sums(bench, "s2st", documents, space.codebooks, first).reshape(len(chosen), 3, -1)
    audio, text = sums[:, :, 2:].sum(2), sums[:, :, 0]
    frames = np.array([float(len(own.target.audio)) for own, _ in chosen])
    words = np.array([float(len(own.source.text) + len(own.target.text)) for own, _ in chosen])
    parts = {
        "audio": (audio[:, 0], audio[:, 2], frames),
        "audio_own_texts": (audio[:, 0], audio[:, 1], frames),
        "text": (text[:, 0], text[:, 1], words),
    }
    figures = {
        f"{part}_{given}": {"sums": nats.tolist(), "counts": counts.tolist()}
        for part, (right, wrong, counts) in parts.items()
        for given, nats in (("right", right), ("wrong", wrong), ("gain", wrong - right))
    }
    return {part: _part(*values) for part, values in parts.items()}, figures


def _part(right: np.ndarray, wrong: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    ((low, high),) = intervals(resampled((wrong - right)[:, None], counts[:, None]))
    mean = {name: float(nats.sum() / counts.sum()) for name, nats in (("right", right), ("wrong", wrong))}
    return {
        "tokens": int(counts.sum()),
        **{f"{name}_nats": value for name, value in mean.items()},
        "gain": mean["wrong"] - mean["right"],
        "gain_low": low,
        "gain_high": high,
    }


def mistakes(pairs: Sequence[Pair], written: Sequence[Written]) -> np.ndarray:
    """float64 (pairs, TEXTS): 1 where a text is not exactly the reference."""
    wrong = np.array(
        [
            [own.source.said != wrote.said[0], own.target.said != wrote.said[1]]
            for own, wrote in zip(pairs, written, strict=True)
        ],
        float,
    )
    return np.column_stack([wrong, wrong.max(1)])


def errors(wrong: np.ndarray) -> dict[str, Any]:
    ranges = intervals(resampled(wrong, np.ones_like(wrong)))
    return {
        part: {"share": float(share), "low": low, "high": high, "count": len(wrong)}
        for part, share, (low, high) in zip(TEXTS, wrong.mean(0), ranges, strict=True)
    }


# ---- retrieval


def retrieval(bench: "Bench", pairs: Sequence[Pair], written: Sequence[Written]) -> dict[str, Any]:
    """For each direction, CHOICES sources, each with all their translations to choose from. Given a source and the
    texts that the model writes after it, the model's choice is the sound whose likelihood is furthest above its
    likelihood at the start of a document. A choice by length takes the one closest to the usual ratio."""
    from ..likelihood import context_of

    found = {}
    for direction in sorted({pair.direction for pair in pairs}):
        chosen: dict[str, tuple[Pair, Written]] = {}
        for own, wrote in zip(pairs, written, strict=True):
            if own.direction == direction:
                chosen.setdefault(own.target.said, (own, wrote))  # the same words would be right too
        some = _fitting(list(chosen.values())[:CHOICES], context_of(bench.model))
        if len(some) < 2:
            continue
        gains = _gains(bench, [own.target for own, _ in some], [wrote.ids for _, wrote in some])
        sources = np.array([len(own.source.audio) for own, _ in some], float)
        targets = np.array([len(own.target.audio) for own, _ in some], float)
        by_length = -np.abs(targets[None] - sources[:, None] * targets.sum() / sources.sum())
        missed = np.column_stack([_missed(gains), _missed(by_length)])
        differences = missed[:, :1] - missed[:, 1:]
        ((low, high),) = intervals(resampled(differences, np.ones_like(differences)))
        share, share_by_length = missed.mean(0).tolist()
        found[direction] = {
            "choices": len(some),
            "count": len(some),
            "missed": share,
            "missed_by_length": share_by_length,
            "low": low,
            "high": high,
        }
    return found


def _fitting(some: list[tuple[Pair, Written]], context: int) -> list[tuple[Pair, Written]]:
    """Those whose written texts leave room for the longest translation."""
    longest = max(len(own.target.audio) for own, _ in some)
    return [(own, wrote) for own, wrote in some if len(wrote.ids) + longest + 3 <= context]


def _gains(bench: "Bench", targets: Sequence[Side], prefixes: Sequence[list[int]]) -> np.ndarray:
    """float64 (prefixes, targets): nats by which a prefix makes a target's sound likelier."""
    from ..likelihood import class_sums

    space = bench.model.space
    sounds = [[space.audio_start, *side.audio, space.audio_end, space.eos] for side in targets]
    documents, first = [], []
    for prefix in [[space.bos], *prefixes]:
        for sound in sounds:
            documents.append(np.array([*prefix, *sound], np.int32))
            first.append(len(prefix))
    sums = class_sums(bench, "s2st-retrieval", documents, space.codebooks, first)[:, 2:].sum(1)
    alone, *given = sums.reshape(-1, len(sounds))
    return alone - np.array(given)


def _missed(scores: np.ndarray) -> np.ndarray:
    """float64: 1 where the choice with the highest score is not the one with the source's own number; if several have
    it, the share of the others."""
    best = scores == scores.max(1, keepdims=True)
    return 1 - np.diag(best) / best.sum(1)
