"""Networks whose logits are a function of the tokens so far, to be scored like an exported model."""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch

from megatron_soda.vocab import TokenSpace
from tests.exported import CONTEXT


class Toy:
    """`logits`: the ids up to a position -> float (size,) of the next one. Never fits more than CONTEXT tokens."""

    def __init__(self, space: TokenSpace, logits: Callable[[list[int]], np.ndarray]) -> None:
        self.config = SimpleNamespace(max_position_embeddings=CONTEXT)
        self.lm_head = SimpleNamespace(weight=torch.eye(space.size))
        self.logits = logits

    def model(self, input_ids: torch.Tensor) -> SimpleNamespace:
        assert input_ids.shape[1] <= CONTEXT
        rows = [[self.logits(ids[: i + 1]) for i in range(len(ids))] for ids in input_ids.tolist()]
        return SimpleNamespace(last_hidden_state=torch.tensor(np.array(rows), dtype=torch.float32))
