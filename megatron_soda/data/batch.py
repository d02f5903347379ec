"""The one place that turns windows of ids into what the model and the loss take."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..errors import SodaError
from ..vocab import TokenSpace
from .windows import Window


@dataclass
class Batch:
    """A micro-batch. All tensors but `cu_seqlens` are (sequences, length)."""

    tokens: Tensor  # int64
    labels: Tensor  # int64: the next token
    loss_weight: Tensor  # float32, by the class of the label and its own weight; 0 where another window counts it
    class_id: Tensor  # int64: the class of the label
    segment_id: Tensor  # int64: counts documents inside a window; attention stays inside one
    position_id: Tensor  # int64: counts from the start of the window, or of the segment
    cu_seqlens: Tensor  # int32 (segments + 1,): where segments start in the flattened batch, and its end
    longest: int  # tokens of the longest segment


class Batcher:
    """Builds batches for one token space, on `device`: what goes there is the ids, and weights of labels if any.

    `class_weights` (classes,) multiplies the loss of each class. `reset_positions`: positions count from the start of
    each segment; SODA's own code counts from the start of the window.
    """

    def __init__(
        self,
        space: TokenSpace,
        class_weights: list[float] | None = None,
        reset_positions: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.eos = space.eos
        self.reset_positions = reset_positions
        self.classes = torch.from_numpy(space.class_table()).to(device)
        self.weights = torch.tensor(class_weights or [1.0] * len(space.class_names), dtype=torch.float32, device=device)

    def __call__(self, windows: list[Window]) -> Batch:
        """Windows of length + 1 ids each -> a Batch of (len(windows), length). SodaError for an id out of range."""
        ids = self._on_device(np.stack([window.ids for window in windows]))
        counts = self._on_device(np.array([window.count for window in windows]))
        try:
            tables = self.classes, self.weights, self.eos, self.reset_positions
            tensors = ops.build_batch(ids, counts, *tables, self._label_weights(windows))
        except ValueError as error:
            raise SodaError(
                f"a window of the store holds an id outside the vocabulary: {error}. "
                "It is damaged, or of another vocabulary; `soda validate` tells where."
            ) from None
        return Batch(*tensors, longest=int((tensors[-1][1:] - tensors[-1][:-1]).max()))

    def _label_weights(self, windows: list[Window]) -> Tensor | None:
        """float32 (windows, length); None if no window has weights of its own."""
        if all(window.weights is None for window in windows):
            return None
        ones = np.ones(len(windows[0].ids) - 1, np.float32)
        weights = [ones if window.weights is None else window.weights for window in windows]
        return self._on_device(np.stack(weights).astype(np.float32, copy=False))

    def _on_device(self, values: np.ndarray) -> Tensor:
        """A GPU copies from pinned memory while the host goes on."""
        host, device = torch.from_numpy(values), self.classes.device
        return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
