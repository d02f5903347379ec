"""Turns text into token stores, with the flags of Megatron-LM's tools/preprocess_data.py.

Reads files of JSON lines (also .gz and .zst) and writes PREFIX_KEY_document.bin and .idx, which stock megatron-core
reads, and PREFIX_KEY_document.json, with which it is a store for `soda train`. The ids are always int32.

A document is the ids of its text, plus the tokenizer's <|end_of_text|> with --append-eod. `soda prepare` (prepare.text)
makes documents that begin with <|begin_of_text|>, as SODA's do.

examples:
  python tools/preprocess_data.py --input text.jsonl --output-prefix data/wiki --workers 8 \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model llama3/tokenizer.json --append-eod
  python tools/preprocess_data.py --input 'web/*.jsonl.gz' --json-keys title text --output-prefix data/web \\
      --workers 8 --tokenizer-type SentencePieceTokenizer --tokenizer-model text.model
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_flags import parse, run

from data_prep.inputs import files
from data_prep.show import console, progress
from data_prep.sources.files import BadLine, lines
from data_prep.sources.rows import parse_json
from megatron_soda.config import choice
from megatron_soda.data.files import store_file
from megatron_soda.data.store import write_parts
from megatron_soda.errors import SodaError
from megatron_soda.tokenizer import TextTokenizer, clean_text

TYPES = {"SentencePieceTokenizer": ".model", "HuggingFaceTokenizer": ".json"}
TEXTS, LETTERS = 4096, 1 << 22  # per batch, whichever comes first; bounds the memory used
ELSEWHERE = {
    "--partitions": "not needed: --workers alone divides the work. Leave it out.",
    "--keep-sequential-samples": "documents are always in line order. Leave it out.",
    "--split-sentences": "a document is one sequence here: sentences are not split.",
    "--vocab-file": "the whole tokenizer is one file: --tokenizer-model FILE.",
    "--merge-file": "the whole tokenizer is one file: --tokenizer-model FILE.",
}


def main() -> None:
    args = parse(parser(), ELSEWHERE)
    choice("--tokenizer-type", args.tokenizer_type, tuple(TYPES))
    if args.workers < 1:
        raise SodaError(f"--workers {args.workers}: at least one is needed")
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)  # the tokenizers library's own threads
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    tokenizer = TextTokenizer(args.tokenizer_model)
    if tokenizer.path.suffix != TYPES[args.tokenizer_type]:
        raise SodaError(
            f"--tokenizer-type {args.tokenizer_type}: {tokenizer.path} is not a {TYPES[args.tokenizer_type]} file"
        )
    paths = files([args.input], "--input")
    for key in args.json_keys:
        path = Path(f"{args.output_prefix}_{key}_document")
        with progress(key) as advance:
            texts = Texts(paths, args.json_keys, key, Log(args.log_interval, advance))
            tokens = write(path, texts, tokenizer, args.append_eod)
        console.print(f"{store_file(path, 'bin')}: {texts.log.documents:,} documents, {tokens:,} tokens")
        if texts.log.empty:
            console.note("left out", f": {texts.log.empty:,} without text")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--input", required=True, help="a file of JSON lines, or a glob in quotes")
    made.add_argument("--json-keys", nargs="+", default=["text"], help="keys to read from each line; one store each")
    made.add_argument("--tokenizer-type", required=True, metavar="TYPE", help=" or ".join(TYPES))
    made.add_argument("--tokenizer-model", required=True, help="its .model or tokenizer.json")
    made.add_argument("--append-eod", action="store_true", help="end documents with <|end_of_text|>")
    made.add_argument("--output-prefix", required=True, help="path of the stores, without _KEY_document")
    made.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="threads that tokenize")
    made.add_argument("--log-interval", type=int, default=100_000, help="documents between progress lines")
    return made


class Log:
    """Counts documents and reports progress."""

    def __init__(self, every: int, advance: Callable[[int], None]) -> None:
        self.documents, self.empty = 0, 0
        self._every, self._advance = every, advance
        self._letters, self._began = 0, time.monotonic()

    def add(self, lengths: list[int], letters: int) -> None:
        before = self.documents
        self.documents += len(lengths) - lengths.count(0)
        self.empty += lengths.count(0)
        self._letters += letters
        self._advance(len(lengths))
        if self._every > 0 and before // self._every != self.documents // self._every:
            seconds = time.monotonic() - self._began
            speeds = f"{self.documents / seconds:,.0f} documents/s, {self._letters / seconds / 1e6:.2f} M letters/s"
            console.print(f"processed {self.documents:,} documents ({speeds})")


@dataclass(frozen=True)
class Texts:
    """The texts under `key` in all lines, in batches. Raises SodaError for a line without a text under each of `keys`,
    so that no store is started if another would fail."""

    paths: list[Path]
    keys: list[str]
    key: str
    log: Log

    def __iter__(self) -> Iterator[list[str]]:
        batch, letters = [], 0
        for path in self.paths:
            for number, line in lines(path):
                if isinstance(line, str) and not line.strip():
                    continue
                batch.append(self._text(f"{path}:{number}", line))
                letters += len(batch[-1])
                if len(batch) >= TEXTS or letters >= LETTERS:
                    yield batch
                    batch, letters = [], 0
        if batch:
            yield batch

    def _text(self, where: str, line: str | BadLine) -> str:
        try:
            if isinstance(line, BadLine):
                raise line
            row = parse_json(line)
            for key in self.keys:
                if not isinstance(row.get(key), str):
                    has = f"is a {type(row[key]).__name__}" if key in row else f"is missing; it has {', '.join(row)}"
                    raise BadLine(f"needs a string {key!r}, which {has}")
            str(row[self.key]).encode()
        except UnicodeEncodeError:  # half a character, from JSON's \ud800
            raise self._bad(where, f"not valid Unicode: {self.key}") from None
        except BadLine as error:
            raise self._bad(where, str(error)) from None
        return str(row[self.key])

    def _bad(self, where: str, why: str) -> SodaError:
        return SodaError(f"{where}: {why}. Nothing was written; fix the line or remove it.")


def write(path: Path, texts: Texts, tokenizer: TextTokenizer, append_eod: bool) -> int:
    """Writes the store `path` (no suffix). Returns its number of tokens."""
    space = tokenizer.space(8, 2048)  # as in soda prepare for text only: followed by Mimi's ids
    end = [tokenizer.eos] if append_eod else []

    def parts() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for batch in texts:
            ids = tokenizer.encode_batch([clean_text(text, space) for text in batch])
            documents = [[*one, *end] for one in ids if one]
            texts.log.add([len(one) for one in ids], sum(map(len, batch)))
            if documents:
                flat = np.concatenate([np.array(one, np.int32) for one in documents])
                yield flat, np.array([len(one) for one in documents], np.int32)

    tokens = write_parts(path, parts(), space, tokenizer=tokenizer.fingerprint)
    if not tokens:
        for suffix in ("bin", "idx", "json"):
            store_file(path, suffix).unlink(missing_ok=True)
        raise SodaError(f"{', '.join(map(str, texts.paths))}: no text under {texts.key!r}. Nothing was written.")
    return tokens


if __name__ == "__main__":
    run(main)
