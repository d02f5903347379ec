"""Sound of generations while they are being sampled."""

from collections.abc import Callable

import numpy as np

from ..codecs.base import Codec
from ..codecs.stream import SoundStream
from ..vocab import TokenSpace

SHARE = 0.25  # of the frames heard so far: the length of the next piece


class Listener:
    """An `on_token` for `sample`: calls `hear(row, wave)` with each row's sound, float32 (samples,), as it is known.

    `given`: codes (frames, codebooks) of the prompt that the sound goes on from; they are heard, too. `lookahead`: see
    SoundStream. After sampling, `finish` gives the rest. A row's sound is its first span of audio.

    Pieces grow with what has been heard: most codecs decode a sound from its start, so a piece for every frame would
    cost the square of the length.
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
        self._waiting: dict[int, list[int]] = {}  # by row, the ids of the next piece
        self._heard: dict[int, int] = {}  # by row, frames that its stream has

    def __call__(self, row: int, token: int) -> None:
        if row in self._done:
            return
        if token == self._space.audio_end:
            self._finish(row)
        if token < self._space.audio_base:
            return
        waiting = self._waiting.setdefault(row, [])
        waiting.append(token)
        frames, part = divmod(len(waiting), self._space.codebooks)
        if not part and frames >= max(1, SHARE * self._heard.get(row, 0)):
            self._push(row)

    def finish(self) -> None:
        """Call it once after sampling, for rows that their limit cut off."""
        for row in sorted({*self._streams, *self._waiting} - self._done):
            self._finish(row)

    def _push(self, row: int) -> None:
        waiting, codebooks = self._waiting.pop(row, []), self._space.codebooks
        codes = self._space.codes(np.array(waiting[: len(waiting) // codebooks * codebooks], np.int64))
        if row not in self._streams:
            self._streams[row] = SoundStream(self._codec, self._lookahead)
            codes = codes if self._given is None else np.concatenate([self._given, codes])
        self._heard[row] = self._heard.get(row, 0) + len(codes)
        self._tell(row, self._streams[row].push(codes))

    def _finish(self, row: int) -> None:
        self._push(row)
        self._done.add(row)
        self._tell(row, self._streams.pop(row).finish())

    def _tell(self, row: int, wave: np.ndarray) -> None:
        if len(wave):
            self._hear(row, wave)
