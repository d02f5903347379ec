"""Times our cross-entropy with z-loss against megatron-core's without, forward and backward, side by side. Run by hand.

python tools/bench_loss.py
python tools/bench_loss.py --tokens 2048 --vocabulary 144644 --threads 2
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.console import Console
from rich.table import Table

from megatron_soda.config import Recipe
from megatron_soda.model.loss import vocab_parallel_loss
from megatron_soda.parallel import ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--vocabulary", type=int, default=16_900)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()

    recipe = Recipe()
    recipe.model.num_layers = recipe.model.num_attention_heads = recipe.model.num_query_groups = 1
    ranks.init(recipe)
    torch.set_num_threads(arguments.threads)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    padded = -(-arguments.vocabulary // 128) * 128
    source = torch.randn(arguments.tokens, 1, padded)
    labels = torch.randint(0, arguments.vocabulary, (arguments.tokens, 1))

    def ours() -> Any:
        logits = source.clone().requires_grad_()
        started = time.perf_counter()
        vocab_parallel_loss(logits, labels, arguments.vocabulary, 1e-4)[0].sum().backward()
        return time.perf_counter() - started

    def stock() -> Any:
        logits = source.clone().requires_grad_()
        started = time.perf_counter()
        vocab_parallel_cross_entropy(logits, labels).sum().backward()
        return time.perf_counter() - started

    times: dict[str, list[float]] = {"ours (with z-loss, padding masked)": [], "megatron-core 0.16.1 (neither)": []}
    for repeat in range(arguments.repeats + 2):
        for name, run in zip(times, (ours, stock), strict=True):
            seconds = run()
            if repeat >= 2:
                times[name].append(seconds)
    table = Table("loss, forward and backward", "median ms", "min ms")
    for name, values in times.items():
        table.add_row(name, f"{1e3 * statistics.median(values):.1f}", f"{1e3 * min(values):.1f}")
    Console().print(table)
    a, b = (statistics.median(v) for v in times.values())
    print(json.dumps({**vars(arguments), "ours_s": a, "stock_s": b, "ratio": b / a}))


if __name__ == "__main__":
    main()
