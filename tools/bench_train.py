"""Measures a whole training step against megatron-core and transformers: forward, backward, clip, AdamW. Run by hand.

- ours: the Engine of `soda train` on one process
- megatron-core: GPTModel with its own layers (attention included), its loss, its DDP and optimizer
- transformers: Qwen3ForCausalLM (sdpa) with its loss, and torch's fused AdamW

All have the same shapes, the full vocabulary (144,644 ids) and the same random tokens. Half precision keeps float32
weights everywhere: megatron-core's copies, torch.autocast for transformers, which has no FP8 and runs in BF16 then.
A window is one document unless --documents says more: megatron-core's layers and transformers know no documents.

Each side is a process of its own. They take turns step by step (--together), or, where memory is short, run after run
(--apart, --rounds). Ratios are medians over pairs of steps. Memory is the most of the whole process (CPU), or the most
allocated (CUDA). On a CPU megatron-core runs through parallel/cpu.py as ours does, and so has its memory allocator's
settings; transformers runs as it comes, or with these too (--same-malloc).

    python tools/bench_train.py
    python tools/bench_train.py --preset 4b --layers 18 --sequence-length 4096 --precision fp8 --steps 20 --warmup 5
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_prep.interleave import text_first
from megatron_soda.config import Recipe, choice, load_recipe
from megatron_soda.data.batch import Batch, Batcher
from megatron_soda.data.windows import Window
from megatron_soda.errors import run_tool
from megatron_soda.files import to_json
from megatron_soda.model.size import parameter_count, train_flops
from megatron_soda.training.metrics import memory_gib, mfu, peak_tflops
from megatron_soda.vocab import LLAMA3

SIDES = ("ours", "megatron-core", "transformers")
RATE = 1e-4
FORWARD_BACKWARD, OPTIMIZER = "forward_backward", "optimizer"
Result = dict[str, float]

console = Console()


class RandomWindows:
    """Windows of legal documents, text and then audio, out of random ids; the same for every side."""

    def __init__(self, length: int, documents: int) -> None:
        self.length, self.documents = length, documents

    def __getitem__(self, sample: int) -> Window:
        rng = np.random.default_rng(sample)
        each = -(-(self.length + 1) // self.documents)
        words = 1 + each // 8
        frames = -(-each // LLAMA3.codebooks) - words // LLAMA3.codebooks
        made = []
        for _ in range(self.documents):
            text = rng.integers(0, LLAMA3.bos, words).tolist()
            codes = rng.integers(0, LLAMA3.entries, (frames, LLAMA3.codebooks))
            made.append(text_first([(text, codes)], LLAMA3))
        return Window(np.concatenate(made)[: self.length + 1], self.length)


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.parts: dict[str, float] = {}
        self.mark = self._now()

    def lap(self, part: str) -> None:
        now = self._now()
        self.parts[part] = now - self.mark
        self.mark = now

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


class Data:
    """The micro-batches of a step."""

    def __init__(self, recipe: Recipe, documents: int, device: torch.device) -> None:
        t = recipe.training
        self.windows = RandomWindows(recipe.data.sequence_length, documents)
        self.size, self.global_size = t.micro_batch_size, t.global_batch_size
        self.batcher = Batcher(LLAMA3, device=device)

    def step(self, number: int) -> list[Batch]:
        first = number * self.global_size
        starts = range(first, first + self.global_size, self.size)
        return [self.batcher([self.windows[s + i] for i in range(self.size)]) for s in starts]


def ours(recipe: Recipe, documents: int, _same_malloc: bool) -> Callable[[int], Result]:
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron_soda.training.step import Engine

    device = ranks.init(recipe)
    engine = Engine(recipe, LLAMA3, device)
    windows = RandomWindows(recipe.data.sequence_length, documents)

    def step(number: int) -> Result:
        clock = Clock(device)
        result = engine.train_step(windows, number * recipe.training.global_batch_size, RATE)
        clock.lap("step")
        seconds = engine.seconds.take()
        assert result.loss is not None
        return {
            "loss": result.loss,
            FORWARD_BACKWARD: clock.parts["step"] - seconds[OPTIMIZER],
            OPTIMIZER: seconds[OPTIMIZER],
        }

    return step


def megatron_core(recipe: Recipe, documents: int, _same_malloc: bool) -> Callable[[int], Result]:
    from megatron_soda.parallel import ranks  # isort: skip  before megatron
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

    from megatron_soda.model.gpt import initialise, padded_size, transformer_config
    from megatron_soda.model.specs import choose_backend

    device = ranks.init(recipe)
    m, d, t = recipe.model, recipe.data, recipe.training
    config = transformer_config(recipe)
    if choose_backend(t.backend) == "transformer_engine":
        spec: Any = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=True)
    else:
        spec = get_gpt_layer_local_spec(qk_layernorm=True, normalization="RMSNorm")
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=padded_size(LLAMA3, 1),
        max_sequence_length=d.sequence_length,
        share_embeddings_and_output_weights=bool(m.tie_embeddings),
        position_embedding_type="rope",
        rotary_base=m.rope_theta,
        rope_scaling=m.rope_scaling_factor != 1.0,
        rope_scaling_factor=m.rope_scaling_factor,
    )
    initialise(model, LLAMA3, recipe)
    model = model.to(device=device, dtype=config.params_dtype)
    ddp = DistributedDataParallel(config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    half = recipe.precision.dtype != "fp32"
    optimizer: Any = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=RATE,
            weight_decay=recipe.optimizer.weight_decay,
            adam_beta1=recipe.optimizer.beta1,
            adam_beta2=recipe.optimizer.beta2,
            adam_eps=recipe.optimizer.epsilon,
            clip_grad=recipe.optimizer.clip_grad,
            bf16=half,
            params_dtype=torch.bfloat16 if half else torch.float32,
        ),
        [ddp],
    )
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    schedule: Any = get_forward_backward_func()
    data = Data(recipe, documents, device)

    def of_losses(losses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        total = losses.float().sum()
        return total, torch.tensor(losses.numel(), dtype=torch.int, device=device), {"loss": total.detach()}

    def forward_step(batches: Any, model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)
        return model(batch.tokens, batch.position_id, None, labels=batch.labels), of_losses

    def step(number: int) -> Result:
        clock = Clock(device)
        ddp.train()
        ddp.zero_grad_buffer()
        optimizer.zero_grad()
        results = schedule(
            forward_step_func=forward_step,
            data_iterator=iter(data.step(number)),
            model=ddp,
            num_microbatches=t.global_batch_size // t.micro_batch_size,
            seq_length=d.sequence_length,
            micro_batch_size=t.micro_batch_size,
            forward_only=False,
        )
        clock.lap(FORWARD_BACKWARD)
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = RATE, recipe.optimizer.weight_decay * group["wd_mult"]
        optimizer.step()
        clock.lap(OPTIMIZER)
        loss = sum(float(result["loss"]) for result in results) / (t.global_batch_size * d.sequence_length)
        return {"loss": loss, **clock.parts}

    return step


def transformers(recipe: Recipe, documents: int, same_malloc: bool) -> Callable[[int], Result]:
    from transformers import AutoModelForCausalLM

    from megatron_soda.parallel import cpu

    if not same_malloc:
        cpu._installed = True  # the import below finds it done, and torch stays as it is
    from megatron_soda.hf.export import hf_config
    from megatron_soda.hf.load import quiet_transformers

    quiet_transformers()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    t = recipe.training
    torch.manual_seed(recipe.seed)
    config = hf_config(recipe.model, LLAMA3, recipe.data.sequence_length)
    config.use_cache = False
    with device:
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    model.train()
    if t.recompute:
        model.gradient_checkpointing_enable()
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": recipe.optimizer.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=RATE,
        betas=(recipe.optimizer.beta1, recipe.optimizer.beta2),
        eps=recipe.optimizer.epsilon,
        fused=True,
    )
    half = partial(torch.autocast, device.type, torch.bfloat16, enabled=recipe.precision.dtype != "fp32")
    data = Data(recipe, documents, device)

    def step(number: int) -> Result:
        clock = Clock(device)
        optimizer.zero_grad()
        batches = data.step(number)
        total = 0.0
        for batch in batches:
            with half():
                loss = model(batch.tokens, labels=batch.tokens).loss / len(batches)
            loss.backward()
            total += float(loss.detach())
        clock.lap(FORWARD_BACKWARD)
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip_grad)
        optimizer.step()
        clock.lap(OPTIMIZER)
        return {"loss": total, **clock.parts}

    return step


_step: Callable[[int], Result]


def start(side: str, settings: list[str], documents: int, same_malloc: bool, threads: int) -> None:
    """In the process of a side: its model."""
    global _step
    make = {"ours": ours, "megatron-core": megatron_core, "transformers": transformers}[side]
    torch.set_num_threads(threads)
    _step = make(load_recipe(None, settings), documents, same_malloc)
    torch.set_num_threads(threads)  # ranks.init takes all cores
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def take_step(number: int) -> Result:
    """In the process of a side: one step."""
    result = _step(number)
    return {**result, "step": result[FORWARD_BACKWARD] + result[OPTIMIZER], "gib": memory_gib()}


class Side:
    """A process with the model of one side, until it is closed or its memory runs out."""

    def __init__(self, name: str, *how: Any) -> None:
        self.name = name
        self.pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.problem = self._run(start, name, *how)

    def step(self, number: int) -> Result | None:
        return None if self.problem else self._run(take_step, number)

    def close(self) -> None:
        self.pool.shutdown()

    def _run(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result; None, and a problem, if memory ran out."""
        try:
            return self.pool.submit(function, *args).result()
        except BrokenProcessPool:
            self.problem = "killed (out of memory?)"
        except torch.OutOfMemoryError:
            self.problem = "out of memory"
        return self.problem if function is start else None


def measure(
    sides: list[str], how: tuple[Any, ...], steps: int, warmup: int, rounds: int, together: bool
) -> tuple[dict[str, list[Result]], dict[str, str]]:
    """The steps of each side after its first `warmup` ones, and what stopped a side."""
    results: dict[str, list[Result]] = {side: [] for side in sides}
    problems: dict[str, str] = {}
    for names in [sides] if together else [[side] for _ in range(rounds) for side in sides]:
        group = [Side(name, *how) for name in names if name not in problems]
        for number in range(warmup + steps):
            for side in group:
                with console.status(f"{side.name}: step {number + 1} of {warmup + steps}"):
                    result = side.step(number)
                if result is not None and number >= warmup:
                    results[side.name].append(result)
        for side in group:
            side.close()
            if side.problem:
                problems[side.name] = side.problem
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
    sides: Annotated[str, typer.Option(help="which, separated by commas")] = ",".join(SIDES),
    together: Annotated[
        bool | None, typer.Option("--together/--apart", help="all alive at once, or one at a time (default on CUDA)")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="with --apart: how often each is started")] = 2,
    same_malloc: Annotated[
        bool, typer.Option("--same-malloc", help="transformers keeps freed memory as we do")
    ] = False,
) -> None:
    """Prints a table and one JSON line: seconds and memory of a step, ours, megatron-core's and transformers'.

    python tools/bench_train.py --threads 2 --steps 8
    """
    choice("--device", device, ("auto", "cpu"))
    names = sides.split(",")
    for name in names:
        choice("--sides", name, SIDES)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    cuda = torch.cuda.is_available()
    if together is None:
        together = not cuda
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
    flops = train_flops(recipe.model, LLAMA3, recipe.data.sequence_length)
    where = torch.cuda.get_device_name() if cuda else f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    peak = peak_tflops(recipe, where)
    results, problems = measure(names, (overrides, documents, same_malloc, threads), steps, warmup, rounds, together)

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        found = results[name]
        if not found:
            rows[name] = {"problem": problems[name]}
            continue
        middle = {key: statistics.median(r[key] for r in found) for key in (FORWARD_BACKWARD, OPTIMIZER, "step")}
        speed = tokens / middle["step"]
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
