"""Measures the CPU time of each tensor-parallel rank in a training step, and in the head alone, and counts the scores
that its head computes. Run by hand.

A rank's own CPU time: waiting for another rank costs none, so cores shared by several ranks change nothing. The step is
that of `soda train` (forward, backward, clipping, AdamW) over 144,644 ids; what counts is the rank that takes longest.

    python tools/bench/bench_ranks.py training.head_rows=legal
"""

import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from train_sides import RATE, RandomWindows

from megatron_soda.config import load_recipe
from megatron_soda.errors import run_tool
from megatron_soda.files import to_json
from megatron_soda.vocab import LLAMA3

console = Console()


def work(rank: int, settings: list[str], documents: int, text: float, steps: int, results: Any) -> None:
    """In the process of a rank, of every step after the first: CPU seconds of the step and of its head, and scores."""
    recipe = load_recipe(None, settings)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron_soda.training import step as module

    device = ranks.init(recipe)
    torch.set_num_threads(1)
    head, spent, scores = module.head_loss, [0.0], [0]

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.process_time()
        result = head(*arguments, **named)
        spent[0] += time.process_time() - began
        for piece in named["pieces"] or ():
            scores[0] += len(piece.index) * (piece.high - piece.low)
        return result

    setattr(module, "head_loss", timed)  # noqa: B010
    engine = module.Engine(recipe, LLAMA3, device)
    batch = recipe.training.global_batch_size
    windows = RandomWindows(recipe.data.sequence_length, documents, batch * (steps + 1), text)
    found = []
    for number in range(steps + 1):
        spent[0], scores[0], began = 0.0, 0, time.process_time()
        engine.train_step(windows, number * batch, RATE)
        found.append((time.process_time() - began, spent[0], scores[0] / 1e6))
    results.put((rank, found[1:]))


def run(world: int, target: Callable[..., None], *arguments: Any) -> dict[int, Any]:
    """What each rank put into the queue."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world)
    )
    context = get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(rank, *arguments, results)) for rank in range(world)]
    for process in processes:
        process.start()
    found = dict(results.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="of the recipe")] = None,
    preset: Annotated[str, typer.Option(help="model.preset")] = "135m",
    tensor: Annotated[int, typer.Option(min=1, help="parallel.tensor")] = 2,
    layers: Annotated[int, typer.Option(help="cut the model to so many; 0: all")] = 0,
    sequence_length: Annotated[int, typer.Option(min=1)] = 1024,
    documents: Annotated[int, typer.Option(min=1, help="of a window")] = 1,
    text: Annotated[float, typer.Option(min=0, max=1, help="its share of the tokens; SODA's is 4 %")] = 0.04,
    steps: Annotated[int, typer.Option(min=1, help="timed, after a first one")] = 5,
) -> None:
    """Prints a table and one JSON line: CPU seconds of every rank, medians over the steps."""
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    overrides = [
        f"model.preset={preset}",
        *([f"model.num_layers={layers}"] if layers else []),
        f"parallel.tensor={tensor}",
        f"data.sequence_length={sequence_length}",
        "training.micro_batch_size=1",
        "training.global_batch_size=1",
        "optimizer.epsilon=1e-8",
        *(settings or []),
    ]
    with console.status("measuring"):
        found = run(tensor, work, overrides, documents, text, steps)
    table = Table(
        "rank",
        "step, CPU s",
        "head, CPU s",
        "scores, millions",
        title=f"{preset}, {sequence_length:,} tokens, {overrides[-1]}",
    )
    rows = []
    for _, results in sorted(found.items()):
        step, head, scores = (statistics.median(values) for values in zip(*results, strict=True))
        rows.append({"step": step, "head": head, "scores": scores})
    for name, row in [*((str(i), row) for i, row in enumerate(rows)), ("slowest", _slowest(rows))]:
        table.add_row(name, f"{row['step']:.3f}", f"{row['head']:.3f}", f"{row['scores']:.3f}")
    console.print(table)
    print(
        to_json(
            {
                "settings": overrides,
                "documents": documents,
                "text": text,
                "steps": steps,
                "rows": rows,
                **_slowest(rows),
            }
        )
    )


def _slowest(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: max(row[key] for row in rows) for key in ("step", "head", "scores")}


if __name__ == "__main__":
    run_tool(main)
