"""Measures the way from codes to token stores against the authors' way: strings through a fast tokenizer. Run by hand.

Three rows, one core, the two sides in turns:

  audio      documents of audio alone to ids; theirs: the same documents as strings through the Hugging Face tokenizer
  mixed      both orders of every utterance to ids, each text tokenised once; theirs: the strings of both
  store      unit shards (Parquet) to .bin/.idx; theirs: the strings (Parquet) through the tokenizer into
             megatron-core's IndexedDatasetBuilder

The tokenizer is a byte-level BPE trained here on the words of this project's own documents, or --tokenizer FILE. All
text passes a real tokenizer on either side, so the share of text sets a ceiling, which is printed.

    python tools/bench/bench_data.py
    python tools/bench/bench_data.py --tokenizer llama3/tokenizer.json --utterances 4000
"""

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

os.environ["RAYON_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data_prep import documents
from megatron_soda.codecs.description import CodecDescription
from megatron_soda.data.store import Store, write_parts
from megatron_soda.data.units import read_shard, write_units
from megatron_soda.errors import run_tool
from megatron_soda.hf.tokenizer import build_tokenizer
from megatron_soda.tokenizer import TextTokenizer, document_string
from megatron_soda.vocab import BOS, EOS, TokenSpace

console = Console()
ROOT = Path(__file__).resolve().parents[2]
CODEC = CodecDescription("random", "random", 8, 2048, 24_000, 1_920, {})
SECONDS, WORDS_A_SECOND, SHARD = 10.0, 2.5, 256


def words() -> list[str]:
    pages = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]
    text = " ".join(page.read_text(encoding="utf-8") for page in pages)
    return [word for word in text.split() if word.isascii()]


def train_bpe(path: Path, size: int) -> Path:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([" ".join(words())], trainer)
    tokenizer.save(str(path))
    return path


def make_units(folder: Path, utterances: int) -> list[Path]:
    rng, vocabulary = np.random.default_rng(0), words()
    paths = []
    for first in range(0, utterances, SHARD):
        rows = []
        for i in range(first, min(first + SHARD, utterances)):
            seconds = float(rng.uniform(0.2, 1.8) * SECONDS)
            text = " ".join(rng.choice(vocabulary, max(1, round(seconds * WORDS_A_SECOND))))
            codes = rng.integers(0, 2048, (round(seconds * 12.5), 8))
            rows.append({"id": f"u{i}", "codes": codes, "text": text, "language": "en", "speaker": "s", "prompt": "",
                         "recording": "", "seconds": seconds, "audio": ""})  # fmt: skip
        paths.append(folder / f"part-{len(paths):05d}.parquet")
        write_units(paths[-1], rows, codec=CODEC, key=str(first))
    return paths


def run(jobs: list[documents.PartJob]) -> int:
    return sum(sum(documents.make_part(job).tokens.values()) for job in jobs)


def in_turns(sides: dict[str, Callable[[], int]], repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Tokens a second of each, round by round, and the tokens."""
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    tokens = {name: side() for name, side in sides.items()}  # warms up
    for _ in range(repeats):
        for name, side in sides.items():
            began = time.perf_counter()
            count = side()
            speeds[name].append(count / (time.perf_counter() - began))
    return speeds, tokens


def main(
    utterances: Annotated[int, typer.Option(min=1)] = 1536,
    tokenizer: Annotated[str, typer.Option(help="a tokenizer.json; empty: train a BPE")] = "",
    pieces: Annotated[int, typer.Option(help="of the BPE that is trained")] = 8000,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Prints a table and one JSON line."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = TextTokenizer(tokenizer or train_bpe(folder / "tokenizer.json", pieces))
        space = text.space(8, 2048)
        fast = build_tokenizer(text, space)
        units = make_units(folder, utterances)
        result = {
            name: measure(folder, name, units, text, space, fast, repeats) for name in ("audio", "mixed", "store")
        }
        speed = text_speed(units, text, repeats)
    table = Table("codes to ids, one core", "ours, M tokens/s", "theirs, M tokens/s", "ratio", "bar")
    for name, bar in (("audio", 50), ("mixed", 20), ("store", 10)):
        row = result[name]
        table.add_row(name, f"{row['ours'] / 1e6:.1f}", f"{row['theirs'] / 1e6:.2f}", f"{row['ratio']:.1f}", str(bar))
    console.print(table)
    share, theirs = result["mixed"]["text_share"], result["mixed"]["theirs"]
    ceiling = speed / (share / 2)
    console.print(
        f"text: {share:.1%} of the tokens of both orders, so {share / 2:.1%} pass the tokenizer, {speed / 1e6:.2f} M a "
        f"second: nobody is faster than {ceiling / 1e6:.0f} M tokens/s, {ceiling / theirs:.0f} x theirs"
    )
    how = {"utterances": utterances, "pieces": text.size, "repeats": repeats}
    print(json.dumps({**how, "text_tokens_a_second": speed, "ceiling": ceiling, **result}))


def measure(
    folder: Path, name: str, units: list[Path], text: TextTokenizer, space: TokenSpace, fast: Any, repeats: int
) -> dict[str, Any]:
    orders = ["audio-only"] if name == "audio" else ["text-first", "audio-first"]
    common = documents.PartSettings(text.path, "", space, tuple(orders), (0.0, 0.0), seed=0, corpus_codebooks=8)
    trains = ["0" * pq.read_metadata(path).num_rows for path in units]
    jobs = documents.unit_jobs(units, [str(i) for i in range(len(units))], trains, folder / name, common)
    run(jobs)
    parts = [documents.read_part(job.out, "train") for job in jobs]
    made = [ids for ids, lengths in parts for ids in np.split(ids, np.cumsum(lengths)[:-1])]
    strings = [document_string(ids, space, text) for ids in made]
    of_text = sum(int((ids < space.text_size).sum()) - 2 for ids in made)
    share = of_text / sum(map(len, made))
    pq.write_table(pa.table({"text": strings}), folder / f"{name}.parquet")
    ours, theirs = folder / f"{name}-ours", folder / f"{name}-theirs"
    in_memory = [(*read_shard(path), some) for path, some in zip(units, trains, strict=True)] if name != "store" else []

    def our_ids() -> int:
        made = (item for shard in in_memory for item in documents.of_units(*shard, orders, text, space, {}))
        return sum(len(item[1]) for item in made if isinstance(item, tuple))

    def their_ids() -> int:
        return sum(len(e.ids) for e in encode(fast, strings))

    def our_store() -> int:
        run(jobs)
        return write_parts(ours, (documents.read_part(job.out, "train") for job in jobs), space)

    def their_store() -> int:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        builder, count = IndexedDatasetBuilder(f"{theirs}.bin", dtype=np.int32), 0
        for batch in pq.ParquetFile(folder / f"{name}.parquet").iter_batches(256):
            for encoding in encode(fast, batch.column(0).to_pylist()):
                builder.add_document(torch.tensor(encoding.ids, dtype=torch.int32), [len(encoding.ids)])
                count += len(encoding.ids)
        builder.finalize(f"{theirs}.idx")
        return count

    sides = {"ours": our_store, "theirs": their_store} if name == "store" else {"ours": our_ids, "theirs": their_ids}
    speeds, tokens = in_turns(sides, repeats)
    if tokens["ours"] != tokens["theirs"]:
        raise SystemExit(f"{name}: {tokens} tokens: the two ways do not make the same documents")
    if name == "store":
        same = Store(ours).read(0, tokens["ours"]) == np.fromfile(f"{theirs}.bin", np.int32)
        if not same.all():
            raise SystemExit("the two stores differ")
    ratio = statistics.median(a / b for a, b in zip(speeds["ours"], speeds["theirs"], strict=True))
    best = {side: statistics.median(some) for side, some in speeds.items()}
    return {**best, "ratio": ratio, "tokens": tokens["ours"], "text_share": share}


def encode(fast: Any, strings: Iterable[str]) -> list[Any]:
    return fast.encode_batch(list(strings), add_special_tokens=False)


def text_speed(units: list[Path], text: TextTokenizer, repeats: int) -> float:
    texts = [t for path in units for t in pq.read_table(path, columns=["text"]).column(0).to_pylist()]
    speeds, _ = in_turns({"text": lambda: sum(map(len, text.encode_batch(texts)))}, repeats)
    return statistics.median(speeds["text"])


if __name__ == "__main__":
    run_tool(main)
