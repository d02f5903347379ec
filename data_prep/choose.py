"""Chooses the codec and the text tokenizer: as given, or fitted and trained on the training side. Kept in RUN/data."""

import heapq
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_soda.audio.reading import read_pieces
from megatron_soda.audio.sound import BadAudio
from megatron_soda.codecs import QUANTISER_FILE, load_codec
from megatron_soda.codecs.description import DESCRIPTION, CodecDescription, read_description
from megatron_soda.config import Recipe
from megatron_soda.console import console
from megatron_soda.errors import SodaError
from megatron_soda.files import atomic_path, reading, sha256, write_json, write_text
from megatron_soda.tokenizer import (
    NAMES,
    TextTokenizer,
    clean_text,
    data_tokenizer,
    train_sentencepiece,
    write_byte_tokenizer,
)
from megatron_soda.vocab import TokenSpace

from . import numbers
from .index import Index, digest, sample
from .split import ID, Groups
from .utterance import Utterance

FIT_AT_LEAST = 600.0  # seconds of speech; below that, the embedded codec's shipped quantiser is better
FIT_AT_MOST = 5400.0
FIT_UTTERANCES = 20_000  # sampled; at most FIT_AT_MOST seconds of them are read
TOKENIZER_SENTENCES = 500_000  # at most


def choose_codec(recipe: Recipe, index: Index, groups: Groups, folder: Path) -> CodecDescription:
    """Chooses the codec, fits it if needed, and writes FOLDER/codec.json, which says how to load it. Returns its
    content."""
    p = recipe.prepare
    path = p.codec_path or None
    wanted = {"codebooks": p.codebooks or 8, "entries": p.entries or 2048}
    if p.codec == "embedded" and not path:

        def fits(one: Utterance) -> bool:
            again = p.numbers > 0 and numbers.is_string(one)  # words of the prompts again
            return one.heard and not again and groups.side([f"{ID}\0{one.id}"]) == "train"

        some = sample(index.shards, FIT_UTTERANCES, fits)
        fitted, stamp = folder / QUANTISER_FILE, folder / "codec.key"
        key = digest(wanted, recipe.seed, [(u.id, when) for u, when in some])
        if _is_stamped(fitted, stamp, key):
            path = str(fitted)
        else:
            waves = _fit_audio([u for u, _ in some])
            seconds = sum(map(len, waves)) / 24_000
            if seconds >= FIT_AT_LEAST or wanted != {"codebooks": 8, "entries": 2048}:
                _fit(waves, fitted, wanted, recipe.seed)
                _stamp(fitted, stamp, key)
                path = str(fitted)
            else:
                console.print(f"{seconds:.0f} s of speech: too little to fit the codec, using the shipped one")
    arguments: dict[str, Any] = {"spec": p.codec, "path": path}
    if p.codec != "embedded":
        arguments["codebooks"] = p.codebooks or None
    chosen = CodecDescription.of(load_codec(**arguments), arguments)
    try:
        unchanged = read_description(folder) == chosen
    except SodaError:  # missing or damaged
        unchanged = False
    if not unchanged:
        write_json(folder / DESCRIPTION, chosen.to_dict())
    return chosen


def _fit_audio(train: list[Utterance]) -> list[np.ndarray]:
    """Audio of the utterances, up to a minute of each and FIT_AT_MOST seconds in all. Unreadable files are reported
    during encoding."""
    waves, seconds = [], 0.0
    for utterance in train:
        try:
            waves.append(next(read_pieces(utterance.audio, 24_000, samples_per_frame=1920)))
        except BadAudio:
            continue
        seconds += len(waves[-1]) / 24_000
        if seconds > FIT_AT_MOST:
            break
    return waves


def _fit(waves: list[np.ndarray], path: Path, wanted: dict[str, int], seed: int) -> None:
    from rich.progress import Progress

    from megatron_soda.codecs.embedded import EmbeddedCodec

    with Progress(console=console) as progress:
        task = progress.add_task("fit codec", total=1.0)
        codec = EmbeddedCodec.fit(
            waves, seed=seed, **wanted, progress=lambda done, _: progress.update(task, completed=done)
        )
    codec.save(path)


def choose_tokenizer(
    recipe: Recipe,
    transcripts: Iterator[tuple[str, str]],
    lines: Iterator[tuple[str, str]],
    key: str,
    folder: Path,
    sizes: tuple[int, int],
) -> TextTokenizer:
    """Copies the text tokenizer to FOLDER, or trains one; without any text it is byte-level. transcripts, lines: (id,
    text) of the training side. `key` identifies them: a tokenizer trained with the same key is kept. sizes: codebooks
    and entries, which determine the characters that a text must not contain."""
    p, stamp = recipe.prepare, folder / "text_tokenizer.key"
    if p.tokenizer:
        source = TextTokenizer(p.tokenizer)
        path, model = folder / f"text_tokenizer{source.path.suffix}", source.path.read_bytes()
        _forget(folder)
        with atomic_path(path) as temporary:
            temporary.write_bytes(model)
        return TextTokenizer(path)
    key = digest(key, p.text_pieces, sizes)
    if any(_is_stamped(folder / name, stamp, key) for name in NAMES):
        return data_tokenizer(folder)
    _forget(folder)
    if some := sentences(transcripts, lines, sizes):
        with console.status("training the text tokenizer"):
            train_sentencepiece(folder / NAMES[0], some, p.text_pieces)
    else:
        console.print("no transcripts and no text: using a byte-level text tokenizer, since every model needs one")
        write_byte_tokenizer(folder / NAMES[1])
    made = data_tokenizer(folder)
    _stamp(made.path, stamp, key)
    return made


def sentences(
    transcripts: Iterable[tuple[str, str]],
    lines: Iterable[tuple[str, str]],
    sizes: tuple[int, int],
    count: int = TOKENIZER_SENTENCES,
) -> list[str]:
    """What the tokenizer is trained on (arguments as in choose_tokenizer): at most `count` transcripts, plus a quarter
    as many lines; without transcripts, only lines."""
    spoken = _some(transcripts, count)
    some = _some(lines, max(200, len(spoken) // 4) if spoken else count)
    return [clean_text(text, TokenSpace(0, 0, 0, *sizes)) for text in sorted(spoken) + some]


def _stamp(made: Path, stamp: Path, key: str) -> None:
    """Records what a file was made from, and its hash."""
    write_text(stamp, f"{key} {sha256(made)}")


def _is_stamped(made: Path, stamp: Path, key: str) -> bool:
    """Whether the file is the one made from this, neither damaged since nor replaced."""
    if not (made.is_file() and stamp.is_file()):
        return False
    with reading(stamp):
        return stamp.read_bytes() == f"{key} {sha256(made)}".encode()


def _forget(folder: Path) -> None:
    for old in folder.glob("text_tokenizer.*"):
        old.unlink()


def _some(texts: Iterable[tuple[str, str]], count: int) -> list[str]:
    """At most `count` of the texts, those whose ids have the lowest hashes, so that their order does not matter."""
    return [text for _, text in heapq.nsmallest(count, ((digest(id), text) for id, text in texts if text))]


def take_codec_of(units: Path, chosen: CodecDescription, folder: Path) -> None:
    """Writes FOLDER/codec.json for unit shards from elsewhere, with the fitted codec if it still exists."""
    path, fitted = chosen.arguments.get("path") or "", folder / QUANTISER_FILE
    if chosen.name == "embedded" and path and Path(path).is_file() and Path(path) != fitted:
        # Not just any file is copied, and exported later.
        if load_codec("embedded", path).fingerprint != chosen.fingerprint:
            raise SodaError(f"{units}: its codec is {chosen.fingerprint}, and {path}, which it names, is another one")
        with atomic_path(fitted) as temporary:
            temporary.write_bytes(Path(path).read_bytes())
    if chosen.name == "embedded" and path and not Path(path).is_file():
        console.note(f"{units}", f": its codec {path} is missing; the speech cannot be decoded without it")
    write_text(folder / DESCRIPTION, json.dumps(chosen.to_dict(), indent=1) + "\n")
