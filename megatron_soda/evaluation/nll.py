"""The NLL vector of a model on held-out documents, beside a smoothed unigram of every slot."""

import math
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from ..data.store import Store
from ..hf.load import LoadedModel

TOKENS_AT_ONCE = 8192
console = Console(stderr=True)


def unigram(store: Store) -> np.ndarray:
    """float64 (size,): -log p(token | its class) in nats, counted on `store`, one added to every count.

    It is told the class of the next token, which the model has to know by itself.
    """
    counts = np.ones(store.space.size)
    for start in range(0, store.size, 1 << 24):
        chunk = store.read(start, min(1 << 24, store.size - start))
        counts += np.bincount(chunk, minlength=store.space.size)
    classes = store.space.class_table()
    totals = np.bincount(classes, weights=counts)
    return -np.log(counts / totals[classes])


@torch.no_grad()
def evaluate_nll(model: LoadedModel, test: Store, train: Store, documents: int = 0) -> dict[str, Any]:
    """Teacher-forced NLL of every token after BOS, each document by itself, cut at the model's context length.

    Returns {"classes": {name: row}, "acoustic_mean": row, "all": row}, a row with tokens and nats and bits of both.
    """
    names = model.space.class_names
    table = model.space.class_table()
    baseline = unigram(train)
    limit = model.model.config.max_position_embeddings
    chosen = sorted(
        (test.document(i)[: limit + 1] for i in range(len(test) if documents == 0 else min(documents, len(test)))),
        key=len,
    )
    sums = np.zeros((3, len(names)))  # tokens, nats of the model, nats of the unigram
    batches = _batches(chosen)
    for batch in track(batches, "evaluate", console=console):
        width = max(map(len, batch))
        ids = torch.full((len(batch), width), model.space.eos)
        for row, document in zip(ids, batch, strict=True):
            row[: len(document)] = torch.from_numpy(document.astype(np.int64))
        logits = model.model(input_ids=ids[:, :-1].to(model.device)).logits
        nll = torch.nn.functional.cross_entropy(
            logits.float().transpose(1, 2), ids[:, 1:].to(model.device), reduction="none"
        )
        for document, row in zip(batch, nll.double().cpu().numpy(), strict=True):
            labels = document[1:]
            classes = table[labels]
            sums[0] += np.bincount(classes, minlength=len(names))
            sums[1] += np.bincount(classes, row[: len(labels)], len(names))
            sums[2] += np.bincount(classes, baseline[labels], len(names))
    rows = {name: _row(*sums[:, i]) for i, name in enumerate(names) if sums[0, i]}
    acoustic = [rows[name] for name in names[3:] if name in rows]
    result: dict[str, Any] = {"classes": rows, "all": _row(*sums.sum(1))}
    if acoustic:  # the mean over codebooks, as the paper's vector is read
        mean = {key: float(np.mean([row[key] for row in acoustic])) for key in acoustic[0]}
        result["acoustic_mean"] = mean | {"tokens": sum(row["tokens"] for row in acoustic)}
    return result


def _batches(documents: list[np.ndarray]) -> list[list[np.ndarray]]:
    """Documents sorted by length -> batches of about TOKENS_AT_ONCE tokens, padding included."""
    batches: list[list[np.ndarray]] = []
    for document in documents:
        if batches and (len(batches[-1]) + 1) * len(document) <= TOKENS_AT_ONCE:
            batches[-1].append(document)
        else:
            batches.append([document])
    return batches


def _row(tokens: float, model: float, baseline: float) -> dict[str, float]:
    nats = {"model": model / tokens, "unigram": baseline / tokens}
    row: dict[str, float] = {"tokens": int(tokens)}
    for name, value in nats.items():
        row[f"{name}_nats"] = float(value)
        row[f"{name}_bits"] = float(value / math.log(2))
    return row
