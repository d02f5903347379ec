"""The interface of all codecs: waveforms to frame-major codes and back."""

from typing import Protocol

import numpy as np


class Codec(Protocol):
    """A neural or learned audio codec with residual codebooks, at a fixed rate of frames.

    Codebook 0 is called semantic, the others acoustic (paper, section on tokenization).
    """

    name: str
    sample_rate: int  # Hz
    samples_per_frame: int  # samples per frame; frame rate = sample_rate / samples_per_frame
    codebooks: int
    entries: int  # per codebook
    fingerprint: str  # changes whenever the same audio could give different codes
    lookahead: int | None  # the sound of a frame depends on so many frames after it; None: on all of them

    def encode(self, waves: list[np.ndarray]) -> list[np.ndarray]:
        """Mono float32 waves in [-1, 1] at `sample_rate` -> int16 codes (frames, codebooks) each, frames = ceil(samples
        / samples_per_frame). A wave gets the same codes in a list as alone."""
        ...

    def decode(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        """Codes (frames, codebooks) -> mono float32 waves of frames * samples_per_frame samples each."""
        ...

    def decode_part(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
        """The samples of frames [first, end) of what `decode` makes of one wave's codes, up to rounding."""
        ...
