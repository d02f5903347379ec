"""Measures a whole training step against megatron-core and transformers: forward, backward, clip, AdamW. Run by hand.

- ours: the Engine of `soda train` on one process
- megatron-core: GPTModel with its own layers (attention included), its loss, its DDP and optimizer
- transformers: Qwen3ForCausalLM (sdpa) with its loss, and torch's fused AdamW
- KEY=VALUE: ours with one more setting

All have the same shapes, the full vocabulary (144,644 ids) and the same random tokens. Half precision keeps float32
weights everywhere: megatron-core's copies, torch.autocast for transformers, which has no FP8 and runs in BF16 then.
A window is one document unless --documents says more: megatron-core's layers and transformers know no documents.

Each side is a process of its own. They take turns step by step (--together), or, where memory is short, run after run
(--apart, --rounds); --one-process then saves the start of ours after the first, but on a CPU its memory is the most of
all before. Ratios are medians over pairs of steps. Memory is the most of the whole process (CPU), or the most
allocated (CUDA). On a CPU megatron-core runs through parallel/cpu.py as ours does, and so has its memory allocator's
settings; transformers runs as it comes, or with these too (--same-malloc).

    python tools/bench/bench_train.py
    python tools/bench/bench_train.py --preset 4b --layers 18 --sequence-length 4096 --precision fp8 --steps 20
"""

import gc
import os
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_sides import FORWARD_BACKWARD, HEAD_ROWS, OPTIMIZER, SIDES, Result, ours

from megatron_soda.config import choice, load_recipe
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.files import to_json
from megatron_soda.model.size import parameter_count, train_flops
from megatron_soda.training.metrics import memory_gib, mfu, peak_tflops
from megatron_soda.vocab import LLAMA3

console = Console()


_step: Callable[[int], Result] | None = None


def start(side: str, settings: list[str], documents: int, same_malloc: bool, threads: int) -> None:
    """In the process of a side: its model, in place of the one before."""
    global _step
    _step = None
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    torch.set_num_threads(threads)
    recipe = load_recipe(None, [*settings, side] if "=" in side else settings)
    _step = SIDES.get(side, ours)(recipe, documents, same_malloc)
    torch.set_num_threads(threads)  # ranks.init takes all cores
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def take_step(number: int) -> Result:
    """In the process of a side: one step."""
    assert _step is not None
    result = _step(number)
    return {**result, "step": result[FORWARD_BACKWARD] + result[OPTIMIZER], "gib": memory_gib()}


class Side:
    """A process with the model of one side, until it is closed or its memory runs out. `after`: a side whose process it
    takes over."""

    def __init__(self, name: str, *how: Any, after: "Side | None" = None) -> None:
        self.name = name
        self.pool = after.pool if after else ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.problem = self._run(start, name, *how)

    def step(self, number: int) -> Result | None:
        return None if self.problem else self._run(take_step, number)

    def close(self) -> None:
        self.pool.shutdown()

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result; None, and a problem, if it failed."""
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.problem = "killed (out of memory?)"
        except torch.OutOfMemoryError:
            self.problem = "out of memory"
        except Exception as error:  # the other sides are measured all the same
            self.problem = f"{type(error).__name__}: {error}"
        return self.problem if function is start else None


def measure(
    sides: list[str], how: tuple[Any, ...], steps: int, warmup: int, rounds: int, together: bool, one_process: bool
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """The steps of each side after its first `warmup` ones, and what stopped a side."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    problems: dict[str, str] = {}
    last: Side | None = None  # whose process goes on
    for names in [sides] if together else [[side] for _ in range(rounds) for side in sides]:
        group = [Side(name, *how, after=last) for name in names if name not in problems]
        for number in range(warmup + steps):
            for side in group:
                with console.status(f"{side.name}: step {number + 1} of {warmup + steps}"):
                    result = side.step(number)
                if result is not None and number >= warmup:
                    results[side.name].append(result)
        for side in group:
            if side.problem:
                problems[side.name] = side.problem
            last = side if one_process and not side.problem else None
            if last is None:
                side.close()
    if last:
        last.close()
    return results, problems


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of the recipe")] = None,
    preset: Annotated[str, typer.Option(help="model.preset")] = "135m",
    layers: Annotated[int, typer.Option(help="cut the model to so many; 0: all")] = 0,
    sequence_length: Annotated[int, typer.Option(min=1)] = 1024,
    micro_batch: Annotated[int, typer.Option(min=1, help="sequences of a forward pass")] = 1,
    micro_batches: Annotated[int, typer.Option(min=1, help="of a step")] = 1,
    documents: Annotated[int, typer.Option(min=1, help="of a window")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="timed, of each side (and round)")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="steps before these")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="of a CPU")] = 1,
    device: Annotated[str, typer.Option(help="auto | cpu")] = "auto",
    precision: Annotated[str, typer.Option(help="fp32 | bf16 | fp8")] = "fp32",
    fp8_recipe: Annotated[str, typer.Option(help="delayed | tensorwise | blockwise")] = "tensorwise",
    sides: Annotated[str, typer.Option(help="which, separated by commas; KEY=VALUE: ours with it")] = ",".join(SIDES),
    together: Annotated[
        bool | None, typer.Option("--together/--apart", help="all alive at once, or one at a time (default on CUDA)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="with --apart: how often each is started")] = 2,
    one_process: Annotated[
        bool, typer.Option("--one-process", help="with --apart: ours and ours with a setting in one process")
    ] = False,
    same_malloc: Annotated[
        bool, typer.Option("--same-malloc", help="transformers keeps freed memory as we do")
    ] = False,
) -> None:
    """Prints a table and one JSON line: seconds and memory of a step, ours, megatron-core's and transformers'.

    python tools/bench/bench_train.py --threads 2 --steps 8
    """
    choice("--device", device, ("auto", "cpu"))
    names = sides.split(",")
    for name in names:
        if "=" not in name:
            choice("--sides", name, tuple(SIDES))
        if one_process and "=" not in name and name != "ours":
            raise SodaError(f"--one-process: {name} needs a process of its own")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cuda = torch.cuda.is_available()
    if together is None:
        together = not cuda and not one_process
    if together and one_process:
        raise SodaError("--together gives each side a process of its own: leave it or --one-process out")
    overrides = [
        f"model.preset={preset}",
        *([f"model.num_layers={layers}"] if layers else []),
        f"data.sequence_length={sequence_length}",
        f"training.micro_batch_size={micro_batch}",
        f"training.global_batch_size={micro_batch * micro_batches}",
        f"precision.dtype={precision}",
        f"precision.fp8_recipe={fp8_recipe}",
        "optimizer.epsilon=1e-8",
        *(settings or []),
    ]
    recipe = load_recipe(None, overrides)
    tokens = recipe.training.global_batch_size * recipe.data.sequence_length
    where = torch.cuda.get_device_name() if cuda else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    peak = peak_tflops(recipe, where)
    results, problems = measure(
        names, (overrides, documents, same_malloc, threads), steps, warmup, rounds, together, one_process
    )

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        found = results[name]
        if not found:
            rows[name] = {"problem": problems[name]}
            continue
        middle = {key: statistics.median(r[key] for r in found) for key in (FORWARD_BACKWARD, OPTIMIZER, "step")}
        speed = tokens / middle["step"]
        flops = train_flops(recipe.model, LLAMA3, recipe.data.sequence_length, int(found[-1].get(HEAD_ROWS, 0)))
        share = mfu(flops, speed, 1, peak)
        row = {**middle, "tokens_per_second": speed, "mfu": share, "gib": max(r["gib"] for r in found)}
        rows[name] = {**row, "loss": found[0]["loss"]}
    reference = results[names[0]]
    for name, row in rows.items():
        if "step" in row and reference:
            pairs = zip(reference, results[name], strict=False)
            row["times_slower"] = statistics.median(b["step"] / a["step"] for a, b in pairs)
            row["times_larger"] = row["gib"] / rows[names[0]]["gib"]

    title = f"{preset}, {recipe.model.num_layers} layers, {tokens:,} tokens a step, {precision}, {where}"
    columns = "s/step", "fwd+bwd", "Adam", "tokens/s", "MFU", "GiB", "x time", "x memory"
    table = Table("side", *columns, title=title)
    for name, row in rows.items():
        if "problem" in row:
            table.add_row(name, row["problem"])
            continue
        seconds = (f"{row[key]:.3f}" for key in ("step", FORWARD_BACKWARD, OPTIMIZER))
        share = "–" if row["mfu"] is None else f"{100 * row['mfu']:.1f} %"
        ratios = (f"{row[key]:.2f}" if key in row else "–" for key in ("times_slower", "times_larger"))
        table.add_row(name, *seconds, f"{row['tokens_per_second']:,.0f}", share, f"{row['gib']:.2f}", *ratios)
    console.print(table)
    facts = {"preset": preset, "layers": recipe.model.num_layers, "parameters": parameter_count(recipe.model, LLAMA3)}
    how = {"tokens": tokens, "sequence_length": recipe.data.sequence_length, "documents": documents, "device": where}
    how |= {"precision": precision, "fp8_recipe": fp8_recipe if precision == "fp8" else None, "threads": threads}
    how |= {"steps": steps, "rounds": 1 if together else rounds, "same_malloc": same_malloc, "torch": torch.__version__}
    print(to_json({**facts, **how, "rows": rows}))


if __name__ == "__main__":
    run_tool(main)
