"""Mimi (Défossez et al., "Moshi", 2024) through transformers' MimiModel: the codec of the SODA models."""

from typing import Any, ClassVar

from torch import Tensor
from transformers import MimiModel

from .hub import HubCodec


class MimiCodec(HubCodec):
    """A `Codec` that uses the first `codebooks` codebooks of a Mimi model, by default 8. 24 kHz, 12.5 frames per
    second.

    The encoder only looks back: its convolutions are zero-padded on the left, and its attention covers the last 250
    steps of 40 ms. So silence after a wave of whole frames does not affect the wave, and no padding mask is needed;
    with one, batches in transformers differ from their members (transformers#43377). A wave longer than the window
    needs no chunking.
    """

    name: str = "mimi"
    title: ClassVar[str] = "Mimi"
    model_class: ClassVar[Any] = MimiModel
    default_codebooks: ClassVar[int | None] = 8

    def _available(self) -> int:
        return self._model.config.num_quantizers

    def _stride(self) -> int:
        return round(self._model.config.sampling_rate / self._model.config.frame_rate)

    def _shortest_padded(self) -> int | None:
        config = self._model.config
        return 1 if config.use_causal_conv and config.pad_mode in ("constant", "replicate") else None

    def _lookahead(self) -> int | None:
        return 0 if self._model.config.use_causal_conv and self._model.config.trim_right_ratio == 1.0 else None

    def _codes(self, waves: Tensor) -> Tensor:
        wanted = max(self.codebooks, self._model.config.num_semantic_quantizers)  # the model refuses fewer
        return self._model.encode(waves, num_quantizers=wanted).audio_codes

    def _audio(self, codes: Tensor) -> Tensor:
        return self._model.decode(codes).audio_values
