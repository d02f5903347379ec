"""DAC (Kumar et al., "High-Fidelity Audio Compression with Improved RVQGAN", 2023) through transformers' DacModel."""

import math
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import DacModel

from .hub import HubCodec, Piece

WINDOW_SECONDS = 2.0


class DacCodec(HubCodec):
    """A `Codec` that uses the first `codebooks` codebooks of a DAC model, by default all. For 16, 24 and 44.1 kHz
    models.

    transformers' `encode` does not pad and drops an incomplete last frame; here silence fills it.

    The encoder's convolutions look both ways, so silence after a wave would change its last frames. In batches, a wave
    is cut into two-second windows that overlap by as much as a frame's code depends on (8 frames in the 24 kHz model);
    windows at either end of the wave stop there. A wave shorter than a window is encoded alone.
    """

    name: str = "dac"
    title: ClassVar[str] = "DAC"
    model_class: ClassVar[Any] = DacModel

    def _available(self) -> int:
        return self._model.config.n_codebooks

    def _stride(self) -> int:
        return math.prod(self._model.config.downsampling_ratios)

    def _context(self) -> int:
        """The number of frames before and after a frame that can change its codes; sound further away has no effect."""
        # In samples from a frame's first; the modules are in calling order.
        before, after, step = 0, 0, 1
        for layer in self._model.encoder.modules():
            if isinstance(layer, nn.Conv1d):
                padding = int(layer.padding[0])
                before += padding * step
                after += ((layer.kernel_size[0] - 1) * layer.dilation[0] - padding) * step
                step *= layer.stride[0]
        return max(math.ceil(before / self.samples_per_frame), after // self.samples_per_frame)

    def _lookahead(self) -> int | None:
        latest = self.samples_per_frame - 1  # what the last sample of frame 0 depends on, from the last layer back
        for layer in reversed(list(self._model.decoder.modules())):
            if isinstance(layer, nn.ConvTranspose1d):
                latest = (latest + int(layer.padding[0])) // layer.stride[0]
            elif isinstance(layer, nn.Conv1d):
                latest += (layer.kernel_size[0] - 1) * layer.dilation[0] - int(layer.padding[0])
        return latest

    def _batch_pieces(self, wave: int, frames: int) -> list[Piece]:
        context = self._context()
        window = max(round(WINDOW_SECONDS * self.sample_rate / self.samples_per_frame), 4 * context)
        if frames < window:
            return [Piece(wave, 0, frames, 1, slice(0, frames))]
        pieces: list[Piece] = []
        done = 0
        while done < frames:
            start = min(max(done - context, 0), frames - window)
            end = frames if start + window == frames else start + window - context
            pieces.append(Piece(wave, start, window, self._rows(window), slice(done - start, end - start)))
            done = end
        return pieces

    def _codes(self, waves: Tensor) -> Tensor:
        return self._model.encode(waves, n_quantizers=self.codebooks).audio_codes

    def _audio(self, codes: Tensor) -> Tensor:
        return self._model.decode(audio_codes=codes).audio_values
