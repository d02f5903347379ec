"""The last stage: parts to the stores train, valid and test, text among the speech; and the held-out utterances."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import Recipe
from megatron_soda.data.store import Store, write_parts
from megatron_soda.data.units import SCHEMA
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path
from megatron_soda.tokenizer import TextTokenizer
from megatron_soda.vocab import TokenSpace

from . import documents
from .executor import Job
from .index import digest
from .inputs import too_little
from .seen import Seen
from .show import Rejects, console, progress
from .split import SIDES

HELD_OUT_ROWS = 20_000  # utterances kept beside the valid and the test store, to speak and transcribe


def write_stores(
    recipe: Recipe,
    jobs: dict[str, list[Job]],
    units: list[Path],
    sides: list[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    codec: CodecDescription | None,
    rejects: Rejects,
    key: str,
) -> dict[str, Any]:
    """Writes the three stores and the held-out units, and returns what prepare.json says of them. `jobs`: those of the
    parts, by `speech` and `text`; `sides`: of the rows of the units; `key`: of this preparation, which the held-out
    units carry. SodaError if a store would be empty."""
    folder, p = recipe.data_folder, recipe.prepare
    facts = {kind: [_facts(job) for job in some] for kind, some in jobs.items()}
    provenance = {
        "codec": codec.fingerprint if codec else None,
        "tokenizer": tokenizer.fingerprint,
        "slots": _slots(recipe, space, bool(units)),
    }
    tokens, written, classes = {}, {}, Counter()
    total = sum(sum(_tokens(facts, name, p.text_share)) for name in SIDES)
    with progress("stores", total) as advance, _Once(folder / "work" / "documents.sqlite", advance) as once:
        for name in SIDES:
            blend = once.of(_blend(jobs, facts, name, p.text_share))
            counted = _Counted(blend, advance, space if name == "train" else None)
            tokens[name] = write_parts(folder / name, counted, space, p.store, **provenance)
            written[name] = counted.documents
            if not tokens[name]:
                raise SodaError(too_little(name, rejects))
            classes.update(counted.classes)
            if name != "train" and units:
                _held_out(folder / f"{name}.parquet", units, sides, name, digest(key, name))
    spoken, text = (sum(f["train.tokens"] for f in facts[kind]) for kind in ("speech", "text"))
    wanted = spoken * p.text_share / (1 - p.text_share)
    if p.text and spoken and text < wanted:
        console.print(
            f"[yellow]too little text[/]: {text / (spoken + text):.1%} of the tokens, not "
            f"prepare.text_share={p.text_share:.1%}; {wanted - text:,.0f} tokens of text are missing"
        )
    if once.left_out:
        console.print(f"[yellow]{once.left_out:,} documents[/] left out, which are there already, token by token")
    languages: dict[str, dict[str, float]] = {}
    for part in facts["speech"]:
        for language, (count, seconds) in part["languages"].items():
            entry = languages.setdefault(language, {"utterances": 0, "seconds": 0.0})
            entry["utterances"] += count
            entry["seconds"] += seconds
    return {
        "utterances": sum(entry["utterances"] for entry in languages.values()),
        "hours": sum(entry["seconds"] for entry in languages.values()) / 3600,
        "documents": written,
        "duplicates": once.left_out,
        "tokens": tokens,
        "stores": {name: Store(folder / name).fingerprint for name in SIDES},
        "bytes": {
            "units": _bytes(units),
            "stores": _bytes([path for n in SIDES for path in Store(folder / n).files.values()]),
        },
        "classes": {n: int(classes[n]) for n in space.class_names},
        "languages": dict(sorted(languages.items())),
    }


def _facts(job: Job) -> dict[str, Any]:
    facts = documents.part_facts(Path(job["out"]))
    if facts is None:
        raise SodaError(f"{job['out']}: gone or damaged since it was written. Run the same command again.")
    return facts


def _slots(recipe: Recipe, space: TokenSpace, spoken: bool) -> int:
    """Codes of a frame, of which a store has one number."""
    p = recipe.prepare
    of_units = 1 if p.orders == ["semantic-only"] else space.codebooks
    of_strings = min(p.corpus_codebooks, space.codebooks)
    if spoken and p.released and of_units != of_strings:
        raise SodaError(
            f"frames of {of_units} codes from speech and of {of_strings} from prepare.released cannot be in one store: "
            "prepare them apart, and mix them in data.mix"
        )
    return of_strings if p.released and not spoken else of_units


def _tokens(facts: dict[str, list[dict]], name: str, share: float) -> tuple[int, int]:
    """Tokens of speech and of text that the store of a side gets: text alone is used whole."""
    spoken, written = (sum(f[f"{name}.tokens"] for f in facts[kind]) for kind in ("speech", "text"))
    return spoken, min(written, round(spoken * share / (1 - share))) if spoken else written


def _blend(
    jobs: dict[str, list[Job]], facts: dict[str, list[dict]], name: str, share: float
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Documents of a side: those of speech, and text evenly among them, taken evenly out of all texts."""
    spoken, wanted = _tokens(facts, name, share)
    written = sum(f[f"{name}.tokens"] for f in facts["text"])
    text = _thinned([Path(job["out"]) for job in jobs["text"]], name, wanted, written)
    given = gone = 0
    for job in jobs["speech"]:
        ids, lengths = documents.read_part(Path(job["out"]), name)
        yield ids, lengths
        gone += len(ids)
        while given * spoken < wanted * gone and (some := next(text, None)):
            given += len(some[0])
            yield some
    yield from text


def _thinned(parts: list[Path], name: str, wanted: int, total: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """About `wanted` of the `total` tokens of the parts, document by document, the same share of every part."""
    seen = given = 0
    for path in parts if wanted else []:
        ids, lengths = documents.read_part(path, name)
        seen += len(ids)
        for document in np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else ():
            if given * total >= wanted * seen:
                break
            given += len(document)
            yield document, np.array([len(document)])


class _Once:
    """Leaves out documents that were there before, in whatever store: `soda validate` would refuse them."""

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
    """Passes parts on, and counts their documents and the classes of their tokens."""

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
        schema = SCHEMA.with_metadata({**(pq.read_schema(units[0]).metadata or {}), b"key": key.encode()})
        with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            for unit, some in zip(units, sides, strict=True):
                kept = pa.array([digit == wanted for digit in some], pa.bool_())
                table = pq.read_table(unit, columns=SCHEMA.names).filter(kept).slice(0, left)
                if len(table):
                    writer.write_table(table.cast(schema))
                left -= len(table)
                if not left:
                    break


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)
