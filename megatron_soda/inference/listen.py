"""Sound of generations while they are being sampled."""

from collections.abc import Callable

import numpy as np

from ..codecs.base import Codec
from ..codecs.stream import SoundStream
from ..vocab import TokenSpace


class Listener:
    """An `on_token` for `sample`: calls `hear(row, wave)` with each row's sound, float32 (samples,), as it is known.

    `given`: codes (frames, codebooks) of the prompt that the sound goes on from; they are heard, too. `lookahead`: see
    SoundStream. After sampling, `finish` gives the rest. A row's sound is its first span of audio.
    """

    def __init__(
        self,
        space: TokenSpace,
        codec: Codec,
        hear: Callable[[int, np.ndarray], None],
        given: np.ndarray | None = None,
        lookahead: int | None = None,
    ) -> None:
        self._space, self._codec, self._hear, self._given, self._lookahead = space, codec, hear, given, lookahead
        self._streams: dict[int, SoundStream] = {}
        self._done: set[int] = set()
        self._frames: dict[int, list[int]] = {}  # by row, the ids of a frame that has begun

    def __call__(self, row: int, token: int) -> None:
        if row in self._done:
            return
        if token == self._space.audio_end:
            self._push(row, np.zeros((0, self._space.codebooks), np.int16))
            self._finish(row)
        if token < self._space.audio_base:
            return
        frame = self._frames.setdefault(row, [])
        frame.append(token)
        if len(frame) == self._space.codebooks:
            self._push(row, self._space.codes(np.array(frame)))
            frame.clear()

    def finish(self) -> None:
        """Call it once after sampling, for rows that their limit cut off."""
        for row in list(self._streams):
            self._finish(row)

    def _push(self, row: int, codes: np.ndarray) -> None:
        if row not in self._streams:
            self._streams[row] = SoundStream(self._codec, self._lookahead)
            codes = codes if self._given is None else np.concatenate([self._given, codes])
        self._tell(row, self._streams[row].push(codes))

    def _finish(self, row: int) -> None:
        self._done.add(row)
        self._tell(row, self._streams.pop(row).finish())

    def _tell(self, row: int, wave: np.ndarray) -> None:
        if len(wave):
            self._hear(row, wave)
