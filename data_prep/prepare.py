"""`soda prepare`: speech and text to the stores train, valid and test. What is done is skipped, shard by shard.

    source -> index -> units (Parquet) -> split -> parts (ids) -> stores

RUN/data/work holds the index and the parts; RUN/data/units the codes, which are expensive, and kept.
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.markup import escape

from megatron_soda.codecs.description import CodecDescription
from megatron_soda.config import Recipe
from megatron_soda.data.store import Store
from megatron_soda.data.units import check_schema, read_columns, unit_codec, unit_key
from megatron_soda.errors import SodaError
from megatron_soda.files import locked, read_json, reading, write_json
from megatron_soda.run_folder import record_timing

from . import choose, documents, encode
from .executor import Job, Result, run_jobs
from .index import Index, digest
from .inputs import check_rejects, check_sides, files, items, read_inputs
from .show import Rejects, console, progress
from .split import SIDES, Groups, group_units, sides_of_texts, sides_of_units
from .stores import write_stores
from .utterance import Reject

SHOWN_REJECTS = 1000
TRAIN = str(SIDES.index("train"))


def prepare(recipe: Recipe, dry_run: bool = False) -> dict[str, Any]:
    """Prepares RUN/data and returns what prepare.json holds; of a dry run, what is expected. Raises SodaError for input
    that cannot be used, and if another process is at work on the folder."""
    if dry_run:
        from .dry_run import estimate

        return estimate(recipe)
    recipe.data_folder.mkdir(parents=True, exist_ok=True)
    with locked(recipe.data_folder):
        for left in [*recipe.data_folder.glob(".*.tmp"), *(recipe.data_folder / "units").glob(".*.tmp")]:
            left.unlink()  # of a killed run
        return _prepare(recipe)


def _prepare(recipe: Recipe) -> dict[str, Any]:
    began = mark = time.monotonic()
    timings: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal mark
        timings[name] = time.monotonic() - mark
        mark = time.monotonic()

    p, folder = recipe.prepare, recipe.data_folder
    work, parts = folder / "work", folder / "work" / "parts"
    rejects = Rejects(work / "rejects.jsonl", folder / "rejects.jsonl")
    found = read_inputs(recipe, work, rejects)
    index, texts = found.speech, found.texts
    lap("index")

    codec: CodecDescription | None = None
    if p.units:
        units, codec = _given_units(recipe, folder)
        unit_keys = [digest(unit_key(path), path.stat().st_size, path.stat().st_mtime_ns) for path in units]
    elif index.shards:
        codec = choose.choose_codec(recipe, index, found.groups, folder)
        lap("codec")
        units, unit_keys = _encode(recipe, index, codec, folder, rejects, found.speech_rejects)
    else:
        units, unit_keys = [], []
        for name in ("codec.json", "valid.parquet", "test.parquet"):
            (folder / name).unlink(missing_ok=True)  # of other data in this folder
    lap("encode")

    groups = found.groups
    if units:  # anew: by what could be encoded, and by its sound
        groups.close()
        groups = Groups(work / "groups.sqlite")
        group_units(units, groups, p.split_by, work / "ids.sqlite")
        groups.divide(p.valid_share, p.test_share)
        if not found.released:
            check_sides(groups, rejects)
    sides, text_sides = sides_of_units(units, groups), sides_of_texts(texts.shards, groups, p.valid_share, p.test_share)
    groups.close()
    lap("split")

    sizes = (codec.codebooks, codec.entries) if codec else (p.codebooks or 8, p.entries or 2048)
    tokenizer = choose.choose_tokenizer(
        recipe,
        _transcripts(units, sides),
        ((u.id, u.text) for u, digit in zip(items(texts), "".join(text_sides), strict=True) if digit == TRAIN),
        digest(unit_keys, [s.key for s in texts.shards], sides, text_sides),
        folder,
        sizes,
    )
    space = tokenizer.space(*sizes)
    lap("tokenizer")

    settings = {
        "tokenizer": str(tokenizer.path),
        "tokenizer_fingerprint": tokenizer.fingerprint,
        "space": space.to_dict(),
        "orders": list(p.orders),
        "shares": (p.valid_share, p.test_share),
        "seed": recipe.seed,
        "corpus_codebooks": p.corpus_codebooks,
    }
    jobs = {
        "speech": documents.unit_jobs(units, unit_keys, sides, parts, settings)
        + documents.string_jobs(found.released, parts, settings),
        "text": documents.text_jobs(texts.shards, text_sides, parts, settings),
    }
    key = digest([job["key"] for some in jobs.values() for job in some], p.text_share, list(SIDES), p.store)
    done = folder / "prepare.json"
    if (summary := _whole(folder, key, bool(units))) is not None:
        rejects.close()
        console.print(f"{folder}: prepared already, nothing to do")
        return summary
    done.unlink(missing_ok=True)  # it must not speak for stores that are half of this run

    for _ in _run("documents", documents.make_part, [*jobs["speech"], *jobs["text"]], documents.is_done, recipe):
        pass
    for job in [*jobs["speech"], *jobs["text"]]:
        _collect(Path(job["out"]), rejects)
    lap("documents")
    rejects.keep()
    summary = write_stores(recipe, jobs, units, sides, tokenizer, space, codec, rejects, key)
    lap("stores")
    timings["seconds"] = time.monotonic() - began
    summary.update(
        key=key,
        repeated_texts=found.repeated_texts,
        cut_recordings=index.cut_recordings,
        rejects=_first(folder / "rejects.jsonl", SHOWN_REJECTS),
        reject_count=rejects.count,
        reject_reasons=dict(rejects.reasons.most_common()),
        codec={k: getattr(codec, k) for k in ("name", "fingerprint", "codebooks", "entries")} if codec else None,
        tokenizer={"file": tokenizer.path.name, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size},
        attribution=_attribution(recipe),
    )
    write_json(done, summary)
    shutil.rmtree(parts, ignore_errors=True)
    record_timing(Path(recipe.run), "prepare", timings)
    console.print(
        f"{summary['utterances']:,} utterances, {summary['hours']:.2f} h -> "
        f"{sum(summary['tokens'].values()):,} tokens; {rejects.count} rejected"
    )
    return summary


# ---- stages


def _given_units(recipe: Recipe, folder: Path) -> tuple[list[Path], CodecDescription]:
    """Unit shards that were made before, all by one codec."""
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
    return units, codec


def _encode(
    recipe: Recipe, index: Index, codec: CodecDescription, folder: Path, rejects: Rejects, bad: int
) -> tuple[list[Path], list[str]]:
    p = recipe.prepare
    units = folder / "units"
    units.mkdir(exist_ok=True)
    jobs = encode.encode_jobs(index.shards, units, codec, {name: getattr(p, name) for name in encode.SETTINGS})
    wanted = {Path(job["out"]).name for job in jobs}
    for old in units.glob("part-*"):
        if f"{old.name.split('.')[0]}.parquet" not in wanted:
            old.unlink()
    total, before, early = index.utterances + bad, rejects.count - bad, False
    gpu = p.codec != "embedded" and _has_gpu()
    for result in _run("encode", encode.encode_shard, jobs, encode.is_done, recipe, gpu):
        bad += result["rejects"]
        if early := bad > p.max_rejects * total:
            break
    for job in jobs:
        if encode.is_done(job):
            _collect(Path(job["out"]), rejects)
    if rejects.count > 5:
        console.print(f"[yellow]and {rejects.count - 5} more[/], see {rejects.kept}")
    check_rejects(recipe, rejects.count - before, total, rejects, early)
    return [Path(job["out"]) for job in jobs], [job["key"] for job in jobs]


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
    """What prepare.json says, if it is of this key and the stores are whole and of it too."""
    path = folder / "prepare.json"
    if not path.is_file():
        return None
    try:
        summary = read_json(path, dict)
        if summary.get("key") != key:
            return None
        with reading(path, "not what this version writes"):
            made = {name: str(summary["stores"][name]) for name in SIDES}
        for name in SIDES:
            if Store(folder / name).fingerprint != made[name]:
                raise SodaError(f"{folder / name}: a store of another preparation")
            if spoken and name != "train" and unit_key(folder / f"{name}.parquet") != digest(key, name):
                raise SodaError(f"{folder / name}.parquet: gone, or of another preparation")
        return summary
    except SodaError as error:
        console.print(f"[yellow]made again[/]: {escape(str(error))}")
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
