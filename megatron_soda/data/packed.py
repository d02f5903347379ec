"""Windows of whole documents, for fine-tuning: packed by best fit, with weights that leave out the prompts.

Document d has tokens 0 .. L - 1. Token 0 (BOS) is never a label: the end of one document does not predict the next.
The first `prompt_spans` spans are the prompt; the tokens after their last end marker, EOS included, are the response,
and only they have a loss weight. Bare text has no spans, so all of it counts.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from .. import ops
from ..errors import SodaError
from ..vocab import TokenSpace
from .store import Store
from .windows import Window, place_in_epoch

_NAMED = 5  # documents that a message names


@dataclass(frozen=True)
class Packed:
    """The shuffled, endless stream of windows that a store's documents are packed into, each document in one window.

    A window has length + 1 ids, so that is what a document may have; longer ones are in no window (`too_long`). Which
    documents share a window depends on their lengths alone and is the same in every epoch. Takes 16 bytes of memory a
    document. Raises SodaError if no document fits.
    """

    store: Store
    length: int
    seed: int
    prompt_spans: int = 0

    def __post_init__(self) -> None:
        if not self.count:
            raise SodaError(
                f"{self.store.path}: all of its {len(self.store)} documents are longer than data.sequence_length="
                f"{self.length} + 1 tokens; the shortest has {int(self.lengths.min())}. Raise data.sequence_length."
            )

    @property
    def count(self) -> int:
        """Windows per epoch."""
        return len(self._bins[1]) - 1

    @cached_property
    def too_long(self) -> np.ndarray:
        """int64: the numbers of the documents that do not fit."""
        return np.flatnonzero(self.lengths > self.length + 1)

    @property
    def fill(self) -> float:
        """The share of the windows' ids that are documents."""
        return float(self.lengths[self._bins[0]].sum()) / (self.count * (self.length + 1))

    def __getitem__(self, sample: int) -> Window:
        """The window that is sample `sample`, counted from the start of training."""
        order, offsets = self._bins
        window = place_in_epoch(sample, self.count, self.seed)
        ids = np.full(self.length + 1, self.store.space.bos, np.int32)
        weights = np.zeros(self.length, np.float32)
        start = 0
        for number in order[offsets[window] : offsets[window + 1]].tolist():
            document = self.store.document(number)
            end = start + len(document)
            ids[start:end] = document
            response = start + response_start(document, self.store.space, self.prompt_spans)
            weights[response - 1 : end - 1] = 1.0  # token t is the label of position t - 1
            start = end
        return Window(ids, max(0, start - 1), weights)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 (documents,)"""
        self.store.check_index()
        return np.diff(self.store.offsets(0, len(self.store)))

    @cached_property
    def _bins(self) -> tuple[np.ndarray, np.ndarray]:
        """Documents by window, and where in them each window begins, with an end."""
        fits = np.flatnonzero(self.lengths <= self.length + 1)
        order, offsets = ops.best_fit(torch.from_numpy(self.lengths[fits]), self.length + 1)
        return fits[order.numpy()], offsets.numpy()


def response_start(document: np.ndarray, space: TokenSpace, prompt_spans: int) -> int:
    """The first token of the response: 1, after BOS, if there is no prompt. Raises ValueError if nothing follows the
    prompt's spans."""
    ends = np.flatnonzero((document == space.text_end) | (document == space.audio_end))
    if not prompt_spans or not len(ends):
        return 1
    if len(ends) <= prompt_spans:
        raise ValueError(f"the document has {len(ends)} spans, and a prompt of {prompt_spans}: nothing is left")
    return int(ends[prompt_spans - 1]) + 1


def without_response(store: Store, prompt_spans: int, length: int) -> str:
    """Which documents have no span after the prompt's; empty: none. Reads the whole store. Those that are longer than a
    window of `length` tokens do not matter: they are left out."""
    if not prompt_spans:
        return ""
    store.check_index()
    wrong: list[int] = []
    for first, ids, offsets in store.parts():
        ends = (ids == store.space.text_end) | (ids == store.space.audio_end)
        spans = np.add.reduceat(ends, offsets[:-1], dtype=np.int64)
        fits = np.diff(offsets) <= length + 1
        wrong += (first + np.flatnonzero(fits & (spans > 0) & (spans <= prompt_spans))).tolist()
    if not wrong:
        return ""
    return (
        f"{store.path}: {len(wrong):,} of {len(store):,} documents have no span after the {prompt_spans} of "
        f"data.prompt_spans, so nothing of them would be learned: {name_documents(wrong)} (soda inspect {store.path} "
        f"--document {wrong[0]}). Lower data.prompt_spans, or prepare documents with a response."
    )


def name_documents(documents: list[int]) -> str:
    """ "document 3", "documents 3, 7 and 12 more"."""
    more = f" and {len(documents) - _NAMED:,} more" if len(documents) > _NAMED else ""
    return f"document{'s'[: len(documents) - 1]} {', '.join(map(str, documents[:_NAMED]))}{more}"
