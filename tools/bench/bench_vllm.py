"""Measures what the slot grammar costs in vLLM: tokens a second of requests under it and of free ones, in turns, in one
engine. Run by hand, with an interpreter that has vLLM; tests/full/test_vllm.py makes one in runs/vllm-venv.

The requests of a turn are of unequal length and all give as many tokens, whether documents end or not. Times are CPU
time of the engine's process, the prefill included.

    python tools/bench/bench_vllm.py
    python tools/bench/bench_vllm.py --models "" --export runs/quickstart/hf
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_soda.config import load_recipe
from megatron_soda.errors import SodaError, run_tool
from megatron_soda.hf.load import quiet_transformers, read_export
from megatron_soda.hf.qwen3 import hf_config
from megatron_soda.inference.sample import Constraint
from megatron_soda.serving.slots import PROCESSOR
from megatron_soda.vocab import LLAMA3, TokenSpace

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 512  # tokens
console = Console()


def write_random(preset: str, folder: Path) -> None:
    """A model of random weights with SODA's 144,644 ids, as much of an export as vLLM and the processor read."""
    torch.manual_seed(0)
    config = hf_config(load_recipe(None, [f"model.preset={preset}"]).model, LLAMA3, CONTEXT)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    (folder / "soda.json").write_text(json.dumps({"space": asdict(LLAMA3)}))


def prompts(space: TokenSpace, count: int) -> list[list[int]]:
    """Sound of 2 to 9 frames."""
    rng = np.random.default_rng(0)
    codes = [rng.integers(0, space.entries, (2 + i % 8, space.codebooks)) for i in range(count)]
    return [[space.bos, space.audio_start, *space.audio_ids(one).tolist()] for one in codes]


def measure(
    name: str, folder: Path, space: TokenSpace, batches: list[int], tokens: int, repeats: int, python: Path
) -> Any:
    """A row a batch."""
    settings = {"temperature": 1.0, "max_tokens": tokens, "ignore_eos": True}
    sides = (1, 0)  # under the grammar, free
    turns = [
        {
            "prompts": prompts(space, batch),
            "params": [{**settings, "seed": i, "extra_args": {"soda_grammar": side}} for i in range(batch)],
        }
        for batch in batches
        for _ in range(repeats + 1)
        for side in sides
    ]
    engine = {"max_model_len": CONTEXT, "max_num_seqs": max(batches), "logits_processors": [PROCESSOR]}
    with tempfile.TemporaryDirectory() as job:
        path = Path(job) / "job.json"
        path.write_text(json.dumps({"folder": str(folder), "engine": engine, "turns": turns}))
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [str(python), str(ROOT / "tools/bench/vllm_side.py"), str(path)]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SodaError(f"{python}: vLLM failed\n{done.stderr[-2000:]}")
    found, rows = iter(json.loads(done.stdout.splitlines()[-1])), []
    for batch in batches:
        pairs = [(next(found), next(found)) for _ in range(repeats + 1)][1:]  # the first warms up
        under, free = ([turn[side]["cpu_seconds"] for turn in pairs] for side in (0, 1))
        rows.append(
            {
                "model": name,
                "requests": batch,
                "grammar_tokens_per_second": batch * tokens / statistics.median(under),
                "free_tokens_per_second": batch * tokens / statistics.median(free),
                "ratio": statistics.median(b / a for a, b in zip(under, free, strict=True)),
                "legal": share_legal(space, prompts(space, batch), [turn[0]["ids"] for turn in pairs]),
                "free_legal": share_legal(space, prompts(space, batch), [turn[1]["ids"] for turn in pairs]),
            }
        )
    return rows


def share_legal(space: TokenSpace, given: list[list[int]], turns: list[list[list[int]]]) -> float:
    """Of the answers, those of which every token is legal."""
    constraint = Constraint(space, torch.device("cpu"))
    legal = [constraint.follow(a + b) is not None for ids in turns for a, b in zip(given, ids, strict=True)]
    return sum(legal) / len(legal)


def main(
    models: Annotated[str, typer.Option(help="presets, of random weights with SODA's ids; empty: none")] = "135m",
    batches: Annotated[str, typer.Option(help="requests at once")] = "1,16",
    tokens: Annotated[int, typer.Option(min=16, max=400, help="of an answer")] = 64,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    export: Annotated[str, typer.Option(help="an exported model")] = "",
    python: Annotated[Path, typer.Option(help="an interpreter that has vLLM")] = ROOT / "runs/vllm-venv/bin/python",
) -> None:
    """Prints a table and one JSON line: tokens a second with and without the grammar, by model and requests at once."""
    if not python.is_file():
        raise SodaError(f"{python}: no such interpreter; tests/full/test_vllm.py makes one, or name another: --python")
    quiet_transformers()
    numbers, rows = [int(batch) for batch in batches.split(",")], []
    how = (numbers, tokens, repeats, python)
    for preset in filter(None, models.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            write_random(preset, Path(folder))
            rows += measure(preset, Path(folder), LLAMA3, *how)
    if export:
        described = read_export(Path(export))
        rows += measure(described["name"], Path(export), described["space"], *how)
    table = Table(*(name.replace("_", " ") for name in rows[0])) if rows else Table()
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    console.print(table)
    print(json.dumps({"tokens": tokens, "repeats": repeats, "rows": rows}))


if __name__ == "__main__":
    run_tool(main)
