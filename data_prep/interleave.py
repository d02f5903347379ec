"""Documents out of utterances, exactly as SODA writes them (paper, section 2).

text-first    BOS (TEXT_START text TEXT_END AUDIO_START audio AUDIO_END)+ EOS
audio-first   BOS (AUDIO_START audio AUDIO_END TEXT_START text TEXT_END)+ EOS
text-only     BOS text EOS
"""

from collections.abc import Iterable

import numpy as np

from megatron_soda.vocab import TokenSpace

Utterances = Iterable[tuple[list[int], np.ndarray]]  # text ids, codes (frames, codebooks)


def text_first(utterances: Utterances, space: TokenSpace) -> np.ndarray:
    return _document([part for text, codes in utterances for part in (_text(text, space), _audio(codes, space))], space)


def audio_first(utterances: Utterances, space: TokenSpace) -> np.ndarray:
    return _document([part for text, codes in utterances for part in (_audio(codes, space), _text(text, space))], space)


def text_only(text: list[int], space: TokenSpace) -> np.ndarray:
    return _document([np.array(text, np.int32)], space)


def _text(text: list[int], space: TokenSpace) -> np.ndarray:
    return np.array([space.text_start, *text, space.text_end], np.int32)


def _audio(codes: np.ndarray, space: TokenSpace) -> np.ndarray:
    ends = np.array([space.audio_start], np.int32), np.array([space.audio_end], np.int32)
    return np.concatenate([ends[0], space.audio_ids(codes), ends[1]])


def _document(parts: list[np.ndarray], space: TokenSpace) -> np.ndarray:
    return np.concatenate([np.array([space.bos], np.int32), *parts, np.array([space.eos], np.int32)])
