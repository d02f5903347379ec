"""How likely a model finds documents: teacher-forced, in batches, and the same in any batch to 1e-5."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.progress import track

from ..console import console
from ..data.batch import Batcher
from ..data.windows import Window
from ..model.legal_rows import LegalRows, Piece
from ..model.rows import Rows
from .kept import Kept

if TYPE_CHECKING:
    from ..hf.load import LoadedModel
    from .bench import Bench

TOKENS_AT_ONCE = 8192  # padding included
ROWS_AT_ONCE = 512  # of logits, in one piece of memory
VERSION = 1  # of the sums in a run's evaluate/*.jsonl


class Likelihood:
    """Scores documents with a model. `slots`: codes per frame (vocab.Grammar)."""

    def __init__(self, model: "LoadedModel", slots: int) -> None:
        self.model = model
        self._batcher = Batcher(model.space)
        self._legal = LegalRows(Rows(model.space), {slots})

    def nats(self, documents: Sequence[np.ndarray], softmaxes: Sequence[str]) -> Iterator[np.ndarray]:
        """For each document of a batch float64 (softmaxes, tokens - 1): -log p of every token after the first, by the
        softmax over "all" tokens or over "legal" ones."""
        longest = max(map(len, documents))
        padded = [np.pad(d, (0, longest - len(d)), constant_values=self.model.space.eos) for d in documents]
        batch = self._batcher([Window(ids, len(d) - 1) for ids, d in zip(padded, documents, strict=True)])
        labels, weight = batch.labels.flatten().to(self.model.device), batch.loss_weight.flatten()
        whole = [Piece(weight.nonzero()[:, 0], 0, 0, self.model.space.size)]
        with torch.no_grad():
            hidden = self.model.model.model(input_ids=batch.tokens.to(self.model.device)).last_hidden_state.flatten(
                0, 1
            )
            legal = self._legal.pieces(self._legal.groups(batch).flatten(), weight) if "legal" in softmaxes else []
            found = [self._of_pieces(hidden, labels, legal if name == "legal" else whole) for name in softmaxes]
            rows = torch.stack(found).unflatten(1, batch.labels.shape).transpose(0, 1).double().cpu().numpy()
        for row, document in zip(rows, documents, strict=True):
            yield row[:, : len(document) - 1]

    def _of_pieces(self, hidden: torch.Tensor, labels: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        """float32 (positions,). Only a few rows of logits exist at a time: they are 600 KB each."""
        found = torch.zeros(len(hidden), device=hidden.device)
        head = self.model.model.lm_head.weight
        for piece in pieces:
            assert piece.index is not None
            for index in piece.index.to(hidden.device).split(ROWS_AT_ONCE):
                logits = torch.nn.functional.linear(hidden[index], head[piece.low : piece.high]).float()
                score = logits.gather(1, labels[index, None] - piece.low)[:, 0]
                if piece.illegal is not None:
                    logits.index_fill_(1, piece.illegal.to(hidden.device), -torch.inf)
                found[index] = logits.logsumexp(1) - score
        return found


def context_of(model: "LoadedModel") -> int:
    """Tokens of the longest document that fits the context: the last one is only a label."""
    return int(model.model.config.max_position_embeddings) + 1


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Documents by number, sorted by length, in batches of about TOKENS_AT_ONCE tokens, padding included."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[number] > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def class_sums(
    bench: "Bench", name: str, documents: Sequence[np.ndarray], slots: int, first: Sequence[int] | None = None
) -> np.ndarray:
    """float64 (documents, classes): the nats of each document's tokens from its `first` on (by default, all but the
    very first), by class, and by the softmax that the model was trained with (`bench.softmax`). No document may be
    longer than the context.

    RUN/evaluate/NAME.jsonl keeps them from batch to batch, so an interrupted suite goes on where it was.
    """
    scorer = Likelihood(bench.model, slots)
    table, classes = bench.model.space.class_table(), len(bench.model.space.class_names)
    key = [VERSION, bench.model.key, bench.softmax, slots]

    def check(sums: Any) -> list[float]:
        if len(sums) != classes:
            raise ValueError(f"{len(sums)} sums for {classes} classes")
        return list(map(float, sums))

    with Kept(Path(bench.recipe.run) / "evaluate" / f"{name}.jsonl", key, check) as kept:
        starts = [1] * len(documents) if first is None else first
        digests = [
            digest_of([d]) + (f" {start}" if start > 1 else "") for d, start in zip(documents, starts, strict=True)
        ]
        unknown = {digest: number for number, digest in reversed(list(enumerate(digests))) if digest not in kept.values}
        todo = list(unknown.values())
        for batch in track(list(batches([len(documents[i]) for i in todo])), name, console=console):
            chosen = [todo[i] for i in batch]
            scored = scorer.nats([documents[i] for i in chosen], [bench.softmax])
            for i, (nats,) in zip(chosen, scored, strict=True):
                some = table[documents[i][starts[i] :]]
                kept.add(digests[i], np.bincount(some, nats[starts[i] - 1 :], classes).tolist())
        return np.array([kept.values[digest] for digest in digests]).reshape(len(documents), classes)


def digest_of(documents: Sequence[np.ndarray]) -> str:
    """Of the ids of some documents, in order."""
    found = hashlib.sha256()
    for document in documents:
        found.update(len(document).to_bytes(8, "little") + np.asarray(document, "<i4").tobytes())
    return found.hexdigest()[:32]
