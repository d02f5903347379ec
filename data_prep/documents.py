"""The third stage: units, texts and released corpora to documents of ids, a shard at a time, in the order in which a
seed puts the documents of a shard. A part is a safetensors file: ids and lengths of the documents of every side.
"""

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Generic, TypeVar

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
from .executor import Job, Result
from .index import Shard, digest, read_index
from .split import SIDES, by_share
from .strings import to_ids
from .utterance import Reject, Utterance

ROWS_AT_ONCE = 64  # of a released corpus: its documents are of up to an hour
S = TypeVar("S", Row, Utterance)
Made = Iterator[tuple[str, np.ndarray] | Reject]  # side, ids


def unit_jobs(
    units: list[Path], keys: list[str], sides: list[str], folder: Path, settings: dict[str, Any]
) -> list[Job]:
    """Settings: tokenizer, space, orders, seed. `sides`: of the rows of every shard (see split.sides_of_units)."""
    return [
        _job("units", str(path), folder / f"speech-{i:06d}", key, i, {**settings, "sides": some})
        for i, (path, key, some) in enumerate(zip(units, keys, sides, strict=True))
    ]


def text_jobs(shards: list[Shard], sides: list[str], folder: Path, settings: dict[str, Any]) -> list[Job]:
    return [
        _job("texts", vars(s), folder / f"text-{s.number:06d}", s.key, s.number, {**settings, "sides": some})
        for s, some in zip(shards, sides, strict=True)
    ]


def string_jobs(paths: list[Path], folder: Path, settings: dict[str, Any]) -> list[Job]:
    """One job a row group. Settings as of units, with `shares` (valid, test) and corpus_codebooks. SodaError if a file
    is no Parquet, or has no column `text` of strings."""
    jobs: list[Job] = []
    for path in paths:
        with reading(path, "cannot be read as Parquet"):
            file = pq.ParquetFile(path)
        if "text" not in file.schema_arrow.names or not _is_string(file.schema_arrow.field("text").type):
            raise SodaError(
                f"{path}: a released corpus has a column `text` of strings; this file's columns are "
                f"{', '.join(f'{f.name} ({f.type})' for f in file.schema_arrow)}"
            )
        stat = path.stat()
        for group in range(file.num_row_groups):
            number = len(jobs)
            key = digest(str(path), stat.st_size, stat.st_mtime_ns, group)
            source = {"path": str(path), "group": group}
            jobs.append(_job("strings", source, folder / f"strings-{number:06d}", key, number, settings))
    return jobs


def _job(kind: str, source: Any, out: Path, key: str, number: int, settings: dict[str, Any]) -> Job:
    key = digest(kind, key, number, {**settings, "tokenizer": Path(settings["tokenizer"]).name})
    return {**settings, "kind": kind, "source": source, "out": f"{out}.safetensors", "number": number, "key": key}


def is_done(job: Job) -> bool:
    return (part_facts(Path(job["out"])) or {}).get("key") == job["key"]


def part_facts(path: Path) -> dict[str, Any] | None:
    """What is known of a part; None if it is not there or not whole."""
    try:
        with reading(path), safe_open(path, "np") as file:
            return json.loads((file.metadata() or {})["facts"])
    except SodaError:
        return None


def read_part(path: Path, of: str) -> tuple[np.ndarray, np.ndarray]:
    """int32 ids and lengths of the documents of a side."""
    with reading(path), safe_open(path, "np") as file:
        return file.get_tensor(f"{of}.ids"), file.get_tensor(f"{of}.lengths")


def make_part(job: Job) -> Result:
    """Writes a part, and OUT.rejects.json before it. -> counts."""
    space = TokenSpace(**job["space"])
    tokenizer = _tokenizer(job["tokenizer"])
    source, facts = job["source"], Counter()
    languages: dict[str, list[float]] = {}
    if job["kind"] == "units":
        made = _of_shard(Path(source), job["sides"], job["orders"], tokenizer, space, languages)
    elif job["kind"] == "texts":
        made = _of_texts(source, job["sides"], tokenizer, space)
    else:
        made = _of_strings(source, job["shares"], job["corpus_codebooks"], tokenizer, space)
    documents: dict[str, list[np.ndarray]] = {name: [] for name in SIDES}
    rejects: list[Reject] = []
    for item in made:
        if isinstance(item, Reject):
            rejects.append(item)
        else:
            documents[item[0]].append(item[1])
    tensors, classes = {}, np.zeros(len(space.class_names), np.int64)
    for number, (name, some) in enumerate(documents.items()):
        order = np.random.default_rng([job["seed"], job["number"], number]).permutation(len(some))
        ids = np.concatenate([some[i] for i in order], dtype=np.int32) if some else np.zeros(0, np.int32)
        tensors[f"{name}.ids"] = ids
        tensors[f"{name}.lengths"] = np.array([len(some[i]) for i in order], np.int32)
        facts[f"{name}.tokens"], facts[f"{name}.documents"] = len(ids), len(some)
        if name == "train":
            classes = np.bincount(_class_table(space)[ids], minlength=len(classes))
    path = Path(job["out"])
    write_json(path.with_suffix(".rejects.json"), [asdict(r) for r in rejects])
    whole = {**facts, "key": job["key"], "classes": classes.tolist(), "languages": languages, "rejects": len(rejects)}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, {"facts": json.dumps(whole)})
    return {"tokens": sum(facts[f"{name}.tokens"] for name in SIDES), "rejects": len(rejects)}


def _of_shard(
    path: Path,
    sides: str,
    orders: Sequence[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    languages: dict[str, list[float]],
) -> Made:
    codec = unit_codec(path)
    rows, codes = read_shard(path)
    if codec.codebooks < space.codebooks or codec.entries != space.entries:
        raise SodaError(
            f"{path}: its codes are of {codec.codebooks} codebooks of {codec.entries}, the token space is of "
            f"{space.codebooks} of {space.entries}"
        )
    yield from of_units(rows, codes[:, : space.codebooks], sides, orders, tokenizer, space, languages)


def of_units(
    rows: list[Row],
    codes: np.ndarray,
    sides: str,
    orders: Sequence[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    languages: dict[str, list[float]],
) -> Made:
    """The documents of utterances, their codes in `codes` (frames, codebooks), their sides in `sides`; what is used of
    each language is added to `languages`, as number and seconds."""
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
            if row.start == row.end:
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
                entry = languages.setdefault(row.language or "?", [0, 0.0])
                entry[0], entry[1] = entry[0] + 1, entry[1] + row.seconds
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
    """A document to be: its order, its parts, and the utterances that they count, which are all on one side."""

    order: str
    plan: interleave.Plan
    spoken: list[S]


def plan_documents(group: list[S], orders: Sequence[str]) -> Iterator[Planned[S] | Reject]:
    """The documents of the utterances of one recording, a Reject for each that these cannot make, and one for each
    utterance that lacks a transcript which an order needs. The dry run counts what this gives."""
    with_text = [one for one in group if one.text]
    for order in orders:
        some = group if order in interleave.WITHOUT_TEXT else with_text
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
                yield Reject(one.id, "no transcript" + (f": used for {without} alone" if without else ""))


def cleaned(one: S, space: TokenSpace) -> S:
    text = clean_text(one.text, space)
    return one if text == one.text else replace(one, text=text)


def _text_ids(texts: Iterable[str], tokenizer: TextTokenizer) -> dict[str, np.ndarray]:
    unique = list(dict.fromkeys(texts))
    return {t: np.array(ids, np.int32) for t, ids in zip(unique, tokenizer.encode_batch(unique), strict=True)}


def _of_texts(shard: dict[str, Any], sides: str, tokenizer: TextTokenizer, space: TokenSpace) -> Made:
    items = [item for item, _ in read_index(shard)]
    texts = tokenizer.encode_batch([clean_text(item.text, space) for item in items])
    for item, ids, digit in zip(items, texts, sides, strict=True):
        if ids:
            yield SIDES[int(digit)], interleave.text_only(ids, space)
        else:
            yield Reject(item.id, "empty text: nothing is left of it after cleaning")


def _of_strings(
    source: dict[str, Any], shares: tuple[float, float], codebooks: int, tokenizer: TextTokenizer, space: TokenSpace
) -> Made:
    number = 0
    for strings in _strings(Path(source["path"]), source["group"]):
        for ids in to_ids(strings, space, tokenizer, corpus_codebooks=codebooks):
            if isinstance(ids, str):
                yield Reject(
                    f"{source['path']}:row group {source['group']}, row {number}", f"malformed document: {ids}"
                )
            else:
                yield by_share(_content_key(ids, space), *shares), ids
            number += 1


def _strings(path: Path, group: int) -> Iterator[list[str]]:
    try:
        file = pq.ParquetFile(path)
        for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=["text"]):
            yield [text or "" for text in batch.column("text").to_pylist()]
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise SodaError(f"{path}: row group {group} is damaged ({error}). Get the file again.") from None


def _content_key(ids: np.ndarray, space: TokenSpace) -> str:
    """The same for a document in either order: its audio, or its text if it has none."""
    audio = ids[ids >= space.audio_base]
    return digest((audio if len(audio) else ids).tobytes().hex())


@functools.lru_cache(maxsize=2)
def _tokenizer(path: str) -> TextTokenizer:
    return TextTokenizer(path)


@functools.lru_cache(maxsize=2)
def _class_table(space: TokenSpace) -> np.ndarray:
    return space.class_table()


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
