"""Measures token stores: how they come to training, against megatron-core's GPTDataset, and how fast they are checked.
Run by hand.

  first-batch   after imports, from opening the store to the first batch of 8 windows of 4,096: seconds, and the growth
                of the process's own memory. Documents of 100 tokens in files that are holes but for their index;
                GPTDataset with a cold cache. Each in a process of its own.
  loading       batches of 8 such windows by one core, tokens a second; GPTDataset with a warm cache and torch's
                default_collate. Documents of about 100 tokens, text and frames. Our batches keep documents apart;
                `gptdataset` does not, `gptdataset apart` does (reset_position_ids, reset_attention_mask).
  validate      soda validate of such stores, tokens a second, one core.

    python tools/bench/bench_stores.py
    python tools/bench/bench_stores.py --documents 1000000 --only loading
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.data import compact, indexed
from megatron_soda.data.batch import Batcher
from megatron_soda.data.store import Store, write_parts
from megatron_soda.data.validate import validate
from megatron_soda.data.windows import Windows
from megatron_soda.errors import run_tool
from megatron_soda.files import write_sealed
from megatron_soda.vocab import LLAMA3

LENGTH, SEQUENCES, DOCUMENT = 4096, 8, 100
APART: dict[str, Any] = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "create_attention_mask"), True)
STOCK: dict[str, Any] = dict.fromkeys([*APART, "eod_mask_loss"], False)
SIDES = ("compact", "megatron", "gptdataset")

console = Console()


# ---- stores


def sparse_stores(folder: Path, documents: int) -> None:
    """`megatron` and `compact`: an index as it would be, and no tokens but holes. Half of a document is frames."""
    tokens, frames = documents * DOCUMENT, DOCUMENT // 16
    text = DOCUMENT - 8 * frames
    write_parts(folder / "x", [(np.zeros(1, np.int32), np.ones(1, np.int64))], LLAMA3)
    meta = json.loads((folder / "x.json").read_text())
    steps = np.arange(documents + 1, dtype=np.int64)
    with open(folder / "megatron.idx", "wb") as file:
        file.write(indexed.HEADER.pack(indexed.MAGIC, 1, indexed.INT32, documents, documents + 1))
        file.write(np.full(documents, DOCUMENT, np.int32).data)
        file.write((4 * DOCUMENT * steps[:-1]).data)
        file.write(steps.data)
    width, bits = compact.text_bits(LLAMA3), compact.frame_bits(LLAMA3)
    with open(folder / "compact.spans", "wb") as file:
        sizes = tokens, documents, documents, frames * documents
        file.write(compact.HEADER.pack(compact.MAGIC, 1, 8, bits, width, *sizes))
        starts = DOCUMENT * steps + text
        starts[-1] = tokens
        for table in (starts, frames * steps, DOCUMENT * steps):
            file.write(table.data)
    holes = {"megatron.bin": 4 * tokens, "compact.frames": bits * frames * documents}
    holes["compact.text"] = compact.text_bytes(LLAMA3, text * documents)
    for name, size in holes.items():
        with open(folder / name, "wb") as file:
            file.truncate(size)
    for name in ("megatron", "compact"):
        write_sealed(folder / f"{name}.json", {**meta, "format": name})


def real_stores(folder: Path, documents: int) -> None:
    """The same documents in both formats: text, then frames, as SODA's."""
    rng = np.random.default_rng(0)

    def parts() -> Any:
        for _ in range(0, documents, 10_000):
            made = []
            for _ in range(10_000):
                codes = rng.integers(0, LLAMA3.entries, (int(rng.integers(2, 10)), 8))
                words = rng.integers(0, 128_000, int(rng.integers(10, 80)))
                head = [LLAMA3.bos, LLAMA3.text_start, *words, LLAMA3.text_end, LLAMA3.audio_start]
                made.append(np.concatenate([head, LLAMA3.audio_ids(codes), [LLAMA3.audio_end, LLAMA3.eos]]))
            yield np.concatenate(made).astype(np.int32), np.array([len(d) for d in made])

    for name in ("megatron", "compact"):
        rng = np.random.default_rng(0)
        write_parts(folder / name, parts(), LLAMA3, name)


# ---- sides


def gpt_dataset(store: Path, cache: Path, **options: Any) -> Any:
    """As stock pretrain_gpt.py makes it."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.tokenizers import MegatronTokenizer

    tokenizers: Any = MegatronTokenizer
    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=LENGTH,
        blend_per_split=[([str(store)], None), None, None],
        path_to_cache=str(cache),
        tokenizer=tokenizers.from_pretrained(metadata_path={"library": "null"}, vocab_size=LLAMA3.size),
        **{**STOCK, **options},
    )
    sizes: Any = [None, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def first_batch(side: str, folder: Path) -> dict[str, float]:
    """In a process of its own."""
    import megatron.core.datasets.blended_megatron_dataset_builder
    import megatron.core.datasets.gpt_dataset
    import megatron.core.tokenizers  # noqa: F401

    torch.set_num_threads(1)
    process = psutil.Process()
    before, began = _own_memory(process), time.perf_counter()
    if side == "gptdataset":
        with tempfile.TemporaryDirectory(dir=folder) as cache:
            dataset = gpt_dataset(folder / "megatron", Path(cache))
            kept: Any = torch.utils.data.default_collate([dataset[i] for i in range(SEQUENCES)])
            taken = time.perf_counter() - began
    else:
        windows, batcher = Windows(Store(folder / side), LENGTH, 0), Batcher(LLAMA3)
        kept = batcher([windows[i] for i in range(SEQUENCES)])
        taken = time.perf_counter() - began
    grown = _own_memory(process) - before
    assert kept
    return {"seconds": taken, "megabytes": grown / 1e6}


def _own_memory(process: psutil.Process) -> int:
    """Resident memory that is not a page of a file."""
    memory: Any = process.memory_info()
    return memory.rss - memory.shared


def loading(folder: Path, batches: int, repeats: int) -> dict[str, float]:
    """Tokens a second of each side: the best of some repeats, in turns."""
    torch.set_num_threads(1)
    cache = folder / "cache"
    gpt_dataset(folder / "megatron", cache)
    stock = {"gptdataset": gpt_dataset(folder / "megatron", cache)}
    stock["gptdataset apart"] = gpt_dataset(folder / "megatron", cache, **APART)
    batcher = Batcher(LLAMA3)
    ours = {name: Windows(Store(folder / name), LENGTH, 0) for name in ("megatron", "compact")}

    def take(side: str, first: int) -> None:
        samples = range(first * SEQUENCES, (first + 1) * SEQUENCES)
        if side in stock:
            torch.utils.data.default_collate([stock[side][i % len(stock[side])] for i in samples])
        else:
            batcher([ours[side][i] for i in samples])

    best: dict[str, float] = dict.fromkeys((*SIDES, "gptdataset apart"), 0.0)
    for repeat in range(repeats + 1):
        for side in best:
            count = 2 if side == "gptdataset apart" else batches  # it makes masks of 4,096 x 4,096
            began = time.perf_counter()
            for number in range(count):
                take(side, number)
            if repeat:  # the first reads the files into memory
                best[side] = max(best[side], count * SEQUENCES * LENGTH / (time.perf_counter() - began))
    return best


def checking(folder: Path, repeats: int) -> dict[str, float]:
    """Tokens a second of `soda validate`."""
    torch.set_num_threads(1)
    found = {}
    for name in ("megatron", "compact"):
        best = float("inf")
        for _ in range(repeats):
            began = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()) as said:
                assert validate(folder, [name]), said.getvalue()
            best = min(best, time.perf_counter() - began)
        found[name] = Store(folder / name).size / best
    return found


def main(
    documents: Annotated[int, typer.Option(min=1000, help="of 100 tokens, in the sparse stores")] = 10_000_000,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    only: Annotated[str, typer.Option(help="first-batch | loading | validate")] = "",
    child: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Prints tables and one JSON line."""
    if child:
        side, folder = child.split(":", 1)
        print(json.dumps(first_batch(side, Path(folder))))
        return
    result: dict[str, Any] = {}
    if only in ("", "first-batch"):
        result["first_batch"] = {}
        table = Table("first batch: documents", "side", "s", "x faster", "MB of memory")
        for count in sorted({documents, documents // 10, documents // 100}):
            with tempfile.TemporaryDirectory() as made:
                sparse_stores(Path(made), count)
                taken: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
                for _ in range(min(repeats, 3)):
                    for side in SIDES:
                        command = [sys.executable, __file__, "--child", f"{side}:{made}"]
                        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                        taken[side].append(json.loads(out.splitlines()[-1]))
            best = {side: min(some, key=lambda s: s["seconds"]) for side, some in taken.items()}
            for side, one in best.items():
                one["times_faster"] = best["gptdataset"]["seconds"] / one["seconds"]
                cells = f"{one['seconds']:.4f}", f"{one['times_faster']:.0f}", f"{one['megabytes']:.1f}"
                table.add_row(f"{count:,}", side, *cells)
            result["first_batch"][count] = best
        console.print(table)
    if only in ("", "loading"):
        with tempfile.TemporaryDirectory() as made:
            real_stores(Path(made), 200_000)
            rates = loading(Path(made), 40, repeats)
        table = Table("loading", "M tokens/s", "x GPTDataset")
        for side, rate in rates.items():
            table.add_row(side, f"{rate / 1e6:.2f}", f"{rate / rates['gptdataset']:.1f}")
        console.print(table)
        result["loading"] = rates
    if only in ("", "validate"):
        with tempfile.TemporaryDirectory() as made:
            real_stores(Path(made), 200_000)
            result["validate"] = checking(Path(made), repeats)
        for name, rate in result["validate"].items():
            console.print(f"soda validate, {name}: {rate / 1e6:.1f} M tokens/s")
    print(json.dumps(result))


if __name__ == "__main__":
    run_tool(main)
