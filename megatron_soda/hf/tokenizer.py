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
    base.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (BOS, EOS)])
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        write_text(temporary / NAMES[1], base.to_str())
        text = TextTokenizer(temporary / NAMES[1])
        space = text.space(codebooks, entries)
        _compare(text, space, save_tokenizer(text, space, temporary, None), path)
        if folder.is_dir():
            folder.rmdir()
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return space


SAMPLES = (
    *("a", " Two  spaces, a tab\tand\na line ", "naïve façade", "<unk>[1]"),
    *("Добрый день", "你好，世界", "مرحبا", "🙂"),
)


def _compare(text: TextTokenizer, space: TokenSpace, tokenizer: Any, path: Path) -> None:
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
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not names.keys() & {*pair, "".join(pair)}]
    for token in added:
        token["content"] = names.get(token["content"], token["content"])
