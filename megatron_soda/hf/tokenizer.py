"""The tokenizer of an export: the text tokenizer with the markers and an added token for every audio code.

Audio codes are characters from U+E000 on, as in SODA's released corpora, so a document is a plain string.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, processors

from ..errors import SodaError
from ..files import reading, write_text
from ..tokenizer import NAMES, NEITHER, TextTokenizer, clean_text, engine, read_spec
from ..vocab import BOS, EOS, FIRST_AUDIO_CHARACTER, MARKERS, TokenSpace

__all__ = ["build_tokenizer", "extend_tokenizer", "save_tokenizer"]


def build_tokenizer(text: TextTokenizer, space: TokenSpace) -> Tokenizer:
    """A fast tokenizer whose ids are those of `space`. Like SODA's it puts BOS before what it encodes.

    SodaError if the tokenizer's ids leave no room for that.
    """
    audio = [chr(FIRST_AUDIO_CHARACTER + i) for i in range(space.codebooks * space.entries)]
    spec = text.spec()
    # A text never holds these characters (`clean_text`), but a vocabulary may: the codes need ids of their own. Behind
    # BOS, which is cut out of every string before, such a piece is never found.
    with reading(text.path, NEITHER):
        _rename(spec, {character: BOS + character for character in audio})
    tokenizer = engine(spec, text.path)
    with reading(text.path, NEITHER):
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS, *MARKERS)])
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in audio])
    wanted = {BOS: space.bos, EOS: space.eos, MARKERS[0]: space.text_start, MARKERS[3]: space.audio_end}
    wanted |= {audio[0]: space.audio_base, audio[-1]: space.size - 1}
    for token, number in wanted.items():
        if tokenizer.token_to_id(token) != number:
            raise SodaError(
                f"{text.path}: {token!r} gets id {tokenizer.token_to_id(token)} in the tokenizer and should have "
                f"{number}: the ids of the text tokenizer are not 0 to {space.text_size - 1} without gaps"
            )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, space.bos)]
    )
    return tokenizer


def save_tokenizer(text: TextTokenizer, space: TokenSpace, folder: Path, max_length: int | None) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=build_tokenizer(text, space),
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def extend_tokenizer(source: Path, folder: Path, codebooks: int, entries: int) -> TokenSpace:
    """Writes `folder` with SODA's tokenizer on top of another one: what transformers' AutoTokenizer loads, and
    text_tokenizer.json, the text part, which TextTokenizer (and so `prepare.tokenizer`) finds in the folder.

    `source` is a sentencepiece model, a tokenizer.json or a folder with one. A missing EOS is what was
    <|endoftext|>, if there is one; else BOS and EOS are added behind all other ids. Returns the token space.
    Raises SodaError for a source that cannot be read or is extended already, and for a folder that is in use.
    """
    if codebooks * entries > sys.maxunicode + 1 - FIRST_AUDIO_CHARACTER:
        raise SodaError(f"{codebooks} codebooks of {entries}: there are not that many characters for the codes")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise SodaError(f"{folder}: exists already; choose another folder, or remove it")
    path = source / "tokenizer.json" if source.is_dir() else source
    if not path.is_file():
        raise SodaError(f"{path}: no such tokenizer (a sentencepiece .model, a tokenizer.json, or a folder with one)")
    spec = read_spec(path)
    if engine(spec, path).token_to_id(EOS) is None:
        with reading(path, NEITHER):
            _rename(spec, {"<|endoftext|>": EOS})
    base = engine(spec, path)
    with reading(path, NEITHER):
        base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        write_text(temporary / NAMES[1], base.to_str())
        text = TextTokenizer(temporary / NAMES[1])
        space = text.space(codebooks, entries)
        compare_samples(text, space, save_tokenizer(text, space, temporary, None), path)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return space


def split_tokenizer(path: Path, shape: tuple[int, int] | None) -> tuple[dict[str, Any], TokenSpace] | None:
    """The text part of a tokenizer.json that has the markers and the audio codes, and its token space. None if it has
    no markers. `shape`: codebooks and entries; None: codebooks of 2,048.

    SodaError if its ids are not in SODA's order.
    """
    spec = read_spec(path)
    whole = engine(spec, path)
    markers = [whole.token_to_id(marker) for marker in MARKERS]
    if not any(marker is not None for marker in markers):
        return None
    bos, eos, first = whole.token_to_id(BOS), whole.token_to_id(EOS), markers[0]
    if (
        first is None
        or markers != list(range(first, first + len(MARKERS)))
        or None in (bos, eos)
        or max(bos, eos) > first
    ):
        found = dict(zip((BOS, EOS, *MARKERS), (bos, eos, *markers), strict=True))
        raise SodaError(f"{path}: its markers are not in SODA's order: {found}")
    base, codes = first + len(MARKERS), 0
    while whole.token_to_id(chr(FIRST_AUDIO_CHARACTER + codes)) == base + codes:
        codes += 1
    codebooks, entries = shape or (codes // 2048, 2048)
    if codebooks * entries != codes or not codes:
        raise SodaError(f"{path}: has {codes:,} audio codes; say how many codebooks these are (--codebooks, --entries)")
    if whole.get_vocab_size(with_added_tokens=True) != base + codes:
        raise SodaError(f"{path}: has other tokens behind the {codes:,} audio codes")
    with reading(path, NEITHER):
        model, vocabulary = spec["model"], spec["model"]["vocab"]
        if isinstance(vocabulary, dict):
            gone = {piece for piece, number in vocabulary.items() if number >= first}
            model["vocab"] = {piece: number for piece, number in vocabulary.items() if number < first}
        else:
            gone = {piece for piece, _ in vocabulary[first:]}
            model["vocab"] = vocabulary[:first]
        _drop_merges(model, gone)
        spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < first]
    return spec, TokenSpace(first, bos, eos, codebooks, entries)


SAMPLES = (
    *("a", " Two  spaces, a tab\tand\na line ", "naïve façade", "<unk>[1]"),
    *("Добрый день", "你好，世界", "مرحبا", "🙂"),
)


def compare_samples(text: TextTokenizer, space: TokenSpace, tokenizer: Any, path: Path) -> None:
    """SodaError if a text has other ids in a document than alone."""
    for sample in SAMPLES:
        ids = text.encode(clean_text(sample, space))
        document = [space.text_start, *ids, space.text_end]
        string = f"{MARKERS[0]}{clean_text(sample, space)}{MARKERS[1]}"
        if not np.array_equal(tokenizer(string, add_special_tokens=False)["input_ids"], document):
            raise SodaError(f"{path}: {sample!r} has other ids inside a document than alone; it cannot be extended")


def _rename(spec: dict[str, Any], names: dict[str, str]) -> None:
    """Renames tokens in a spec and drops the merges that made or used them."""
    model, added = spec["model"], spec["added_tokens"]
    vocabulary = model["vocab"]
    held = vocabulary.keys() if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    names = {old: new for old, new in names.items() if old in held or any(t["content"] == old for t in added)}
    if not names:
        return
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(piece, piece): i for piece, i in vocabulary.items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
    _drop_merges(model, set(names))
    for token in added:
        token["content"] = names.get(token["content"], token["content"])


def _drop_merges(model: dict[str, Any], pieces: set[str]) -> None:
    """Drops the merges that make or use any of the pieces."""
    if "merges" in model and pieces:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not pieces & {*pair, "".join(pair)}]
