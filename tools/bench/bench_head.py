"""Measures the head and its loss against others: time and memory of forward and backward. Run by hand.

Ours is `head_loss` with z-loss, over all rows and over those that the grammar allows (`legal`); megatron-core's a
ColumnParallelLinear and `vocab_parallel_cross_entropy`. On CUDA also those of Transformer Engine (`te`), Liger and
cut-cross-entropy (`cce`), where they are installed (head_sides.py). All end with the gradient of the hidden states and
with that of the weight added to the float32 main_grad of megatron-core's DDP. The tokens are of legal documents, 4 % of
them text.

The time is taken in one process, the sides in turns. The memory is the most that one pass, in a process of its own,
takes beyond what it found: weights, their gradients and the inputs. On a CPU that is resident memory.

    python tools/bench/bench_head.py
    python tools/bench/bench_head.py --tokens 4096 --repeats 5 --threads 2
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from head_sides import PACKAGES, Z_WEIGHT, losses_of, missing

from megatron_soda.config import choice, load_recipe
from megatron_soda.data.batch import Batcher
from megatron_soda.errors import run_tool
from megatron_soda.files import to_json
from megatron_soda.training.metrics import memory_gib
from megatron_soda.vocab import LLAMA3

SIDES = ("ours", "legal", "megatron-core", "te", "liger", "cce")
Pass = Callable[[], float]

console = Console()


def make(side: str, device: torch.device, preset: str, precision: str, tokens: int) -> Pass:
    """A pass of one side: forward, backward, and the mean NLL it found."""
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear, vocab_parallel_cross_entropy
    from train_sides import RandomWindows

    from megatron_soda.model.gpt import transformer_config
    from megatron_soda.model.head import head_loss
    from megatron_soda.model.legal_rows import LegalRows
    from megatron_soda.model.rows import Rows, padded_size

    recipe = load_recipe(None, [f"model.preset={preset}", f"precision.dtype={precision}"])
    if not parallel_state.model_parallel_is_initialized():
        ranks.layout(recipe)
    config = transformer_config(recipe)
    config.perform_initialization = False
    layer = ColumnParallelLinear(
        config.hidden_size,
        padded_size(LLAMA3, 1),
        config=config,
        init_method=torch.nn.init.normal_,
        bias=False,
        gather_output=False,
    )
    generator = torch.Generator().manual_seed(0)
    weight: Any = layer.weight
    drawn = torch.randn(weight.shape, generator=generator) * config.init_method_std
    layer.to(device)
    weight.data.copy_(drawn)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), layer)
    ddp.zero_grad_buffer()
    hidden = torch.randn(tokens, 1, config.hidden_size, generator=generator).to(device, config.params_dtype)
    hidden.requires_grad_()
    batch = Batcher(LLAMA3, device=device)([RandomWindows(tokens, 1, 1)[0]])
    labels, weights, classes = (x.reshape(-1) for x in (batch.labels, batch.loss_weight, batch.class_id))
    group: Any = parallel_state.get_tensor_model_parallel_group()
    legal = LegalRows(Rows(LLAMA3), {LLAMA3.codebooks}, device=device)

    def our_pass() -> float:
        hidden.grad = None
        loss, sums = head_loss(
            hidden.view(tokens, -1),
            weight.detach(),
            labels,
            weights,
            classes,
            classes=len(LLAMA3.class_names),
            rows=LLAMA3.size,
            z_weight=Z_WEIGHT,
            group=group,
            weight_gradient=weight.main_grad,
            pieces=legal.pieces(legal.groups(batch).reshape(-1), weights) if side == "legal" else None,
        )
        loss.backward()
        return float(sums[0].sum()) / tokens

    def others_pass() -> float:
        hidden.grad = None
        nll, minimised = losses_of(side)(hidden.view(tokens, -1), layer, labels)
        sums = torch.zeros(2, len(LLAMA3.class_names), dtype=torch.float64, device=device)
        sums[0].index_add_(0, classes, (nll.detach() * weights).double())
        sums[1].index_add_(0, classes, weights.double())
        (minimised * weights).sum().backward()
        return float(sums[0].sum()) / tokens

    def their_pass() -> float:
        hidden.grad = None
        logits, _ = ddp(hidden)
        loss = vocab_parallel_cross_entropy(logits, labels[:, None]).sum()
        del logits
        loss.backward()
        return float(loss.detach()) / tokens

    return {"megatron-core": their_pass, **dict.fromkeys(PACKAGES, others_pass)}.get(side, our_pass)


def start(threads: int) -> torch.device:
    """A process group of this process alone, and its device."""
    from megatron_soda.parallel import ranks

    device = ranks.init(load_recipe(None))
    torch.set_num_threads(threads)
    return device


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def times(
    sides: list[str], threads: int, preset: str, precision: str, tokens: int, repeats: int
) -> tuple[dict[str, list[float]], dict]:
    """Seconds of each pass by side, in turns; and the NLL each found."""
    device = start(threads)
    passes = {side: make(side, device, preset, precision, tokens) for side in sides}
    nll = {side: run() for side, run in passes.items()}  # the first pass sets things up
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in passes.items():
            sync(device)
            began = time.perf_counter()
            run()
            sync(device)
            seconds[side].append(time.perf_counter() - began)
    return seconds, nll


def memory(side: str, threads: int, preset: str, precision: str, tokens: int) -> float:
    """GiB of one pass beyond what was there before it. The process must be a fresh one."""
    device = start(threads)
    run = make(side, device, preset, precision, tokens)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**30
    else:
        before = psutil.Process().memory_info().rss / 2**30
    run()
    return memory_gib() - before


def fresh(function: Callable[..., Any], *args: Any) -> Any:
    """The function's result from a process of its own. This one must stay small: a process begins at its peak."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def main(
    tokens: Annotated[int, typer.Option(min=1, help="of a timed pass")] = 1024,
    memory_tokens: Annotated[int, typer.Option(min=1, help="of the pass whose memory is taken")] = 4096,
    repeats: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    preset: Annotated[str, typer.Option(help="whose hidden size it is")] = "135m",
    precision: Annotated[str, typer.Option(help="fp32 | bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto | cpu")] = "auto",
) -> None:
    """Prints a table and one JSON line: our head, over all rows and legal ones, and others'; 144,644 ids."""
    choice("--device", device, ("auto", "cpu"))
    choice("--precision", precision, ("fp32", "bf16"))
    hidden_size = load_recipe(None, [f"model.preset={preset}"]).model.hidden_size
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    shape = threads, preset, precision
    skipped = {side: why for side in PACKAGES if (why := fresh(missing, side, device))}
    sides = [side for side in SIDES if side not in skipped]
    peaks = {side: fresh(memory, side, *shape, memory_tokens) for side in sides}
    seconds, nll = fresh(times, sides, *shape, tokens, repeats)
    rows = {side: {"seconds": statistics.median(seconds[side]), "gib": peaks[side], "nll": nll[side]} for side in sides}
    table = Table("head", f"ms, {tokens:,} tokens", f"GiB, {memory_tokens:,} tokens", "NLL")
    for side, row in rows.items():
        table.add_row(side, f"{1000 * row['seconds']:,.1f}", f"{row['gib']:.3f}", f"{row['nll']:.4f}")
    ratios = {}
    others = [("ours", side) for side in sides if side in PACKAGES]
    for a, b in (("ours", "megatron-core"), ("legal", "ours"), ("legal", "megatron-core"), *others):
        faster = statistics.median(theirs / ours for ours, theirs in zip(seconds[a], seconds[b], strict=True))
        smaller = peaks[b] / peaks[a]
        table.add_row(f"{b} / {a}", f"{faster:.2f}", f"{smaller:.1f}", "")
        ratios[f"{b} / {a}"] = {"times_faster": faster, "times_smaller": smaller}
    console.print(table)
    for side, why in skipped.items():
        console.print(f"{side} was skipped: {why}")
    facts = {"tokens": tokens, "memory_tokens": memory_tokens, "hidden_size": hidden_size, "vocabulary": LLAMA3.size}
    how = {"repeats": repeats, "threads": threads, "precision": precision}
    print(to_json({**facts, **how, "rows": rows, "ratios": ratios, "skipped": skipped}))


if __name__ == "__main__":
    run_tool(main)
