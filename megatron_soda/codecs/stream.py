"""Sound while its codes are still being generated."""

import numpy as np

from .base import Codec


class SoundStream:
    """Turns codes into sound as they come. All that it returns, joined, is what `codec.decode` makes of all codes.

    codec.lookahead frames are held back, because they still change what is before them; with None, all are, until
    `finish`. A smaller `lookahead` gives sound earlier that is only nearly the same; it is faded over a frame from one
    piece into the next, so that nothing clicks.
    """

    def __init__(self, codec: Codec, lookahead: int | None = None) -> None:
        self._codec = codec
        self._held = codec.lookahead if lookahead is None else lookahead
        self._early = self._held is not None and (codec.lookahead is None or self._held < codec.lookahead)
        self._codes = np.zeros((0, codec.codebooks), np.int16)
        self._done = 0  # frames
        self._beyond = np.zeros(0, np.float32)  # what the last piece would have gone on with

    def push(self, codes: np.ndarray) -> np.ndarray:
        """Adds codes (frames, codebooks) -> float32 (samples,), the sound that is known by now, often none."""
        self._codes = np.concatenate([self._codes, codes.astype(np.int16)])
        return self._up_to(0 if self._held is None else len(self._codes) - self._held)

    def finish(self) -> np.ndarray:
        """The rest: float32 (samples,)."""
        return self._up_to(len(self._codes))

    def _up_to(self, end: int) -> np.ndarray:
        if end <= self._done:
            return np.zeros(0, np.float32)
        more = int(self._early and end < len(self._codes))
        wave = self._codec.decode_part(self._codes, self._done, end + more)
        faded = len(self._beyond)
        if faded:
            share = np.arange(faded, dtype=np.float32) / faded
            wave[:faded] = share * wave[:faded] + (1 - share) * self._beyond
        samples = (end - self._done) * self._codec.samples_per_frame
        self._done, self._beyond = end, wave[samples:]
        return wave[:samples]
