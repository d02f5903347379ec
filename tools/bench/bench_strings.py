"""Measures `data_prep.strings.to_ids` against the exported Hugging Face tokenizer on the same strings. Run by hand.

Documents are as SODA's corpora have them: one utterance of 10 s (125 frames of 8 codes), with 25 words of text or
without any. Of every spoken text both orders are there, and ours tokenises it once for both. One core, in turns. All
give the same ids, which is checked. Hugging Face's is measured by the batch call that transformers makes, which is
the authors' way, and by its faster one, which finds no offsets.

    python tools/bench/bench_strings.py
    python tools/bench/bench_strings.py --tokenizer soda-tokenizer --documents 2000
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

os.environ["RAYON_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries make their threads

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep.strings import to_ids
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.hf.tokenizer import build_tokenizer
from megatron_soda.tokenizer import TextTokenizer, clean_text, train_sentencepiece
from megatron_soda.vocab import BOS, EOS, MARKERS, TokenSpace

FRAMES, WORDS, CODEBOOKS, ENTRIES = 125, 25, 8, 2048
TS, TE, AS, AE = MARKERS
console = Console()


def words() -> list[str]:
    """Words as they come in English, from the pages of this project."""
    root = Path(__file__).resolve().parents[2]
    pages = [root / "LICENSE", *sorted(root.glob("*.md")), *sorted(root.glob("docs/*.md"))]
    return " ".join(page.read_text(encoding="utf-8") for page in pages).split()


def documents(count: int, space: TokenSpace) -> tuple[dict[str, list[str]], list[str]]:
    """Strings by kind of document, and the texts of the mixed ones."""
    rng, known = np.random.default_rng(0), words()
    starts = rng.integers(0, len(known) - WORDS, count)
    texts = [clean_text(" ".join(known[i : i + WORDS]), space) for i in starts]  # these pages spell markers
    first = 0xE000 + ENTRIES * np.arange(CODEBOOKS)
    codes = first + rng.integers(0, ENTRIES, (count, FRAMES, CODEBOOKS))
    sounds = [AS + one.astype("<u4").tobytes().decode("utf-32-le") + AE for one in codes]
    spoken = [TS + text + TE for text in texts]
    pairs = [pair for s, t in zip(sounds, spoken, strict=True) for pair in (t + s, s + t)]
    kinds = {"audio-only": sounds, "mixed": pairs}
    return {kind: [BOS + one + EOS for one in some] for kind, some in kinds.items()}, texts


def seconds(run: Callable[[], Any]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measure(kind: str, strings: Sequence[str], text: TextTokenizer, space: TokenSpace, hf: Any, repeats: int) -> dict:
    """Tokens a second of both, median over turns; theirs on a tenth of the documents, which is enough."""
    tenth = strings[: max(2, len(strings) // 10)]
    ours = to_ids(strings, space, text)
    theirs = [found.ids for found in hf.encode_batch(tenth, add_special_tokens=False)]
    if [ids if isinstance(ids, str) else ids.tolist() for ids in ours[: len(tenth)]] != theirs:
        raise SodaError(f"{kind}: ours and Hugging Face's ids differ")
    tokens, fewer = sum(map(len, ours)), sum(map(len, theirs))
    runs: dict[str, tuple[int, Callable[[], Any]]] = {
        "ours": (tokens, lambda: to_ids(strings, space, text)),
        "hf": (fewer, lambda: hf.encode_batch(tenth, add_special_tokens=False)),
        "hf_fast": (fewer, lambda: hf.encode_batch_fast(tenth, add_special_tokens=False)),
    }
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (count, run) in runs.items():
            rates[name].append(count / seconds(run))
    row = {name: statistics.median(found) for name, found in rates.items()}
    ratio = {
        f"times_{name}": statistics.median(a / b for a, b in zip(rates["ours"], rates[name], strict=True))
        for name in ("hf", "hf_fast")
    }
    return {"tokens": tokens, **row, **ratio}


def main(
    tokenizer: Annotated[str, typer.Option(help="what prepare.tokenizer may be; else one is trained")] = "",
    pieces: Annotated[int, typer.Option(help="of the one that is trained")] = 4000,
    count: Annotated[int, typer.Option("--documents", min=10, help="utterances")] = 1000,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
) -> None:
    """Prints a table and one JSON line."""
    with TemporaryDirectory() as folder:
        path = Path(tokenizer or Path(folder) / "text.model")
        if not tokenizer:
            known = words()
            train_sentencepiece(path, (" ".join(known[i : i + WORDS]) for i in range(0, len(known), WORDS)), pieces)
        text = TextTokenizer(path)
        space = text.space(CODEBOOKS, ENTRIES)
        hf = build_tokenizer(text, space)
    kinds, texts = documents(count, space)
    rows = {kind: measure(kind, strings, text, space, hf, repeats) for kind, strings in kinds.items()}
    # The texts have to be tokenised, once; were all else free, this is how fast it would be.
    text_tokens = sum(map(len, text.encode_batch(texts)))
    text_seconds = statistics.median(seconds(lambda: text.encode_batch(texts)) for _ in range(repeats))
    mixed = rows["mixed"]
    share = 2 * text_tokens / mixed["tokens"]
    ceiling = mixed["tokens"] / text_seconds
    table = Table("documents", "ours, M tokens/s", "HF", "HF without offsets", "ours / HF", "ours / HF without offsets")
    for kind, row in rows.items():
        rates = [f"{row[name] / 1e6:.2f}" for name in ("ours", "hf", "hf_fast")]
        table.add_row(kind, *rates, f"{row['times_hf']:.1f}", f"{row['times_hf_fast']:.1f}")
    limits = [f"{ceiling / mixed[name]:.1f}" for name in ("hf", "hf_fast")]
    table.add_row("mixed, ceiling", f"{ceiling / 1e6:.2f}", "", "", *limits)
    console.print(table)
    console.print(
        f"text is {share:.1%} of the mixed documents' tokens; tokenising it once for both orders, at "
        f"{text_tokens / text_seconds / 1e6:.2f} M tokens/s, takes "
        f"{text_seconds * mixed['ours'] / mixed['tokens']:.0%} of our time"
    )
    facts = {"utterances": count, "frames": FRAMES, "words": WORDS, "text_size": space.text_size, "repeats": repeats}
    text_facts = {"text_share": share, "text_tokens_per_second": text_tokens / text_seconds, "ceiling": ceiling}
    print(json.dumps({**facts, "rows": rows, **text_facts, "times_ceiling": ceiling / mixed["hf"]}))


if __name__ == "__main__":
    run_tool(main)
