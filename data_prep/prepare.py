"""`soda prepare`: speech and text to the stores train, valid and test. Every stage that is done is skipped.

source -> codec -> units (Parquet) -> tokenizer -> stores
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_soda.config import Recipe
from megatron_soda.data.store import Store, write_store
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path, read_json, write_json, write_text
from megatron_soda.run_folder import record_timing
from megatron_soda.tokenizer import TextTokenizer, train_sentencepiece
from megatron_soda.vocab import TokenSpace

from . import asterisk, interleave, manifest
from .audio import BadAudio, read_audio
from .codecs import load_codec
from .encode import encode_all, forget_others
from .split import split
from .units import read_units, write_units
from .utterance import Reject, Utterance, prompt_key

FIT_AT_LEAST = 600.0  # seconds of speech; with less, the quantiser that ships with the embedded codec is better
FIT_AT_MOST = 5400.0
SIDES = ("train", "valid", "test")

console = Console(stderr=True)


def prepare(recipe: Recipe) -> dict[str, Any]:
    """Prepares RUN/data and returns what prepare.json holds. Raises SodaError for input that cannot be used."""
    began = time.time()
    p, folder = recipe.prepare, recipe.data_folder
    utterances, rejects = _source(recipe)
    lines = _text_lines(recipe)
    key = _key(asdict(p), recipe.seed, [(u.id, u.text, u.prompt, *_stamp(u.audio)) for u in utterances], lines)
    done = folder / "prepare.json"
    if done.is_file() and read_json(done).get("key") == key:
        for side in SIDES:
            Store(folder / side)  # raises if one was damaged since
        console.print(f"{folder}: prepared already, nothing to do")
        return read_json(done)
    folder.mkdir(parents=True, exist_ok=True)
    timings = {"source": time.time() - began}
    texts = ((u.prompt, prompt_key(u.text or "", u.id)) for u in utterances)
    sides = split(texts, p.valid_share, p.test_share)

    mark = time.time()
    codec = _codec(recipe, [u for u in utterances if sides[u.prompt] == "train"])
    timings["codec"] = time.time() - mark

    mark = time.time()
    units_folder = folder / "units" / _key(codec["fingerprint"], key)[:16]
    with _progress() as progress:
        task = progress.add_task("encode", total=len(utterances))
        shards, unreadable = encode_all(
            utterances, units_folder, codec["arguments"], p.workers, lambda n: progress.advance(task, n)
        )
    forget_others(units_folder)
    rejects += unreadable
    timings["encode"] = time.time() - mark
    _check_rejects(rejects, len(utterances) + len(rejects) - len(unreadable), p.max_rejects, folder)

    mark = time.time()
    tokenizer = _tokenizer(
        recipe, [row["text"] for row in read_units(shards) if sides[row["prompt"]] == "train"], lines
    )
    space = tokenizer.space(codec["codebooks"], codec["entries"])
    timings["tokenizer"] = time.time() - mark

    mark = time.time()
    summary = _stores(recipe, shards, sides, lines, tokenizer, space, codec)
    timings["stores"] = time.time() - mark
    timings["seconds"] = time.time() - began
    summary.update(
        key=key,
        rejects=[asdict(r) for r in rejects],
        codec={k: codec[k] for k in ("name", "fingerprint", "codebooks", "entries")},
        tokenizer={"file": tokenizer.path.name, "fingerprint": tokenizer.fingerprint, "size": tokenizer.size},
        attribution=_attribution(recipe),
    )
    write_json(done, summary)
    record_timing(Path(recipe.run), "prepare", timings)
    console.print(
        f"{summary['utterances']:,} utterances, {summary['hours']:.2f} h -> "
        f"{sum(summary['tokens'].values()):,} tokens; {len(rejects)} rejected"
    )
    return summary


# ---- source


def _source(recipe: Recipe) -> tuple[list[Utterance], list[Reject]]:
    p = recipe.prepare
    if p.speech == "asterisk":
        folder = Path(p.downloads) / "asterisk"
        with console.status("fetching the Asterisk prompts"):
            asterisk.fetch(folder, p.languages)
        utterances, rejects = asterisk.read(folder, p.languages)
    else:
        utterances, rejects = manifest.read(Path(p.speech))
    utterances.sort(key=lambda u: u.id)
    return utterances, rejects


def _text_lines(recipe: Recipe) -> list[str]:
    """Lines of the text sources, without repeats, in a seeded order."""
    paths = []
    for name in recipe.prepare.text:
        if name == "wordnet":
            with console.status("fetching text"):
                paths += asterisk.fetch_text(Path(recipe.prepare.downloads) / "wordnet")
        else:
            paths.append(Path(name))
    lines: dict[str, None] = {}
    for path in paths:
        try:
            lines.update((line.strip(), None) for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise SodaError(f"{path}: cannot read this text as UTF-8 ({error})") from None
    return sorted(lines, key=lambda line: hashlib.sha256(f"{recipe.seed}{line}".encode()).digest())


def _check_rejects(rejects: list[Reject], total: int, most: float, folder: Path) -> None:
    write_text(folder / "rejects.jsonl", "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rejects))
    for reject in rejects[:5]:
        console.print(f"[yellow]rejected[/] {reject.where}: {reject.reason}", highlight=False)
    if len(rejects) > 5:
        console.print(f"[yellow]and {len(rejects) - 5} more[/], see {folder / 'rejects.jsonl'}")
    if len(rejects) > most * total:
        raise SodaError(
            f"{len(rejects)} of {total} utterances cannot be used (limit: prepare.max_rejects={most:g}); "
            f"{folder / 'rejects.jsonl'} lists each with its reason."
        )


# ---- codec and tokenizer


def _codec(recipe: Recipe, train: list[Utterance]) -> dict[str, Any]:
    """Chooses, fits if asked to, and writes RUN/data/codec.json: how to load the codec again."""
    p, folder = recipe.prepare, recipe.data_folder
    path, wanted = p.codec_path or None, {"codebooks": p.codebooks, "entries": p.entries}
    is_default = (p.codebooks, p.entries) == (8, 2048)
    if p.codec == "embedded" and not path:
        fitted, stamp = folder / "codec.safetensors", folder / "codec.key"
        key = _key(wanted, recipe.seed, [(u.id, *_stamp(u.audio)) for u in train])
        if fitted.is_file() and stamp.is_file() and stamp.read_text() == key:
            path = str(fitted)
        else:
            waves = _fit_audio(train)
            seconds = sum(map(len, waves)) / 24_000
            if seconds >= FIT_AT_LEAST or not is_default:
                _fit(waves, fitted, wanted, recipe.seed)
                write_text(stamp, key)
                path = str(fitted)
            else:
                console.print(f"{seconds:.0f} s of speech: too little to fit the codec on, taking the one that ships")
    arguments = {"spec": p.codec, "path": path}
    if p.codec == "mimi":
        arguments["codebooks"] = p.codebooks
    codec = load_codec(**arguments)
    chosen = {
        "name": codec.name,
        "fingerprint": codec.fingerprint,
        "codebooks": codec.codebooks,
        "entries": codec.entries,
        "arguments": arguments,
    }
    write_json(folder / "codec.json", chosen)
    return chosen


def _fit_audio(train: list[Utterance]) -> list[np.ndarray]:
    """Audio of some training utterances, FIT_AT_MOST seconds in all. What cannot be read is reported by encoding."""
    waves, seconds = [], 0.0
    for utterance in sorted(train, key=lambda u: hashlib.sha256(u.id.encode()).digest()):
        try:
            waves.append(read_audio(utterance.audio, 24_000))
        except BadAudio:
            continue
        seconds += len(waves[-1]) / 24_000
        if seconds > FIT_AT_MOST:
            break
    return waves


def _fit(waves: list[np.ndarray], path: Path, wanted: dict[str, int], seed: int) -> None:
    from .codecs.embedded import EmbeddedCodec

    with _progress() as progress:
        task = progress.add_task("fit codec", total=1.0)
        codec = EmbeddedCodec.fit(
            waves, seed=seed, **wanted, progress=lambda done, _: progress.update(task, completed=done)
        )
    codec.save(path)


def load_data_codec(folder: Path):
    """The codec that made the tokens of a data folder (or of an exported model, which carries its own)."""
    chosen = read_json(folder / "codec.json")
    arguments = dict(chosen["arguments"])
    if (folder / "codec.safetensors").is_file() and arguments.get("path", "") and chosen["name"] == "embedded":
        arguments["path"] = str(folder / "codec.safetensors")
    codec = load_codec(**arguments)
    if codec.fingerprint != chosen["fingerprint"]:
        raise SodaError(
            f"{folder}: its tokens were made by codec {chosen['fingerprint']}, the one installed now is "
            f"{codec.fingerprint}. Prepare the data again, or install the version of megatron_soda that made it."
        )
    return codec


def _tokenizer(recipe: Recipe, transcripts: list[str], lines: list[str]) -> TextTokenizer:
    """Copies or trains the text tokenizer into RUN/data."""
    p, folder = recipe.prepare, recipe.data_folder
    for old in folder.glob("text_tokenizer.*"):
        old.unlink()
    if p.tokenizer:
        source = TextTokenizer(p.tokenizer)
        path = folder / f"text_tokenizer{source.path.suffix}"
        with atomic_path(path) as temporary:
            temporary.write_bytes(source.path.read_bytes())
    else:
        path = folder / "text_tokenizer.model"
        some = lines[: max(200, len(transcripts) // 4)]
        train_sentencepiece(path, sorted(transcripts) + some, p.text_pieces)
    return TextTokenizer(path)


# ---- stores


def _stores(
    recipe: Recipe,
    shards: list[Path],
    sides: dict[str, str],
    lines: list[str],
    tokenizer: TextTokenizer,
    space: TokenSpace,
    codec: dict[str, Any],
) -> dict[str, Any]:
    folder = recipe.data_folder
    rows: dict[str, list[dict]] = {side: [] for side in SIDES}
    languages: dict[str, dict[str, float]] = {}
    for row in read_units(shards):
        rows[sides[row["prompt"]]].append(row)
        entry = languages.setdefault(row["language"] or "?", {"utterances": 0, "seconds": 0.0})
        entry["utterances"] += 1
        entry["seconds"] += row["seconds"]
    line_sides = split(((x, x) for x in lines), recipe.prepare.valid_share, recipe.prepare.test_share)
    tokens, documents, classes = {}, {}, Counter()
    for side in SIDES:
        if not rows[side]:
            raise SodaError(
                f"no utterance is left for the {side} store: {sum(map(len, rows.values()))} usable utterances are "
                f"too few to split. Give more speech, or change prepare.valid_share and prepare.test_share."
            )
        made = list(_documents(rows[side], [x for x in lines if line_sides[x] == side], recipe, tokenizer, space))
        order = np.random.default_rng(recipe.seed).permutation(len(made))
        tokens[side] = write_store(
            folder / side,
            (made[i] for i in order),
            space,
            codec=codec["fingerprint"],
            tokenizer=tokenizer.fingerprint,
        )
        documents[side] = len(made)
        if side == "train":
            counts = np.bincount(space.class_table()[np.concatenate(made)], minlength=len(space.class_names))
            classes = {n: int(c) for n, c in zip(space.class_names, counts, strict=True)}
        if side != "train":
            write_units(
                folder / f"{side}.parquet", rows[side], codebooks=codec["codebooks"], fingerprint=codec["fingerprint"]
            )
    seconds = sum(entry["seconds"] for entry in languages.values())
    return {
        "utterances": sum(map(len, rows.values())),
        "hours": seconds / 3600,
        "documents": documents,
        "tokens": tokens,
        "classes": classes,
        "languages": languages,
    }


def _documents(
    rows: list[dict], lines: list[str], recipe: Recipe, tokenizer: TextTokenizer, space: TokenSpace
) -> Iterator[np.ndarray]:
    """Every utterance in both orders, then text until it has its share of the tokens."""
    spoken = 0
    for row in rows:
        utterance = [(tokenizer.encode(row["text"]), row["codes"])]
        for document in (interleave.text_first(utterance, space), interleave.audio_first(utterance, space)):
            spoken += len(document)
            yield document
    share = recipe.prepare.text_share
    left = spoken * share / (1 - share)
    for line in lines:
        if left <= 0:
            break
        document = interleave.text_only(tokenizer.encode(line), space)
        left -= len(document)
        yield document


# ---- small things


def _attribution(recipe: Recipe) -> str:
    if recipe.prepare.speech != "asterisk":
        return ""
    return (Path(recipe.prepare.downloads) / "asterisk" / "ATTRIBUTION.md").read_text(encoding="utf-8")


def _key(*values: Any) -> str:
    return hashlib.sha256(json.dumps(values, default=str, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def _progress() -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console)
