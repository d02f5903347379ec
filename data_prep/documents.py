"""The third stage: turns units, texts and released corpora into documents of ids, shard by shard, in an order drawn
from a seed. A part is a safetensors file with the ids and lengths of the documents of every side.
"""

import functools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.numpy import save_file

from megatron_soda.data.units import Row, read_shard, unit_codec
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path, reading, write_json
from megatron_soda.tokenizer import TextTokenizer, clean_text
from megatron_soda.vocab import TokenSpace

from . import interleave
from .index import Shard, digest, read_index
from .split import SIDES, by_share
from .strings import to_ids
from .utterance import Reject, Utterance

ROWS_AT_ONCE = 64  # for a released corpus, whose documents can be an hour long
S = TypeVar("S", Row, Utterance)
Made = Iterator[tuple[str, np.ndarray] | Reject]  # side, ids


@dataclass(frozen=True)
class PartSettings:
    """What all parts of a preparation share."""

    tokenizer: Path
    tokenizer_fingerprint: str
    space: TokenSpace
    orders: tuple[str, ...]
    shares: tuple[float, float]  # shares of released documents that go to valid and test
    seed: int
    corpus_codebooks: int


@dataclass(frozen=True)
class UnitShard:
    path: Path
    sides: str  # one digit per row: see split.py


@dataclass(frozen=True)
class TextShard:
    shard: Shard
    sides: str


@dataclass(frozen=True)
class RowGroup:
    """Of a released corpus."""

    path: Path
    group: int


@dataclass(frozen=True)
class PartJob:
    """`number` seeds the order of the documents; `key` is a hash of everything the part depends on and is stored in
    `out`."""

    source: UnitShard | TextShard | RowGroup
    settings: PartSettings
    number: int
    out: Path
    key: str


@dataclass
class Used:
    """How much of a language the documents contain."""

    utterances: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class PartFacts:
    """A part's statistics, available without reading it."""

    key: str
    tokens: dict[str, int]  # by side
    languages: dict[str, Used]
    crc32: dict[str, int]  # of a side's ids and lengths; empty in parts of earlier versions

    def to_json(self) -> str:
        languages = {name: [used.utterances, used.seconds] for name, used in self.languages.items()}
        tokens = {f"{side}.tokens": count for side, count in self.tokens.items()}
        return json.dumps({**tokens, "key": self.key, "languages": languages, "crc32": self.crc32})

    @classmethod
    def from_json(cls, text: str) -> Self:
        values = json.loads(text)
        languages = {name: Used(*used) for name, used in values["languages"].items()}
        tokens = {side: values[f"{side}.tokens"] for side in SIDES}
        return cls(values["key"], tokens, languages, dict(values.get("crc32", {})))


def unit_jobs(
    units: list[Path], keys: list[str], sides: list[str], folder: Path, settings: PartSettings
) -> list[PartJob]:
    """`sides`: the side of each row of every shard (see split.sides_of_units)."""
    return [
        _job(UnitShard(path, some), folder / f"speech-{i:06d}", key, i, settings)
        for i, (path, key, some) in enumerate(zip(units, keys, sides, strict=True))
    ]


def text_jobs(shards: list[Shard], sides: list[str], folder: Path, settings: PartSettings) -> list[PartJob]:
    return [
        _job(TextShard(s, some), folder / f"text-{s.number:06d}", s.key, s.number, settings)
        for s, some in zip(shards, sides, strict=True)
    ]


def string_jobs(paths: list[Path], folder: Path, settings: PartSettings) -> list[PartJob]:
    """One job per row group. Raises SodaError if a file is not Parquet or has no string column `text`."""
    jobs: list[PartJob] = []
    for path in paths:
        with reading(path, "cannot be read as Parquet"):
            file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names or not _is_string(file.schema_arrow.field("text").type):
            raise SodaError(
                f"{path}: a released corpus needs a string column `text`; this file has "
                f"{', '.join(f'{f.name} ({f.type})' for f in file.schema_arrow)}"
            )
        stat = path.stat()
        for group in range(file.num_row_groups):
            number = len(jobs)
            key = digest(str(path), stat.st_size, stat.st_mtime_ns, group)
            jobs.append(_job(RowGroup(path, group), folder / f"strings-{number:06d}", key, number, settings))
    return jobs


_KINDS = {UnitShard: "units", TextShard: "texts", RowGroup: "strings"}  # as in the digests


def _job(source: UnitShard | TextShard | RowGroup, out: Path, key: str, number: int, settings: PartSettings) -> PartJob:
    hashed = {**asdict(settings), "tokenizer": settings.tokenizer.name}
    if not isinstance(source, RowGroup):
        hashed["sides"] = source.sides
    key = digest(_KINDS[type(source)], key, number, hashed)
    return PartJob(source, settings, number, Path(f"{out}.safetensors"), key)


def is_done(job: PartJob) -> bool:
    facts = part_facts(job.out)
    return facts is not None and facts.key == job.key


def part_facts(path: Path) -> PartFacts | None:
    """A part's statistics; None if it is missing or incomplete."""
    try:
        with reading(path), safe_open(path, "np") as file:
            return PartFacts.from_json((file.metadata() or {})["facts"])
    except SodaError:
        return None


def read_part(path: Path, of: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids and lengths (both int32) of the documents of a side. Raises SodaError if they have changed since they
    were written."""
    with reading(path, "damaged; delete it and run the same command again"), safe_open(path, "np") as file:
        facts = PartFacts.from_json((file.metadata() or {})["facts"])
        ids, lengths = file.get_tensor(f"{of}.ids"), file.get_tensor(f"{of}.lengths")
        found = _crc32(ids, lengths)
        if len(ids) != facts.tokens[of] or facts.crc32.get(of, found) != found:
            raise ValueError("its checksum does not match")
    return ids, lengths


def _crc32(ids: np.ndarray, lengths: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(lengths).data, zlib.crc32(np.ascontiguousarray(ids).data))


def make_part(job: PartJob) -> PartFacts:
    """Writes OUT.rejects.json, then the part."""
    facts = PartFacts(job.key, {}, {}, {})
    documents: dict[str, list[np.ndarray]] = {name: [] for name in SIDES}
    rejects: list[Reject] = []
    for item in _documents(job, facts.languages):
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            documents[item[0]].append(item[1])
    tensors = {}
    for number, (name, some) in enumerate(documents.items()):
        order = np.random.default_rng([job.settings.seed, job.number, number]).permutation(len(some))
        ids = np.concatenate([some[i] for i in order], dtype=np.int32) if some else np.zeros(0, np.int32)
        tensors[f"{name}.ids"] = ids
        tensors[f"{name}.lengths"] = np.array([len(some[i]) for i in order], np.int32)
        facts.tokens[name], facts.crc32[name] = len(ids), _crc32(ids, tensors[f"{name}.lengths"])
    write_json(job.out.with_suffix(".rejects.json"), [asdict(r) for r in rejects])
    with atomic_path(job.out) as temporary:
        save_file(tensors, temporary, {"facts": facts.to_json()})
    return facts


def _documents(job: PartJob, languages: dict[str, Used]) -> Made:
    source, settings = job.source, job.settings
    tokenizer = _tokenizer(settings.tokenizer)
    if isinstance(source, UnitShard):
        return _of_shard(source, settings, tokenizer, languages)
    if isinstance(source, TextShard):
        return _of_texts(source, tokenizer, settings.space)
    return _of_strings(source, settings, tokenizer)


def _of_shard(source: UnitShard, settings: PartSettings, tokenizer: TextTokenizer, languages: dict[str, Used]) -> Made:
    space, codec = settings.space, unit_codec(source.path)
    rows, codes = read_shard(source.path)
    if codec.codebooks < space.codebooks or codec.entries != space.entries:
        raise SodaError(
            f"{source.path}: its codes have {codec.codebooks} codebooks of {codec.entries}, the token space has "
            f"{space.codebooks} of {space.entries}"
        )
    codes = codes[:, : space.codebooks]
    yield from of_units(rows, codes, source.sides, settings.orders, tokenizer, space, languages)


def of_units(
    rows: list[Row],
    codes: np.ndarray,
    sides: str,
    orders: Sequence[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    languages: dict[str, Used],
) -> Made:
    """The documents made from utterances, whose codes are in `codes` (frames, codebooks) and whose sides are in
    `sides`. Adds the amount used of each language to `languages`."""
    good = np.ones(len(codes), bool)
    if codes.size and (codes.min() < 0 or codes.max() >= space.entries):
        good = np.all((codes >= 0) & (codes < space.entries), axis=1)
        codes = np.where(good[:, None], codes, 0)
    audio = space.audio_ids(codes)
    semantic = audio.reshape(-1, space.codebooks)[:, 0]
    plans: list[Planned[Row]] = []
    for _, group in groupby(enumerate(rows), key=lambda r: r[1].recording or r[0]):
        usable: list[Row] = []
        for _, row in group:
            if not row.heard and "translation" not in orders:
                yield Reject(row.id, "no codes")
            elif not good[row.start : row.end].all():
                yield Reject(row.id, f"code out of range: the codebooks have {space.entries} entries")
            else:
                usable.append(cleaned(row, space))
        used: set[str] = set()
        for planned in plan_documents(usable, orders):
            if isinstance(planned, Reject):
                yield planned
            else:
                plans.append(planned)
                used |= {row.id for row in planned.spoken}
        for row in usable:
            if row.id in used:
                used_of = languages.setdefault(row.language or "?", Used())
                used_of.utterances += 1
                used_of.seconds += row.seconds
    side_of = {row.id: SIDES[int(digit)] for row, digit in zip(rows, sides, strict=True)}
    ids = _text_ids((text for planned in plans for text in interleave.texts_of(planned.plan)), tokenizer)
    for planned in plans:
        if planned.order == "semantic-only":
            parts = [semantic[row.start : row.end] for row in planned.spoken]
        else:
            parts = [audio[row.start * space.codebooks : row.end * space.codebooks] for row in planned.spoken]
        yield side_of[planned.spoken[0].id], interleave.document(planned.plan, ids, parts, space)


@dataclass
class Planned(Generic[S]):
    """A planned document: its order, its parts, and the utterances that they refer to, which are all on one side."""

    order: str
    plan: interleave.Plan
    spoken: list[S]


def plan_documents(group: list[S], orders: Sequence[str]) -> Iterator[Planned[S] | Reject]:
    """The documents for the utterances of one recording, a Reject for each that cannot be made, and one for each
    utterance without a transcript that an order needs. The dry run counts these."""
    with_text = [one for one in group if one.text]
    for order in orders:
        some = group if order in interleave.WITHOUT_TEXT else with_text
        if order != "translation":
            some = [one for one in some if one.heard]
        try:
            plan = interleave.ORDERS[order](some) if some else []
        except interleave.CannotPlan as error:
            yield Reject(some[0].id, f"{error} (for {order})")
            continue
        if plan:
            yield Planned(order, plan, some)
    if not interleave.WITHOUT_TEXT.issuperset(orders):
        for one in group:
            if not one.text:
                without = ", ".join(order for order in orders if order in interleave.WITHOUT_TEXT)
                yield Reject(one.id, "no transcript" + (f": used only for {without}" if without else ""))


def cleaned(one: S, space: TokenSpace) -> S:
    text = clean_text(one.text, space)
    return one if text == one.text else replace(one, text=text)


def _text_ids(texts: Iterable[str], tokenizer: TextTokenizer) -> dict[str, np.ndarray]:
    unique = list(dict.fromkeys(texts))
    return {t: np.array(ids, np.int32) for t, ids in zip(unique, tokenizer.encode_batch(unique), strict=True)}


def _of_texts(source: TextShard, tokenizer: TextTokenizer, space: TokenSpace) -> Made:
    items = [item for item, _ in read_index(source.shard)]
    texts = tokenizer.encode_batch([clean_text(item.text, space) for item in items])
    for item, ids, digit in zip(items, texts, source.sides, strict=True):
        if ids:
            yield SIDES[int(digit)], interleave.text_only(ids, space)
        else:
            yield Reject(item.id, "empty text: nothing is left after cleaning")


def _of_strings(source: RowGroup, settings: PartSettings, tokenizer: TextTokenizer) -> Made:
    space, number = settings.space, 0
    for strings in _strings(source.path, source.group):
        for ids in to_ids(strings, space, tokenizer, corpus_codebooks=settings.corpus_codebooks):
            if isinstance(ids, str):
                where = f"{source.path}:row group {source.group}, row {number}"
                yield Reject(where, f"malformed document: {ids}")
            else:
                yield by_share(_content_key(ids, space), *settings.shares), ids
            number += 1


def _strings(path: Path, group: int) -> Iterator[list[str]]:
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["text"]):
            yield [text or "" for text in batch.column("text").to_pylist()]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SodaError(f"{path}: row group {group} is damaged ({error}). Get the file again.") from None


def _content_key(ids: np.ndarray, space: TokenSpace) -> str:
    """The same for a document in either order: its audio, or its text if it has no audio."""
    audio = ids[ids >= space.audio_base]
    return digest((audio if len(audio) else ids).tobytes().hex())


@functools.lru_cache(maxsize=2)
def _tokenizer(path: Path) -> TextTokenizer:
    return TextTokenizer(path)


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
