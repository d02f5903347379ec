"""The last stage: writes the stores train, valid and test from the parts, with text spread among the speech, and the
held-out utterances."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import Recipe
from megatron_soda.data.store import Store, write_parts
from megatron_soda.data.units import SCHEMA, check_seal, seal
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path
from megatron_soda.tokenizer import TextTokenizer
from megatron_soda.vocab import TokenSpace

from .documents import PartFacts, PartJob, Used, part_facts, read_part
from .index import digest
from .inputs import too_little
from .seen import Seen
from .show import Rejects, console, progress
from .split import SIDES

HELD_OUT_ROWS = 20_000  # utterances kept beside the valid and test stores, for speaking and transcribing


@dataclass(frozen=True)
class Spoken:
    """A preparation's unit shards; none if it has no speech."""

    paths: list[Path]
    keys: list[str]  # of everything the parts depend on
    codec: CodecDescription | None


@dataclass(frozen=True)
class Part:
    path: Path
    facts: PartFacts


@dataclass(frozen=True)
class Parts:
    """In the order in which they appear in the stores."""

    speech: list[Part]
    text: list[Part]

    def tokens(self, side: str, text_share: float) -> tuple[int, int]:
        """Tokens of speech and of text for the store of a side. Without speech, all of the text is used."""
        spoken, written = (sum(part.facts.tokens[side] for part in some) for some in (self.speech, self.text))
        return spoken, min(written, round(spoken * text_share / (1 - text_share))) if spoken else written


@dataclass(frozen=True)
class Written:
    """What prepare.json says about the stores."""

    utterances: int
    hours: float
    documents: dict[str, int]  # by side, as tokens and stores
    duplicates: int  # documents left out
    tokens: dict[str, int]
    stores: dict[str, str]  # fingerprints
    bytes: dict[str, int]
    classes: dict[str, int]  # tokens on the training side by class
    languages: dict[str, Used]


def write_stores(
    recipe: Recipe,
    parts: Parts,
    spoken: Spoken,
    sides: list[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    rejects: Rejects,
    key: str,
) -> Written:
    """Writes the three stores and the held-out units. `sides`: the sides of the units' rows; `key`: this preparation's
    key, stored in the held-out units. Raises SodaError if a store would be empty."""
    folder, p = recipe.data_folder, recipe.prepare
    provenance = {
        "codec": spoken.codec.fingerprint if spoken.codec else None,
        "tokenizer": tokenizer.fingerprint,
        "slots": _slots(recipe, space, bool(spoken.paths)),
    }
    tokens, written, classes = {}, {}, Counter()
    total = sum(sum(parts.tokens(name, p.text_share)) for name in SIDES)
    with progress("stores", total) as advance, _Once(folder / "work" / "documents.sqlite", advance) as once:
        for name in SIDES:
            blend = once.of(_blend(parts, name, p.text_share))
            counted = _Counted(blend, advance, space if name == "train" else None)
            tokens[name] = write_parts(folder / name, counted, space, p.store, **provenance)
            written[name] = counted.documents
            if not tokens[name]:
                raise SodaError(too_little(name, rejects))
            classes.update(counted.classes)
            if name != "train" and spoken.paths:
                _held_out(folder / f"{name}.parquet", spoken.paths, sides, name, digest(key, name))
    _warn(recipe, parts, once.left_out)
    languages = _languages(parts.speech)
    stores = {name: Store(folder / name) for name in SIDES}
    return Written(
        utterances=sum(used.utterances for used in languages.values()),
        hours=sum(used.seconds for used in languages.values()) / 3600,
        documents=written,
        duplicates=once.left_out,
        tokens=tokens,
        stores={name: store.fingerprint for name, store in stores.items()},
        bytes={
            "units": _bytes(spoken.paths),
            "stores": _bytes([path for store in stores.values() for path in store.files.values()]),
        },
        classes={n: int(classes[n]) for n in space.class_names},
        languages=languages,
    )


def _warn(recipe: Recipe, parts: Parts, left_out: int) -> None:
    share = recipe.prepare.text_share
    spoken, text = (sum(part.facts.tokens["train"] for part in some) for some in (parts.speech, parts.text))
    wanted = spoken * share / (1 - share)
    if recipe.prepare.text and spoken and text < wanted:
        console.note(
            "too little text",
            f": {text / (spoken + text):.1%} of the tokens, not "
            f"prepare.text_share={share:.1%}; {wanted - text:,.0f} tokens of text are missing",
        )
    if left_out:
        console.note(f"{left_out:,} documents", " left out as exact duplicates")


def _languages(speech: list[Part]) -> dict[str, Used]:
    languages: dict[str, Used] = {}
    for part in speech:
        for language, used in part.facts.languages.items():
            whole = languages.setdefault(language, Used())
            whole.utterances += used.utterances
            whole.seconds += used.seconds
    return dict(sorted(languages.items()))


def read_facts(jobs: list[PartJob]) -> list[Part]:
    """The parts that the jobs made. Raises SodaError if one is missing."""
    parts = []
    for job in jobs:
        if (facts := part_facts(job.out)) is None:
            raise SodaError(f"{job.out}: missing, or damaged since it was written. Run the same command again.")
        parts.append(Part(job.out, facts))
    return parts


def _slots(recipe: Recipe, space: TokenSpace, spoken: bool) -> int:
    """Codes per frame, which must be the same throughout a store."""
    p = recipe.prepare
    of_units = 1 if p.orders == ["semantic-only"] else space.codebooks
    of_strings = min(p.corpus_codebooks, space.codebooks)
    if spoken and p.released and of_units != of_strings:
        raise SodaError(
            f"frames of {of_units} codes from speech and of {of_strings} from prepare.released cannot be in one store: "
            "prepare them separately, and mix them in data.mix"
        )
    return of_strings if p.released and not spoken else of_units


def _blend(parts: Parts, name: str, share: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """A side's documents: speech, with text sampled evenly from all texts and spread evenly among it."""
    spoken, wanted = parts.tokens(name, share)
    text = _thinned(parts.text, name, wanted)
    given = gone = 0
    for part in parts.speech:
        ids, lengths = read_part(part.path, name)
        yield ids, lengths
        gone += len(ids)
        while given * spoken < wanted * gone and (some := next(text, None)):
            given += len(some[0])
            yield some
    yield from text


def _thinned(parts: list[Part], name: str, wanted: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """About `wanted` tokens from the parts, document by document, with the same share of every part."""
    total = sum(part.facts.tokens[name] for part in parts)
    seen = given = 0
    for part in parts if wanted else []:
        ids, lengths = read_part(part.path, name)
        seen += len(ids)
        for document in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else ():
            if given * total >= wanted * seen:
                break
            given += len(document)
            yield document, np.array([len(document)])


class _Once:
    """Drops documents that have already appeared in any store, because `soda validate` would refuse them."""

    def __init__(self, path: Path, advance: Callable[[int], None]) -> None:
        self._seen, self._advance, self.left_out = Seen(path, "documents"), advance, 0

    def __enter__(self) -> "_Once":
        return self

    def __exit__(self, *_: object) -> None:
        self._seen.close()

    def of(self, parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for ids, lengths in parts:
            ends = np.cumsum(lengths)
            new = [
                self._seen.new("documents", hashlib.blake2b(ids[end - length : end].tobytes(), digest_size=16).digest())
                for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)
            ]
            if not all(new):
                kept = np.array(new)
                self.left_out += len(new) - int(kept.sum())
                self._advance(int(lengths[~kept].sum()))
                ids, lengths = ids[np.repeat(kept, lengths)], lengths[kept]
            yield ids, lengths


class _Counted:
    """Passes parts through, counting their documents and the classes of their tokens."""

    def __init__(self, parts: Iterable, advance: Callable[[int], None], space: TokenSpace | None) -> None:
        self._parts, self._advance, self._space = parts, advance, space
        self.documents, self.classes = 0, Counter()

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        table = self._space.class_table() if self._space else None
        for ids, lengths in self._parts:
            self.documents += len(lengths)
            if self._space and table is not None:
                for number, count in enumerate(np.bincount(table[ids])):
                    self.classes[self._space.class_names[number]] += int(count)
            self._advance(len(ids))
            yield ids, lengths


def _held_out(path: Path, units: list[Path], sides: list[str], name: str, key: str) -> None:
    wanted = str(SIDES.index(name))
    left = HELD_OUT_ROWS
    with atomic_path(path) as temporary:
        facts = {**(pq.read_schema(units[0]).metadata or {}), b"key": key.encode()}
        schema = SCHEMA.with_metadata(facts)
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for unit, some in zip(units, sides, strict=True):
                check_seal(unit)
                kept = pa.array([digit == wanted for digit in some], pa.bool_())
                table = pq.read_table(unit, columns=SCHEMA.names).filter(kept).slice(0, left)
                if len(table):
                    writer.write_table(table.cast(schema))
                left -= len(table)
                if not left:
                    break
        seal(temporary)


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
