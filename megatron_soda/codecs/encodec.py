"""EnCodec (Défossez et al., "High Fidelity Neural Audio Compression", 2022) through transformers' EncodecModel."""

import math
from typing import Any, ClassVar

from torch import Tensor
from transformers import EncodecModel

from ..errors import SodaError
from .hub import HubCodec


class EncodecCodec(HubCodec):
    """A `Codec` that uses the first `codebooks` codebooks of a mono EnCodec model, by default 8 (6 kbps).

    The 24 kHz model has 75 frames per second and 32 codebooks of 1,024 entries; 2 to 32 of them give 1.5 to 24 kbps.

    `chunk_length_s` in the configuration is ignored, so a wave's codes never depend on where chunks begin. Stereo
    models are refused, and so are models that normalise loudness, which would have to be stored with the codes.

    The encoder only looks back, except that it pads by reflection on the left, so a wave's first frames depend on some
    later ones (in the 24 kHz model, on the first 7). Waves with at least that many frames can be padded with silence;
    shorter ones are encoded alone.
    """

    name: str = "encodec"
    title: ClassVar[str] = "EnCodec"
    model_class: ClassVar[Any] = EncodecModel
    default_codebooks: ClassVar[int | None] = 8

    def _prepare(self, model: str) -> None:
        config = self._model.config
        if config.audio_channels != 1 or config.normalize:
            what = "normalises loudness" if config.audio_channels == 1 else f"has {config.audio_channels} channels"
            raise SodaError(
                f"codec: {model} is an EnCodec model that {what}; use a mono model that does not, such as "
                "facebook/encodec_24khz."
            )
        config.chunk_length_s = config.overlap = None

    def _available(self) -> int:
        return self._codebooks_of(max(self._model.config.target_bandwidths))

    def _codebooks_of(self, bandwidth: float) -> int:
        quantizer = self._model.quantizer
        return min(quantizer.get_num_quantizers_for_bandwidth(bandwidth), len(quantizer.layers))

    def _stride(self) -> int:
        return math.prod(self._model.config.upsampling_ratios)

    def _shortest_padded(self) -> int | None:
        config = self._model.config
        if not config.use_causal_conv or config.norm_type != "weight_norm":
            return None
        if config.pad_mode != "reflect":
            return 1 if config.pad_mode in ("constant", "replicate") else None
        # Reflecting n steps needs n + 1 of them; if the wave has fewer, the library uses zeros instead.
        shortest, steps = 1, self._stride()
        for layer in self._model.encoder.modules():
            if hasattr(layer, "padding_total"):
                shortest = max(shortest, int(layer.padding_total) // steps + 1)
                steps //= int(layer.stride)
        return shortest

    def _lookahead(self) -> int | None:
        """The decoder only looks back, but the first layer pads the start by reflection, as the encoder does."""
        config = self._model.config
        if not config.use_causal_conv or config.norm_type != "weight_norm" or config.trim_right_ratio != 1.0:
            return None
        return config.kernel_size - 1 if config.pad_mode == "reflect" else 0

    def _codes(self, waves: Tensor) -> Tensor:
        enough = [b for b in self._model.config.target_bandwidths if self._codebooks_of(b) >= self.codebooks]
        return self._model.encode(waves, bandwidth=min(enough)).audio_codes[0]

    def _audio(self, codes: Tensor) -> Tensor:
        return self._model.decode(codes[None], [None]).audio_values
