"""`soda prepare`: turns speech and text into the stores train, valid and test. Finished shards are skipped.

    source -> index -> units (Parquet) -> split -> parts (ids) -> stores

RUN/data/work holds the index and the parts. RUN/data/units holds the codes, which are expensive and kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import Recipe
from megatron_soda.data.store import Store
from megatron_soda.data.units import check_schema, read_columns, unit_codec, unit_key
from megatron_soda.errors import SodaError
from megatron_soda.files import locked, read_json, reading, write_json
from megatron_soda.run_folder import record_timing
from megatron_soda.tokenizer import TextTokenizer
from megatron_soda.vocab import TokenSpace

from . import choose, documents, encode
from .documents import PartJob
from .executor import Job, Result, run_jobs
from .index import digest
from .inputs import Inputs, check_rejects, check_sides, files, items, read_inputs
from .show import Rejects, console, progress
from .split import SIDES, Groups, group_units, sides_of_texts, sides_of_units
from .stores import Parts, Spoken, read_facts, write_stores
from .utterance import Reject

SHOWN_REJECTS = 1000
TRAIN = str(SIDES.index("train"))


def prepare(recipe: Recipe, dry_run: bool = False) -> dict[str, Any]:
    """Prepares RUN/data and returns the content of prepare.json, or the estimates of a dry run. Raises SodaError for
    input that cannot be used, and if another process is using the folder."""
    if dry_run:
        from .dry_run import estimate

        return asdict(estimate(recipe))
    recipe.data_folder.mkdir(parents=True, exist_ok=True)
    with locked(recipe.data_folder):
        for left in [*recipe.data_folder.glob(".*.tmp"), *(recipe.data_folder / "units").glob(".*.tmp")]:
            left.unlink()  # left by a killed run
        return _prepare(recipe)


def _prepare(recipe: Recipe) -> dict[str, Any]:
    p, folder, laps = recipe.prepare, recipe.data_folder, _Laps()
    if p.speech and not p.units and not any((folder / "units").glob("part-*.parquet")):  # else all may be encoded
        encode.check_decoder(p.decoder, gpu=_has_gpu())
    rejects = Rejects(folder / "work" / "rejects.jsonl", folder / "rejects.jsonl")
    found = read_inputs(recipe, folder / "work", rejects)
    laps.end("index")
    spoken = _units(recipe, found, rejects, laps)
    laps.end("encode")
    sides = _split(recipe, found, spoken, rejects)
    laps.end("split")
    sizes = _sizes(recipe, spoken)
    tokenizer = _tokenizer(recipe, found, spoken, sides, sizes)
    space = tokenizer.space(*sizes)
    laps.end("tokenizer")

    jobs = _part_jobs(recipe, found, spoken, sides, tokenizer, space)
    key = digest([job.key for job in jobs.all], recipe.prepare.text_share, list(SIDES), recipe.prepare.store)
    done = folder / "prepare.json"
    if (summary := _whole(folder, key, bool(spoken.paths))) is not None:
        rejects.close()
        console.print(f"{folder}: prepared already, nothing to do")
        return summary
    done.unlink(missing_ok=True)  # it must not describe stores that are half of this run

    for _ in _run("documents", documents.make_part, jobs.all, documents.is_done, recipe):
        pass
    for job in jobs.all:
        _collect(job.out, rejects)
    laps.end("documents")
    rejects.keep()
    parts = Parts(read_facts(jobs.speech), read_facts(jobs.text))
    written = write_stores(recipe, parts, spoken, sides.units, tokenizer, space, rejects, key)
    laps.end("stores")
    summary = asdict(written) | _summary(recipe, found, spoken.codec, tokenizer, rejects, key)
    write_json(done, summary)
    shutil.rmtree(folder / "work" / "parts", ignore_errors=True)
    record_timing(Path(recipe.run), "prepare", laps.whole())
    console.print(
        f"{written.utterances:,} utterances, {written.hours:.2f} h -> "
        f"{sum(written.tokens.values()):,} tokens; {rejects.count} rejected"
    )
    return summary


class _Laps:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._began = self._mark = time.monotonic()
        self._seconds: dict[str, float] = {}

    def end(self, name: str) -> None:
        now = time.monotonic()
        self._seconds[name] = now - self._mark
        self._mark = now

    def whole(self) -> dict[str, float]:
        return {**self._seconds, "seconds": time.monotonic() - self._began}


# ---- stages


@dataclass(frozen=True)
class _Sides:
    """The sides of the rows of every unit shard and text shard, one digit per row (see split.py)."""

    units: list[str]
    texts: list[str]


@dataclass(frozen=True)
class _PartJobs:
    speech: list[PartJob]
    text: list[PartJob]

    @property
    def all(self) -> list[PartJob]:
        return self.speech + self.text


def _units(recipe: Recipe, found: Inputs, rejects: Rejects, laps: _Laps) -> Spoken:
    """The unit shards, given or encoded."""
    folder = recipe.data_folder
    if recipe.prepare.units:
        return _given_units(recipe, folder)
    if found.speech.shards:
        codec = choose.choose_codec(recipe, found.speech, found.groups, folder)
        laps.end("codec")
        return _encode(recipe, found, codec, rejects)
    for name in ("codec.json", "valid.parquet", "test.parquet"):
        (folder / name).unlink(missing_ok=True)  # from other data in this folder
    return Spoken([], [], None)


def _given_units(recipe: Recipe, folder: Path) -> Spoken:
    """Existing unit shards, all from one codec."""
    units = files(recipe.prepare.units, "prepare.units")
    codec = unit_codec(units[0])
    for path in units:
        check_schema(path)
        other = unit_codec(path)
        if other.fingerprint != codec.fingerprint:
            raise SodaError(
                f"{path}: its codes are of codec {other.name} {other.fingerprint}, those of {units[0]} of "
                f"{codec.name} {codec.fingerprint}: they mean different sounds and cannot be in one store"
            )
    choose.take_codec_of(units[0], codec, folder)
    keys = [digest(unit_key(path), path.stat().st_size, path.stat().st_mtime_ns) for path in units]
    return Spoken(units, keys, codec)


def _encode(recipe: Recipe, found: Inputs, codec: CodecDescription, rejects: Rejects) -> Spoken:
    p, index, bad = recipe.prepare, found.speech, found.speech_rejects
    units = recipe.data_folder / "units"
    units.mkdir(exist_ok=True)
    jobs = encode.encode_jobs(index.shards, units, codec, decoder=p.decoder, trim=p.trim)
    wanted = {job.out.name for job in jobs}
    for old in units.glob("part-*"):
        if f"{old.name.split('.')[0]}.parquet" not in wanted:
            old.unlink()
    total, before, early = index.utterances + bad, rejects.count - bad, False
    gpu = p.codec != "embedded" and _has_gpu()
    for rejected in _run("encode", encode.encode_shard, jobs, encode.is_done, recipe, gpu):
        bad += rejected
        if early := bad > p.max_rejects * total:
            break
    for job in jobs:
        if encode.is_done(job):
            _collect(job.out, rejects)
    if rejects.count > 5:
        console.note(f"and {rejects.count - 5} more", f", see {rejects.kept}")
    check_rejects(recipe, rejects.count - before, total, rejects, early)
    return Spoken([job.out for job in jobs], [job.key for job in jobs], codec)


def _split(recipe: Recipe, found: Inputs, spoken: Spoken, rejects: Rejects) -> _Sides:
    p, work, groups = recipe.prepare, recipe.data_folder / "work", found.groups
    if spoken.paths:  # again: now with what could be encoded, and by its sound
        groups.close()
        groups = Groups(work / "groups.sqlite")
        group_units(spoken.paths, groups, p.split_by, work / "ids.sqlite")
        groups.divide(p.valid_share, p.test_share)
        if not found.released:
            check_sides(groups, rejects)
    units = sides_of_units(spoken.paths, groups)
    texts = sides_of_texts(found.texts.shards, groups, p.valid_share, p.test_share)
    groups.close()
    return _Sides(units, texts)


def _sizes(recipe: Recipe, spoken: Spoken) -> tuple[int, int]:
    """Codebooks and entries."""
    p = recipe.prepare
    return (spoken.codec.codebooks, spoken.codec.entries) if spoken.codec else (p.codebooks or 8, p.entries or 2048)


def _tokenizer(recipe: Recipe, found: Inputs, spoken: Spoken, sides: _Sides, sizes: tuple[int, int]) -> TextTokenizer:
    digits = "".join(sides.texts)
    return choose.choose_tokenizer(
        recipe,
        _transcripts(spoken.paths, sides.units),
        ((u.id, u.text) for u, digit in zip(items(found.texts), digits, strict=True) if digit == TRAIN),
        digest(spoken.keys, [s.key for s in found.texts.shards], sides.units, sides.texts),
        recipe.data_folder,
        sizes,
    )


def _part_jobs(
    recipe: Recipe, found: Inputs, spoken: Spoken, sides: _Sides, tokenizer: TextTokenizer, space: TokenSpace
) -> _PartJobs:
    p, parts = recipe.prepare, recipe.data_folder / "work" / "parts"
    settings = documents.PartSettings(
        tokenizer=tokenizer.path,
        tokenizer_fingerprint=tokenizer.fingerprint,
        space=space,
        orders=tuple(p.orders),
        shares=(p.valid_share, p.test_share),
        seed=recipe.seed,
        corpus_codebooks=p.corpus_codebooks,
    )
    units = documents.unit_jobs(spoken.paths, spoken.keys, sides.units, parts, settings)
    strings = documents.string_jobs(found.released, parts, settings)
    return _PartJobs(units + strings, documents.text_jobs(found.texts.shards, sides.texts, parts, settings))


def _summary(
    recipe: Recipe,
    found: Inputs,
    codec: CodecDescription | None,
    tokenizer: TextTokenizer,
    rejects: Rejects,
    key: str,
) -> dict[str, Any]:
    """The content of prepare.json apart from the stores."""
    return {
        "key": key,
        "repeated_texts": found.repeated_texts,
        "cut_recordings": found.speech.cut_recordings,
        "rejects": _first(recipe.data_folder / "rejects.jsonl", SHOWN_REJECTS),
        "reject_count": rejects.count,
        "reject_reasons": dict(rejects.reasons.most_common()),
        "codec": {k: getattr(codec, k) for k in ("name", "fingerprint", "codebooks", "entries")} if codec else None,
        "tokenizer": {"file": tokenizer.path.name, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size},
        "attribution": _attribution(recipe),
    }


def _run(
    name: str,
    function: Callable[[Job], Result],
    jobs: list[Job],
    is_done: Callable[[Job], bool],
    recipe: Recipe,
    gpu: bool = False,
) -> Iterator[Result]:
    """Runs the jobs that are not done yet."""
    left = [job for job in jobs if not is_done(job)]
    with progress(name, len(jobs), len(jobs) - len(left)) as advance:
        p = recipe.prepare
        for result in run_jobs(function, left, workers=p.workers, executor=p.executor, gpu=gpu):
            advance(1)
            yield result


def _collect(part: Path, rejects: Rejects) -> None:
    path = part.with_suffix(".rejects.json")
    if path.is_file():
        with reading(path, "not a list of rejects; delete it and run the same command again"):
            some = [Reject(**r) if isinstance(r, dict) else Reject(*r) for r in read_json(path, list)]
        for reject in some:
            rejects.add(reject)


def _transcripts(units: list[Path], sides: list[str]) -> Iterator[tuple[str, str]]:
    for path, some in zip(units, sides, strict=True):
        for row, digit in zip(read_columns(path, ["id", "text"]), some, strict=True):
            if digit == TRAIN:
                yield row["id"], row["text"]


# ---- small things


def _whole(folder: Path, key: str, spoken: bool) -> dict[str, Any] | None:
    """The content of prepare.json, if it and the stores have this key and the stores are intact."""
    path = folder / "prepare.json"
    if not path.is_file():
        return None
    try:
        summary = read_json(path, dict)
        if summary.get("key") != key:
            return None
        with reading(path, "not in the form that this version writes"):
            made = {name: str(summary["stores"][name]) for name in SIDES}
        for name in SIDES:
            if Store(folder / name).fingerprint != made[name]:
                raise SodaError(f"{folder / name}: a store from another preparation")
            if spoken and name != "train" and unit_key(folder / f"{name}.parquet") != digest(key, name):
                raise SodaError(f"{folder / name}.parquet: missing, or from another preparation")
        return summary
    except SodaError as error:
        console.note("made again", f": {error}")
        return None


def _attribution(recipe: Recipe) -> str:
    if recipe.prepare.speech != "asterisk" or recipe.prepare.units:
        return ""
    return (Path(recipe.prepare.downloads) / "asterisk" / "ATTRIBUTION.md").read_text(encoding="utf-8")


def _first(path: Path, count: int) -> list[dict]:
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line, _ in zip(file, range(count), strict=False)]


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
