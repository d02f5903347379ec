"""Sound in pieces is the sound of the whole, for every codec."""

from itertools import pairwise

import numpy as np
import pytest

from megatron_soda.codecs.base import Codec
from megatron_soda.codecs.stream import SoundStream
from tests.codecs.test_codecs import (  # noqa: F401  fixtures
    codec,
    dac_folder,
    encodec_folder,
    mimi_folder,
    one_thread,
    shipped,
    tiny_encodec,
    tiny_mimi,
    voice,
)


def streamed(codec: Codec, codes: np.ndarray, cuts: list[int], lookahead: int | None = None) -> list[np.ndarray]:  # noqa: F811
    stream = SoundStream(codec, lookahead)
    edges = [0, *cuts, len(codes)]
    return [*(stream.push(codes[a:b]) for a, b in pairwise(edges)), stream.finish()]


@pytest.mark.parametrize("seed", range(3))
def test_pieces_of_any_size_are_the_whole(codec, seed):  # noqa: F811
    """To less than half a step of 16 bits of full scale; torch rounds otherwise for other shapes."""
    rng = np.random.default_rng(seed)
    (codes,) = codec.encode([voice(3.0, seed)])
    codes = codes[: 30 + seed]
    (whole,) = codec.decode([codes])
    cuts = sorted(rng.integers(0, len(codes), 8).tolist()) if seed else list(range(1, len(codes)))
    joined = np.concatenate(streamed(codec, codes, cuts))
    assert joined.shape == whole.shape
    peak = np.abs(whole).max()  # random weights can be far over full scale
    assert np.abs(joined - whole).max() < max(1, peak) * 0.5 / 32768
    assert peak > 50 / 32768


def test_sound_comes_as_soon_as_it_is_known(codec):  # noqa: F811
    codes = np.random.default_rng(0).integers(0, codec.entries, (40, codec.codebooks))
    known = [len(wave) / codec.samples_per_frame for wave in streamed(codec, codes, list(range(1, 40)))]
    assert codec.lookahead == {"embedded": 5, "mimi": 0, "encodec": 6}.get(codec.name, codec.lookahead)
    assert known == [0] * codec.lookahead + [1] * (40 - codec.lookahead) + [codec.lookahead]


def test_a_frame_changes_nothing_further_back_than_the_lookahead(codec):  # noqa: F811
    """And it changes something that far, or sound could come earlier. The last frame of DAC's is too faint to see."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, codec.entries, (40, codec.codebooks)).astype(np.int16)
    other = codes.copy()
    place = 30 if codec.name != "encodec" else 6  # EnCodec looks ahead at the start alone
    other[place:] = rng.integers(0, codec.entries, other[place:].shape)
    (a,), (b,) = codec.decode([codes]), codec.decode([other])
    changed = int(np.flatnonzero(a != b)[0]) // codec.samples_per_frame
    assert changed == max(0, place - codec.lookahead + (codec.name == "dac"))


def test_what_looks_both_ways_waits_for_the_end(tmp_path):
    from megatron_soda.codecs import load_codec

    tiny_encodec(use_causal_conv=False).save_pretrained(tmp_path)
    both = load_codec("encodec", tmp_path)
    codes = np.random.default_rng(0).integers(0, 64, (20, 8))
    waves = streamed(both, codes, [5, 10])
    assert both.lookahead is None
    assert [len(wave) for wave in waves] == [0, 0, 0, 20 * 320]
    np.testing.assert_array_equal(waves[-1], both.decode([codes])[0])


def test_earlier_sound_is_nearly_the_same(shipped):  # noqa: F811
    """First sound after three frames, and steps between samples are those of the whole: nothing clicks."""
    (codes,) = shipped.encode([voice(4.0, 3)])
    (whole,) = shipped.decode([codes])
    waves = streamed(shipped, codes, list(range(1, len(codes))), lookahead=2)
    assert [len(wave) for wave in waves[:4]] == [0, 0, 1920, 1920]
    joined = np.concatenate(waves)
    assert joined.shape == whole.shape
    error = joined - whole
    assert 10 * np.log10(np.square(whole).mean() / np.square(error).mean()) > 30  # dB
    at_joins = np.abs(np.diff(error)).reshape(-1)[1919::1920]
    assert at_joins.max() <= np.abs(np.diff(error)).max() / 2
