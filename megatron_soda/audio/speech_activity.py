"""Finds where speech begins and ends in a recording, with WebRTC's voice activity detector."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import soxr

from ..errors import SodaError
from .sound import BadAudio

RATE = 16000  # of the detector's samples
WINDOW = 480  # samples, 30 ms, per decision
RUN = 5  # consecutive windows that count as speech: a click makes up to four
MODE = 2  # from 0 (takes noise for speech) to 3 (takes faint speech for noise)
MARGIN = 0.2  # seconds kept before and after
LONGEST_HELD = 60.0  # seconds after speech that are held back, since there may be no more speech


def trim(blocks: Iterator[np.ndarray], sample_rate: int) -> Iterator[np.ndarray]:
    """Passes on float32 [samples] blocks of mono audio at `sample_rate` Hz from 0.2 s before the first speech to 0.2 s
    after the last. Pauses in between are kept. If more than a minute without speech follows the end, whole minutes of
    it are kept, because no more than a minute is held in memory.

    Raises BadAudio at the end if there was no speech, and SodaError if the package is missing.
    """
    vad = _detector()
    margin, run_samples = round(MARGIN * sample_rate), RUN * WINDOW * sample_rate // RATE
    to_rate = soxr.ResampleStream(sample_rate, RATE, 1, dtype="float32", quality="HQ")
    unheard = np.zeros(0, np.float32)  # at RATE, less than a window
    held = np.zeros(0, np.float32)
    first = 0  # the position of held[0] in the recording; windows and `spoken` also count from the recording's start
    windows = run = spoken = 0
    found = False
    for block in blocks:
        held = np.concatenate([held, block])
        unheard = np.concatenate([unheard, to_rate.resample_chunk(np.ascontiguousarray(block))])
        pcm = (np.clip(unheard, -1, 1) * 32767).astype(np.int16)
        for start in range(0, len(pcm) - WINDOW + 1, WINDOW):
            windows += 1
            run = run + 1 if vad.is_speech(pcm[start : start + WINDOW].tobytes(), RATE) else 0
            if run >= RUN:
                if not found:
                    begin = max(0, (windows - run) * WINDOW * sample_rate // RATE - margin)
                    held, first, found = held[max(0, begin - first) :], max(begin, first), True
                spoken = windows * WINDOW * sample_rate // RATE
        unheard = unheard[len(pcm) // WINDOW * WINDOW :]
        if not found:  # what may still turn out to be the margin, or the start of a run
            keep = first + len(held) - windows * WINDOW * sample_rate // RATE + run_samples + margin
            first, held = first + max(0, len(held) - keep), held[max(0, len(held) - keep) :]
            continue
        sure = spoken - first if len(held) < LONGEST_HELD * sample_rate else len(held)
        if sure > 0:
            yield held[:sure]
            held, first = held[sure:], first + min(sure, len(held))
    if not found:
        raise BadAudio("no speech")
    if (rest := spoken + margin - first) > 0:
        yield held[:rest]


def _detector() -> Any:
    try:
        import webrtcvad
    except ImportError:
        raise SodaError(
            "trimming to the speech needs the package webrtcvad: pip install megatron-soda[vad] (or turn it off)"
        ) from None
    return webrtcvad.Vad(MODE)
