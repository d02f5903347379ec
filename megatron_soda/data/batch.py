"""The one place that turns windows of ids into what the model and the loss take."""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..errors import SodaError
from ..vocab import TokenSpace
from .windows import Window


@dataclass
class Batch:
    """A micro-batch. All but `cu_seqlens` are (sequences, length)."""

    tokens: Tensor  # int64
    labels: Tensor  # int64: the next token
    loss_weight: Tensor  # float32, by the class of the label; 0 for labels that another window counts
    class_id: Tensor  # int64: the class of the label
    segment_id: Tensor  # int64: counts documents inside a window; attention stays inside one
    position_id: Tensor  # int64: counts from the start of the window, or of the segment
    cu_seqlens: Tensor  # int32 (segments + 1,): where segments start in the flattened batch, and its end

    def to(self, device: torch.device) -> "Batch":
        return Batch(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


class Batcher:
    """Builds batches for one token space.

    `class_weights` (classes,) multiplies the loss of each class. `reset_positions`: positions count from the start of
    each segment; SODA's own code counts from the start of the window.
    """

    def __init__(
        self, space: TokenSpace, class_weights: list[float] | None = None, reset_positions: bool = False
    ) -> None:
        self.eos = space.eos
        self.reset_positions = reset_positions
        self.classes = torch.from_numpy(space.class_table().astype(np.int64))
        self.weights = torch.tensor(class_weights or [1.0] * len(space.class_names), dtype=torch.float32)

    def __call__(self, windows: list[Window]) -> Batch:
        """Windows of length + 1 ids each -> a Batch of (len(windows), length). SodaError for an id out of range."""
        ids = torch.from_numpy(np.stack([window.ids for window in windows]).astype(np.int64))
        if ids.min() < 0 or ids.max() >= len(self.classes):
            raise SodaError(
                f"the store holds an id outside [0, {len(self.classes)}): {ids.min()} to {ids.max()} in one window. "
                "It is damaged, or of another vocabulary; `soda validate` tells where."
            )
        tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        sequences, length = tokens.shape
        breaks = torch.zeros_like(tokens)
        breaks[:, 1:] = tokens[:, :-1] == self.eos  # a segment starts after EOS
        class_id = self.classes[labels]
        starts = breaks.bool()
        starts[:, 0] = True
        position = torch.arange(length).expand(sequences, length)
        counts = torch.tensor([[window.count] for window in windows])
        return Batch(
            tokens=tokens,
            labels=labels,
            loss_weight=self.weights[class_id].masked_fill_(position >= counts, 0.0),
            class_id=class_id,
            segment_id=breaks.cumsum(1),
            position_id=(position - (position * starts).cummax(1)[0]) if self.reset_positions else position.clone(),
            cu_seqlens=torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([tokens.numel()])]).int(),
        )
