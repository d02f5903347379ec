"""The cross-modal gain: how much better the model predicts sound given its own text than given another, and text given
its own sound. It shows a link between the two long before a word error rate does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import SodaError
from ...registry import SUITES
from ..bootstrap import intervals, resampled
from ..suite import Row, Suite, row_of_gain

if TYPE_CHECKING:
    from ...vocab import TokenSpace
    from ..bench import Bench

NAMED = 20  # utterances left out that the result names
PARTS = {  # what is predicted, and given what
    "semantic": "Semantic tokens, given the text",
    "acoustic": "Acoustic tokens, given the text",
    "audio": "All audio tokens, given the text",
    "text": "Text, given the audio",
}
GIVEN = ("right", "wrong", "alone")


@dataclass(frozen=True)
class Utterance:
    id: str
    text: np.ndarray  # int32 ids
    audio: np.ndarray  # int32 ids, whole frames
    said: str
    language: str
    speaker: str
    recording: str


@SUITES.register
class Gain(Suite):
    name = "gain"
    title = "The link between text and sound"
    about = (
        "How surprised the model is by sound that follows its own transcript, against the same sound after another "
        "utterance's transcript of as many tokens in the same language; and by text that follows its own sound, "
        "against the same text after another sound of the same length. A model that does not connect the two gains "
        "nothing. The range below a difference is its 95 % interval over utterances."
    )
    needs = ("utterances",)
    unit, small_unit, counted, against = "nats", "bits", "tokens", "wrong one"

    def check(self, bench: "Bench") -> None:
        super().check(bench)
        if not any(row["text"] for row in bench.utterances):
            where = f"{bench.recipe.data_folder}: no utterance of the {bench.recipe.evaluate.split} split"
            raise SodaError(
                f"{where} has a transcript, so there is no text to relate sound to. Leave gain out of evaluate.suite."
            )

    def measure(self, bench: "Bench") -> dict[str, Any]:
        from ...codecs.description import read_description
        from ..likelihood import class_sums, context_of, digest_of

        space, codec = bench.model.space, read_description(bench.recipe.data_folder)
        rows = [row for row in bench.utterances if row["text"] and len(row["codes"])]
        rows = rows[: bench.recipe.evaluate.documents or len(rows)]
        texts = bench.model.text.encode_batch([row["text"] for row in rows])
        every = [_utterance(row, text, space) for row, text in zip(rows, texts, strict=True)]
        fitting = [u for u in every if len(u.text) + len(u.audio) + 6 <= context_of(bench.model)]
        chosen = with_partners(fitting, bench.recipe.seed)
        if len(chosen) < 2:
            raise SodaError(
                f"{bench.recipe.data_folder}: only {len(chosen)} of {len(every)} utterances with a transcript fit the "
                "model's context and have another of at least the same length in the same language; the gain needs two"
            )
        documents = [document for one in chosen for document in _documents(*one, space)]
        sums = class_sums(bench, self.name, documents, space.codebooks).reshape(len(chosen), 4, -1)
        kept = [own for own, _, _ in chosen]
        result = summary(kept, sums, codec.sample_rate / codec.samples_per_frame, space.codebooks)
        fit, used = {u.id for u in fitting}, {u.id for u in kept}
        left = [u.id for u in every if u.id not in used]
        return result | {
            "utterances": len(kept),
            "left_out": {
                "longer than the context": _named([name for name in left if name not in fit]),
                "none as long in the same language": _named([name for name in left if name in fit]),
            },
            "softmax": bench.softmax,
            "must_match": {
                "tokens": bench.model.made_by,
                "softmax": bench.softmax,
                "seed": bench.recipe.seed,
                "data": digest_of(documents),
            },
        }

    def rows(self, result: Mapping[str, Any]) -> list[Row]:
        return [
            row_of_gain(f"{part}_given_{'audio' if part == 'text' else 'text'}", label, row, total=part == "audio")
            for part, label in PARTS.items()
            if isinstance(row := result.get(part), Mapping)
        ]

    def rest(self, result: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in result.items() if key not in ("items", "must_match")}


def _utterance(row: Mapping[str, Any], text: list[int], space: "TokenSpace") -> Utterance:
    names = {name: row[name] or "" for name in ("language", "speaker")}
    names["recording"] = row["recording"] or row["id"]
    said = " ".join(row["text"].casefold().split())
    return Utterance(row["id"], np.array(text, np.int32), space.audio_ids(row["codes"]), said, **names)


def with_partners(utterances: Sequence[Utterance], seed: int) -> list[tuple[Utterance, np.ndarray, np.ndarray]]:
    """Each utterance with a wrong text and a wrong sound of exactly its lengths. Utterances for which there is none are
    left out.

    Both come from other recordings of other words in the same language, else the language alone would give them away.
    Among those, the text comes from an utterance of the same length, else from the next longer one, cut; the sound from
    the same speaker if possible. Ties are broken by lot.
    """
    lot = np.random.default_rng(seed).permutation(len(utterances))
    language, said, recording, speaker = (
        np.unique([getattr(u, name) for u in utterances], return_inverse=True)[1]
        for name in ("language", "said", "recording", "speaker")
    )
    texts = np.array([len(u.text) for u in utterances])
    sounds = np.array([len(u.audio) for u in utterances])
    found = []
    for i, own in enumerate(utterances):
        others = (language == language[i]) & (said != said[i]) & (recording != recording[i])
        text = _first(others & (texts >= texts[i]), lot, texts)
        sound = _first(others & (sounds >= sounds[i]), lot, sounds, speaker != speaker[i])
        if text is not None and sound is not None:
            wrong = utterances[text].text[: len(own.text)], utterances[sound].audio[: len(own.audio)]
            found.append((own, *wrong))
    return found


def _first(allowed: np.ndarray, *keys: np.ndarray) -> int | None:
    """The number of the first allowed one, sorted by the last key, then by the one before it, .."""
    numbers = np.flatnonzero(allowed)
    return int(numbers[np.lexsort([key[numbers] for key in keys])[0]]) if len(numbers) else None


def _documents(own: Utterance, text: np.ndarray, audio: np.ndarray, space: "TokenSpace") -> list[np.ndarray]:
    """Text and sound, sound and text; and the same with the wrong text and with the wrong sound first."""

    def document(first: np.ndarray, second: np.ndarray, sound_first: bool) -> np.ndarray:
        markers = [(space.text_start, space.text_end), (space.audio_start, space.audio_end)]
        (a, b), (c, d) = markers[:: -1 if sound_first else 1]
        return np.concatenate([[space.bos, a], first, [b, c], second, [d, space.eos]]).astype(np.int32)

    return [
        document(own.text, own.audio, sound_first=False),
        document(own.audio, own.text, sound_first=True),
        document(text, own.audio, sound_first=False),
        document(audio, own.text, sound_first=True),
    ]


def summary(utterances: Sequence[Utterance], sums: np.ndarray, frame_rate: float, codebooks: int) -> dict[str, Any]:
    """sums: float64 (utterances, the four documents of each, classes), nats. What comes first in a document is
    predicted without the other: the sound in the second document, the text in the first."""
    frames = np.array([len(u.audio) / codebooks for u in utterances])
    text_counts = np.array([float(len(u.text)) for u in utterances])
    audio = {"semantic": slice(2, 3), "acoustic": slice(3, None), "audio": slice(2, None)}
    nats = {
        part: [sums[:, document, classes].sum(1) for document in (0, 2, 1)]
        for part, classes in audio.items()
        if part != "acoustic" or codebooks > 1
    }
    nats["text"] = [sums[:, document, 0] for document in (1, 3, 0)]
    counts = {"semantic": frames, "acoustic": frames * (codebooks - 1), "audio": frames * codebooks}
    counts["text"] = text_counts
    items: dict[str, Any] = {"names": [u.id for u in utterances], "figures": {}}
    result: dict[str, Any] = {}
    for part, values in nats.items():
        result[part] = _part(values, counts[part])
        for given, sums_of in [*zip(GIVEN, values, strict=True), ("gain", values[1] - values[0])]:
            figure = {"sums": sums_of.tolist(), "counts": counts[part].tolist()}
            items["figures"][f"{part}_{given}"] = figure
    seconds = frames.sum() / frame_rate
    for name, part, of in (("audio_second", "audio", seconds), ("text_token", "text", text_counts.sum())):
        bits = [float(values.sum() / of / math.log(2)) for values in nats[part]]
        result[f"bits_per_{name}"] = dict(zip(GIVEN, bits, strict=True))
    return result | {"audio_seconds": float(seconds), "items": items}


def _part(values: list[np.ndarray], counts: np.ndarray) -> dict[str, Any]:
    """right, wrong, alone: nats of each utterance, and how many tokens it has -> means, gains and their intervals."""
    right, wrong, alone = values
    row: dict[str, Any] = {"tokens": int(counts.sum())}
    for given, one in zip(GIVEN, values, strict=True):
        row[f"{given}_nats"] = float(one.sum() / counts.sum())
    gains = np.stack([wrong - right, alone - right], 1)
    ranges = intervals(resampled(gains, np.stack([counts, counts], 1)))
    for name, gain, (low, high) in zip(("gain", "gain_over_alone"), gains.T, ranges, strict=True):
        row |= {name: float(gain.sum() / counts.sum()), f"{name}_low": low, f"{name}_high": high}
    return row


def _named(names: list[str]) -> dict[str, Any]:
    return {"count": len(names), "first": names[:NAMED]}
