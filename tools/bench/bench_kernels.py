"""Measures the kernels of csrc/ against torch and numpy, and against copies of what they write. Run by hand.

A section is a function that returns its rows; each measures on one thread and takes the best of some repeats, the two
sides in turns. Where there is a CUDA device with the kernels built for it, they are measured there, too.

    python tools/bench/bench_kernels.py
    python tools/bench/bench_kernels.py --only unpack --only batch --scale 0.1
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda import ops
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.ops import library, reference
from megatron_soda.vocab import LLAMA3, Grammar

SLOTS, BITS = LLAMA3.codebooks, 11
STREAM: dict[str, Any] = {
    "slots": SLOTS,
    "bits": BITS,
    "text_bits": 17,
    "audio_base": LLAMA3.audio_base,
    "entries": LLAMA3.entries,
}


@dataclass
class Row:
    """One line of the table: how fast (`rate` in `unit`), and how many times faster than something else."""

    section: str
    what: str
    rate: float
    unit: str
    against: str = ""
    ratio: float | None = None
    bar: float | None = None  # what the ratio should reach


@dataclass
class Settings:
    scale: float  # of the sizes
    repeats: int

    def size(self, full: int) -> int:
        return max(1, int(full * self.scale))


def on_device() -> bool:
    """Whether there is a CUDA device, and kernels for it."""
    return library.has_cuda() and torch.cuda.is_available()


def seconds(settings: Settings, *sides: Callable[[], Any]) -> list[float]:
    """The best time of each side; they take turns, so that they share what else the machine does."""
    best = [float("inf")] * len(sides)
    for repeat in range(settings.repeats + 1):
        for i, side in enumerate(sides):
            began = time.perf_counter()
            side()
            if repeat:  # the first warms up
                best[i] = min(best[i], time.perf_counter() - began)
    return best


def device_seconds(settings: Settings, *sides: Callable[[], Any]) -> list[float]:
    """As `seconds`, by CUDA events."""
    best = [float("inf")] * len(sides)
    for repeat in range(settings.repeats + 1):
        for i, side in enumerate(sides):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            side()
            end.record()
            end.synchronize()
            if repeat:
                best[i] = min(best[i], begin.elapsed_time(end) / 1000)
    return best


def against_copy(settings: Settings, section: str, run: Callable[[], Any], output: tuple[Tensor, ...]) -> list[Row]:
    """On the device: bytes written a second, against a copy of as many."""
    source = [tensor.clone() for tensor in output]
    own, copy = device_seconds(settings, run, lambda: [a.copy_(b) for a, b in zip(output, source, strict=True)])
    written = sum(tensor.nbytes for tensor in output)
    return [Row(section, "CUDA", written / own / 1e9, "GB/s out", "device copy", copy / own, 0.6)]


# ---- sections


def unpack(settings: Settings) -> list[Row]:
    """Packed frames to codes. The reference is what numpy offers for it."""
    packed = torch.randint(256, (settings.size(400_000), SLOTS * BITS // 8), dtype=torch.uint8)
    codes = ops.unpack_frames(packed, SLOTS, BITS)
    powers = (1 << np.arange(BITS)).astype(np.int32)

    def by_numpy() -> np.ndarray:
        bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")
        return bits.reshape(-1, SLOTS, BITS) @ powers

    assert np.array_equal(by_numpy(), codes.numpy())
    there_already = torch.empty_like(codes)
    own, numpy, copy, copy_over = seconds(
        settings,
        lambda: ops.unpack_frames(packed, SLOTS, BITS),
        by_numpy,
        codes.clone,
        lambda: there_already.copy_(codes),
    )
    library.set_simd(False)
    plain, torch_code = seconds(
        settings,
        lambda: ops.unpack_frames(packed, SLOTS, BITS),
        lambda: reference.unpack_frames(packed, SLOTS, BITS),
    )
    library.set_simd(True)
    rate = codes.nbytes / 1e9
    rows = [
        Row("unpack", "simd", rate / own, "GB/s out", "numpy", numpy / own, 20),
        Row("unpack", "simd", rate / own, "GB/s out", "copy into new memory", copy / own, 0.25),
        Row("unpack", "simd", rate / own, "GB/s out", "copy over old memory", copy_over / own, 0.25),
        Row("unpack", "plain", rate / plain, "GB/s out", "numpy", numpy / plain),
        Row("unpack", "torch code", rate / torch_code, "GB/s out", "numpy", numpy / torch_code),
    ]
    if on_device():
        there = torch.randint(256, (settings.size(20_000_000), SLOTS * BITS // 8), dtype=torch.uint8, device="cuda")
        output = (ops.unpack_frames(there, SLOTS, BITS),)
        rows += against_copy(settings, "unpack", lambda: ops.unpack_frames(there, SLOTS, BITS), output)
    return rows


def random_stream(runs: int) -> tuple[Tensor, ...]:
    """text, frames, starts, firsts: runs of 12 s of Mimi frames with 40 text tokens before each, on average."""
    words, counts = torch.randint(1, 80, (runs,)), torch.randint(50, 250, (runs,))
    both = words + SLOTS * counts
    starts = torch.cat([both.cumsum(0) - SLOTS * counts, both.sum()[None]])
    firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    text = torch.randint(256, (-(-int(words.sum()) // 8), 17), dtype=torch.uint8)
    frames = torch.randint(256, (int(counts.sum()), SLOTS * BITS // 8), dtype=torch.uint8)
    return text, frames, starts, firsts


def expand(settings: Settings) -> list[Row]:
    """Windows of 4,097 tokens of a compact stream, 8 at once."""
    tables = random_stream(settings.size(20_000))
    begins = torch.randint(int(tables[2][-1]) - 4097, (8,))
    own_windows = partial(ops.Stream(*tables, **STREAM).windows, begins, 4097)
    torch_windows = partial(reference.expand_windows, *tables, begins, 4097, **STREAM)
    assert torch.equal(own_windows(), torch_windows())
    own, torch_code = seconds(settings, own_windows, torch_windows)
    rate = 8 * 4097 / 1e6
    return [Row("expand", "CPU", rate / own, "M tokens/s", "torch code", torch_code / own)]


def batch(settings: Settings) -> list[Row]:
    """8 windows of 4,096 tokens into a batch; on a device as many as fill it."""

    def arguments(sequences: int, device: str) -> Any:
        ids = torch.randint(LLAMA3.size, (sequences, 4097), dtype=torch.int32, device=device)
        ids[:, ::1000] = LLAMA3.eos
        weights = torch.ones(len(LLAMA3.class_names), device=device)
        classes = torch.from_numpy(LLAMA3.class_table()).to(device)
        return ids, torch.full((sequences,), 4096, device=device), classes, weights, LLAMA3.eos, False

    few = arguments(8, "cpu")
    own, torch_code = seconds(settings, lambda: ops.build_batch(*few), lambda: reference.build_batch(*few))
    rows = [Row("batch", "CPU", 8 * 4096 / own / 1e6, "M tokens/s", "torch code", torch_code / own)]
    if on_device():
        many = arguments(settings.size(8192), "cuda")
        rows += against_copy(settings, "batch", lambda: ops.build_batch(*many), ops.build_batch(*many))
    return rows


def first_fit(lengths: list[int], capacity: int) -> int:
    """The textbook's loop over the bins: how many it needs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        for b, room in enumerate(rooms):
            if room >= length:
                rooms[b] -= length
                break
        else:
            rooms.append(capacity - length)
    return len(rooms)


def best_fit(settings: Settings) -> list[Row]:
    """Documents into bins of 8,192 tokens. The time of a document must not grow with their number; the loop's does."""
    rows = []
    for n in (2_000, 20_000, 100_000, 1_000_000, 10_000_000):
        n = settings.size(n)
        lengths = torch.randint(1, 6001, (n,))
        (own,) = seconds(Settings(1, min(settings.repeats, 3)), lambda lengths=lengths: ops.best_fit(lengths, 8192))
        row = Row("best_fit", f"{n:,} documents", 1e9 * own / n, "ns a document")
        if n <= 20_000:
            listed = lengths.tolist()
            (loop,) = seconds(Settings(1, 1), lambda listed=listed: first_fit(listed, 8192))
            row.against, row.ratio = f"first-fit loop, {1e9 * loop / n:,.0f} ns", loop / own
        rows.append(row)
    return rows


def documents(count: int) -> tuple[Tensor, Tensor]:
    """ids, offsets: a span of text and one of audio in each."""
    rng = np.random.default_rng(0)
    audio = LLAMA3.audio_ids(rng.integers(0, LLAMA3.entries, (120, LLAMA3.codebooks)))
    words = rng.integers(0, LLAMA3.bos, 40)
    head, middle = [LLAMA3.bos, LLAMA3.text_start], [LLAMA3.text_end, LLAMA3.audio_start]
    one = np.concatenate([head, words, middle, audio, [LLAMA3.audio_end, LLAMA3.eos]]).astype(np.int32)
    return torch.from_numpy(np.tile(one, count)), torch.arange(count + 1) * len(one)


def illegal(settings: Settings) -> list[Row]:
    """Documents against the grammar of the token space."""
    ids, offsets = documents(settings.size(10_000))
    grammar = Grammar(LLAMA3)
    step = np.full((grammar.states, 7 + LLAMA3.codebooks), -1, np.int8)
    for (state, kind), following in grammar.step.items():
        step[state, kind] = following
    tables = torch.from_numpy(LLAMA3.kind_table()), torch.from_numpy(step), Grammar.START, Grammar.END
    assert bool((ops.first_illegal(ids, offsets, *tables) == -1).all())
    own, numpy = seconds(
        settings,
        lambda: ops.first_illegal(ids, offsets, *tables),
        lambda: reference.first_illegal(ids, offsets, *tables),
    )
    return [Row("illegal", "CPU", len(ids) / own / 1e6, "M tokens/s", "numpy", numpy / own)]


def hashes(settings: Settings) -> list[Row]:
    """Content hashes of documents."""
    ids, offsets = documents(settings.size(10_000))
    own, numpy = seconds(
        settings, lambda: ops.hash_documents(ids, offsets), lambda: reference.hash_documents(ids, offsets)
    )
    return [Row("hashes", "CPU", len(ids) / own / 1e6, "M tokens/s", "numpy", numpy / own)]


SECTIONS: dict[str, Callable[[Settings], list[Row]]] = {
    "unpack": unpack,
    "expand": expand,
    "batch": batch,
    "best_fit": best_fit,
    "illegal": illegal,
    "hashes": hashes,
}


def main(
    only: Annotated[list[str] | None, typer.Option(help=" | ".join(SECTIONS))] = None,
    scale: Annotated[float, typer.Option(min=0, help="of the sizes; small is quick and says little")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1)] = 7,
) -> None:
    """Prints a table and one JSON line."""
    for name in only or ():
        if name not in SECTIONS:
            raise SodaError(f"--only {name} is not one of {', '.join(SECTIONS)}")
    if library.why_absent is not None:
        raise SodaError(f"csrc: {library.why_absent}. {library.REBUILD}")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for name in only or SECTIONS for row in SECTIONS[name](Settings(scale, repeats))]
    table = Table("section", "what", "how fast", "against", "times", "bar")
    for row in rows:
        ratio, bar = (f"{value:.2f}" if value is not None else "" for value in (row.ratio, row.bar))
        colour = "" if row.ratio is None or row.bar is None else "green" if row.ratio >= row.bar else "red"
        table.add_row(
            row.section,
            row.what,
            f"{row.rate:,.1f} {row.unit}",
            row.against,
            f"[{colour}]{ratio}[/]" if colour else ratio,
            bar,
        )
    Console().print(table)
    device = torch.cuda.get_device_name() if on_device() else None
    print(json.dumps({"scale": scale, "repeats": repeats, "device": device, "rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    run_tool(main)
