"""Recorded translations, and the texts that a model writes on the way from a source to its translation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..inference.decoder import Decoder
    from ..inference.sample import Constraint
    from ..vocab import TokenSpace
    from .bench import Bench

AT_ONCE = 32  # sources whose texts are written together
VERSION = 1  # of the texts in a run's evaluate/s2st-texts.jsonl


@dataclass(frozen=True)
class Side:
    """One side of a pair. `text`: ids, with the language's tag; `audio`: ids of whole frames."""

    text: np.ndarray
    audio: np.ndarray
    said: str
    language: str


@dataclass(frozen=True)
class Pair:
    id: str
    source: Side
    target: Side

    @property
    def direction(self) -> str:
        return f"{self.source.language}-{self.target.language}"


def pairs_of(bench: "Bench") -> list[Pair]:
    """The first evaluate.documents held-out translations that the model's context has room for."""
    from ..data.units import translations
    from ..inference.tasks.translate import tag
    from ..tokenizer import clean_text
    from .likelihood import context_of

    text, space = bench.model.text, bench.model.space

    def side(row: Mapping[str, Any]) -> Side:
        words = clean_text(row["text"], space)  # as in the documents it was trained on
        ids = text.encode(tag(row["language"]) + words)
        said = text.decode(text.encode(words))  # as the model would write it
        return Side(np.array(ids, np.int32), space.audio_ids(row["codes"]), said, row["language"])

    found = translations(bench.utterances)
    pairs = [Pair(source["id"], side(source), side(target)) for source, target in found]
    longest = context_of(bench.model)
    fitting = [pair for pair in pairs if len(document(pair, pair.target, space)[0]) <= longest]
    return fitting[: bench.recipe.evaluate.documents or len(fitting)]


def document(given: Pair, target: Side, space: "TokenSpace", texts: Pair | None = None) -> tuple[np.ndarray, int, int]:
    """The ids: the source's sound and both texts of `given` (or the texts of `texts`), then the target's sound; and
    where the first text and the target's sound begin, with their markers."""
    texts = texts or given
    sound = [space.bos, space.audio_start, *given.source.audio, space.audio_end]
    written = [mark for side in (texts.source, texts.target) for mark in (space.text_start, *side.text, space.text_end)]
    translation = [space.audio_start, *target.audio, space.audio_end, space.eos]
    ids = np.array([*sound, *written, *translation], np.int32)
    return ids, len(sound), len(sound) + len(written)


@dataclass(frozen=True)
class Written:
    """What the model writes after a source, without languages' tags: `said`; and the ids up to there."""

    said: tuple[str, str]
    ids: list[int]


def write_texts(bench: "Bench", pairs: Sequence[Pair]) -> list[Written]:
    """Both texts, always the likeliest token. The model is told only the language to translate to.

    RUN/evaluate/s2st-texts.jsonl keeps them, so an interrupted suite goes on where it was.
    """
    from rich.progress import track

    from ..console import console
    from ..inference.decoder import Decoder
    from ..inference.sample import Constraint
    from .kept import Kept
    from .likelihood import digest_of

    decoder, constraint = Decoder(bench.model.model), Constraint(bench.model.space, bench.model.device)
    key = [VERSION, bench.model.key]
    found: list[Written] = []
    with Kept(Path(bench.recipe.run) / "evaluate" / "s2st-texts.jsonl", key, _written) as kept:
        for begin in track(range(0, len(pairs), AT_ONCE), "s2st: texts", console=console):
            some = pairs[begin : begin + AT_ONCE]
            name = " ".join([digest_of([pair.source.audio for pair in some]), *(pair.target.language for pair in some)])
            if name not in kept.values:
                kept.add(name, [[list(one.said), one.ids] for one in _write(bench, decoder, constraint, some)])
                kept.values[name] = _written(kept.values[name])
            found += kept.values[name]
    return found


def _written(rows: Any) -> list[Written]:
    return [Written((source, target), list(map(int, ids))) for (source, target), ids in rows]


def _write(bench: "Bench", decoder: "Decoder", constraint: "Constraint", some: Sequence[Pair]) -> list[Written]:
    from ..inference.sample import sample
    from ..inference.task import Material
    from ..inference.tasks.translate import LANGUAGE, Translate

    space, text, task = bench.model.space, bench.model.text, Translate()
    materials = [
        Material(
            *(space, text.encode, 1.0, decoder.context, decoder.context),
            codes=space.codes(pair.source.audio),
            to=pair.target.language,
        )
        for pair in some
    ]
    prompts = [task.prompt(material) for material in materials]
    said: list[list[str]] = [[] for _ in some]
    for _ in range(2):
        results = sample(decoder, constraint, prompts, temperature=0)
        for i, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
            said[i].append(text.decode(t for t in result.ids[len(prompt.ids) :] if t < space.text_size))
        following = [
            task.then(*one, result.ids, said[i][-1])
            for i, (one, result) in enumerate(zip(zip(materials, prompts, strict=True), results, strict=True))
        ]
        prompts = [prompt for prompt in following if prompt]
    return [
        Written((LANGUAGE.sub("", texts[0], count=1), texts[1]), list(map(int, prompt.ids[:-1])))
        for texts, prompt in zip(said, prompts, strict=True)
    ]
