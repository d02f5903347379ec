"""Measures token generation: `sample` against transformers' `generate` with the grammar as a logits processor.

Both decode greedily from the same prompts of sound, with SODA's 144,644 ids and random weights. Times are of the steps
after the first token, so without the prefill: CPU time of one thread, or elapsed time of several or of a CUDA device,
the sides in turns. The limit is what reading the weights of a step once takes, at the bandwidth measured here. On a
CUDA device the model is in BF16, for both sides.

    python tools/bench/bench_generate.py
    python tools/bench/bench_generate.py --models 135m --batches 1 --threads 2
    python tools/bench/bench_generate.py --models 135m --device cuda
    python tools/bench/bench_generate.py --models "" --export runs/quickstart/hf --store runs/quickstart/data/test
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor, LogitsProcessorList, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.config import choice, load_recipe
from megatron_soda.data.store import Store
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.files import to_json
from megatron_soda.hf.load import load_model, quiet_transformers
from megatron_soda.hf.qwen3 import hf_config
from megatron_soda.inference.decoder import Decoder, Weights
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.task import Prompt
from megatron_soda.ops import library, linear
from megatron_soda.vocab import LLAMA3

FORMATS: tuple[Weights, ...] = ("", "bf16", "int8")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
PROMPT_FRAMES = 6

Side = tuple[float, list[list[int]]]  # seconds a step, and ids by row
Rows = list[dict[str, Any]]

console = Console()


class GrammarMask(LogitsProcessor):
    """The slot grammar as users write it for `generate`: a mask over the whole vocabulary."""

    def __init__(self, constraint: Constraint, prompt: Prompt, clock: Callable[[], float]) -> None:
        self.constraint, self.prompt, self.clock = constraint, prompt, clock
        self.barred = ~torch.from_numpy(constraint.grammar.legal()).to(constraint.device)
        self.states: list[int] = []
        self.times: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        done = input_ids.shape[1] - len(self.prompt.ids)
        if not done:
            self.states = [cast(int, self.constraint.follow(self.prompt.ids))] * len(input_ids)
        else:
            last = input_ids[:, -1].tolist()
            self.states = [self.constraint.after(s, t) for s, t in zip(self.states, last, strict=True)]
        masked = scores.masked_fill(self.barred[self.states], -torch.inf)
        for row, state in zip(masked, self.states, strict=True):
            legal = self.constraint.rows(state, self.prompt.max_tokens - done)
            if legal.forced and legal.illegal is not None:
                row[legal.first : legal.end].masked_fill_(legal.illegal, -torch.inf)
                row[: legal.first] = row[legal.end :] = -torch.inf
            elif legal.forced:
                row[: legal.first] = row[legal.end :] = -torch.inf
        self.times.append(self.clock())
        return cast(torch.FloatTensor, masked)


def theirs(model: Any, constraint: Constraint, prompt: Prompt, batch: int, clock: Callable[[], float]) -> Side:
    """Seconds a step, and ids by row."""
    mask = GrammarMask(constraint, prompt, clock)
    settings = {"max_new_tokens": prompt.max_tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    ids = torch.tensor([prompt.ids] * batch, device=model.device)
    found = model.generate(ids, logits_processor=LogitsProcessorList([mask]), **settings)
    return (mask.times[-1] - mask.times[0]) / (len(mask.times) - 1), found.tolist()


def ours(decoder: Decoder, constraint: Constraint, prompt: Prompt, batch: int, clock: Callable[[], float]) -> Side:
    times: list[float] = []

    def told(row: int, token: int) -> None:
        if row == batch - 1:
            times.append(clock())

    rows = sample(decoder, constraint, [prompt] * batch, temperature=0.0, on_token=told)
    return (times[-1] - times[0]) / (len(times) - 1), [row.ids for row in rows]


def bandwidth(device: torch.device) -> float:
    """Bytes a second that one thread, or the device, reads, at best, by a product and by a sum."""
    cuda = device.type == "cuda"
    weight, x = torch.ones(1_000_000 if cuda else 100_000, 512, device=device), torch.ones(1, 512, device=device)
    best = 0.0
    for _ in range(5):
        for read in (lambda: F.linear(x, weight) if cuda else linear(x, weight), weight.sum):
            began = time.perf_counter()
            read()
            if cuda:
                torch.cuda.synchronize()
            best = max(best, weight.numel() * 4 / (time.perf_counter() - began))
    return best


def weights_a_step(model: Any) -> int:
    """Numbers read in a step inside an audio frame: all layers, and one codebook of the head."""
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    return layers + LLAMA3.entries * model.config.hidden_size


@torch.no_grad()
def first_difference(model: Any, prompt: Prompt, a: list[int], b: list[int]) -> dict[str, float] | None:
    """Where two rows part: the place, and how far apart the model's logits of the two tokens are."""
    places = [i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y]
    if not places:
        return None
    logits = model(torch.tensor([a[: places[0]]], device=model.device), logits_to_keep=1).logits[0, -1]
    return {"token": places[0] - len(prompt.ids), "gap": float((logits[a[places[0]]] - logits[b[places[0]]]).abs())}


def measure(
    preset: str,
    batches: list[int],
    tokens: int,
    repeats: int,
    clock: Callable[[], float],
    rate: float,
    device: torch.device,
) -> Rows:
    """A row a format and batch."""
    torch.manual_seed(0)
    recipe = load_recipe(None, [f"model.preset={preset}"])
    model: Any = Qwen3ForCausalLM(hf_config(recipe.model, LLAMA3, 4096)).eval()
    own, formats = "fp32", FORMATS
    if device.type == "cuda":
        model, own, formats = model.to(device, torch.bfloat16), "bf16", FORMATS[:1]
    codes = np.random.default_rng(0).integers(0, LLAMA3.entries, (PROMPT_FRAMES, LLAMA3.codebooks))
    prompt = Prompt([LLAMA3.bos, LLAMA3.audio_start, *LLAMA3.audio_ids(codes).tolist()], set(), tokens)
    constraint, count = Constraint(LLAMA3, device), weights_a_step(model)
    rows = []
    for batch in batches:
        sides: dict[str, Callable[[], Side]] = {
            "generate": lambda batch=batch: theirs(model, constraint, prompt, batch, clock)
        }
        for weights in formats:
            decoder = Decoder(model, weights)
            sides[weights] = lambda decoder=decoder, batch=batch: ours(decoder, constraint, prompt, batch, clock)
        taken: dict[str, list[float]] = {}
        ids: dict[str, list[list[int]]] = {}
        for turn in range(repeats + 1):
            for name, side in sides.items():
                seconds, ids[name] = side()
                if turn:
                    taken.setdefault(name, []).append(seconds)
        for weights in formats:
            seconds = statistics.median(taken[weights])
            pairs = zip(taken["generate"], taken[weights], strict=True)
            size = count * BYTES[weights or own]
            limit = size / rate
            same = sum(
                x == y for a, b in zip(ids["generate"], ids[weights], strict=True) for x, y in zip(a, b, strict=False)
            )
            rows.append(
                {
                    "model": preset,
                    "batch": batch,
                    "weights": weights or own,
                    "generate_ms": 1e3 * statistics.median(taken["generate"]),
                    "ours_ms": 1e3 * seconds,
                    "ratio": statistics.median(a / b for a, b in pairs),
                    "tokens_per_second": batch / seconds,
                    "megabytes_a_step": size / 1e6,
                    "limit_ms": 1e3 * limit,
                    "of_the_limit": limit / seconds,
                    "same_tokens": same / sum(map(len, ids["generate"])),
                    "difference": first_difference(model, prompt, ids["generate"][0], ids[weights][0]),
                }
            )
    return rows


@torch.no_grad()
def nll(export: Path, store: Path, documents: int) -> dict[str, float]:
    """Nats a token of held-out documents, fed to the decoder a token at a time, by format of the weights."""
    loaded, held_out = load_model(export), Store(store)
    found = {}
    for weights in FORMATS:
        decoder, total, count = Decoder(loaded.model, weights), 0.0, 0
        for start in range(0, min(documents, len(held_out)), 16):
            some = [
                held_out.document(i).tolist()[: decoder.context] for i in range(start, min(start + 16, len(held_out)))
            ]
            longest = max(map(len, some))
            ids = torch.tensor([one + [0] * (longest - len(one)) for one in some])
            hidden, cache = decoder.prefill([one[:1] for one in some], longest)
            for place in range(1, longest):
                nats = torch.nn.functional.cross_entropy(decoder.logits(hidden), ids[:, place], reduction="none")
                there = torch.tensor([place < len(one) for one in some])
                total, count = total + float(nats[there].double().sum()), count + int(there.sum())
                hidden = decoder.step(ids[:, place], cache)
        found[weights or "fp32"] = total / count
    return found


def main(
    models: Annotated[str, typer.Option(help="presets; empty: none")] = "tiny,135m",
    batches: Annotated[str, typer.Option(help="rows at once")] = "1,16",
    tokens: Annotated[int, typer.Option(min=16, help="of a generation")] = 66,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    threads: Annotated[int, typer.Option(min=1, help="1: CPU time; more: elapsed time")] = 1,
    device: Annotated[str, typer.Option(help="cpu | cuda")] = "cpu",
    export: Annotated[str, typer.Option(help="an exported model whose NLL is measured by format; needs --store")] = "",
    store: Annotated[str, typer.Option(help="its held-out store, without suffix")] = "",
    documents: Annotated[int, typer.Option(min=1, help="of the store")] = 64,
) -> None:
    """Prints a table and one JSON line: milliseconds a step of both sides, by model, batch and format of weights."""
    if bool(export) != bool(store):
        raise SodaError("--export and --store belong together")
    choice("--device", device, ("cpu", "cuda"))
    torch.set_num_threads(threads)
    quiet_transformers()
    place = torch.device(device)
    clock = time.process_time if threads == 1 and device == "cpu" else time.perf_counter
    numbers, rate = [int(batch) for batch in batches.split(",")], bandwidth(place)
    how = numbers, tokens, repeats, clock, rate, place
    rows = [row for name in models.split(",") if name for row in measure(name, *how)]
    if rows:
        shown = [name for name in rows[0] if name != "difference"]
        table = Table(*(name.replace("_", " ") for name in shown))
        for row in rows:
            table.add_row(*(f"{row[name]:.3g}" if isinstance(row[name], float) else str(row[name]) for name in shown))
        console.print(table)
    facts: dict[str, Any] = {"tokens": tokens, "repeats": repeats, "threads": threads, "device": device}
    facts["bytes_per_second"] = rate
    if export:
        facts["nll"] = nll(Path(export), Path(store), documents)
        console.print(facts["nll"])
    print(to_json({**facts, "csrc": library.describe(), "rows": rows}))


if __name__ == "__main__":
    run_tool(main)
