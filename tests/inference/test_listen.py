"""Sound of generations while they are sampled: what is heard is what the codes of the result decode to."""

import numpy as np
import pytest

from megatron_soda.hf.load import load_model
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.listen import Listener
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.studio import generated_codes
from megatron_soda.inference.task import Prompt
from megatron_soda.vocab import TokenSpace
from tests.exported import HOP, FakeCodec


class Ahead(FakeCodec):
    lookahead = 2


@pytest.mark.parametrize("codec", [FakeCodec(), Ahead()])
def test_what_is_heard_is_the_result(exported, codec):
    s, model = exported.space, load_model(exported.folder)
    given = np.arange(8).reshape(2, 4)
    prompt = Prompt([s.bos, s.audio_start, *s.audio_ids(given).tolist()], {s.audio_end}, 42)
    heard: dict[int, list[np.ndarray]] = {row: [] for row in range(6)}
    frames: dict[int, list[int]] = {row: [] for row in range(6)}
    tokens = [0] * 6

    def hear(row: int, wave: np.ndarray) -> None:
        heard[row].append(wave)
        frames[row].append(tokens[row] // 4)

    listener = Listener(s, codec, hear, given)

    def told(row: int, token: int) -> None:
        tokens[row] += 1
        listener(row, token)

    rows = sample(Decoder(model.model), Constraint(s, model.device), [prompt], count=6, seed=4, on_token=told)
    listener.finish()
    for row, result in enumerate(rows):
        codes = generated_codes(result.ids, s)
        np.testing.assert_allclose(np.concatenate(heard[row]), codec.decode([codes])[0], atol=1e-6)
        if len(codes) > 2:  # the first sound after one frame: the prompt's two are known as well
            assert frames[row][0] == 1
            assert len(heard[row][0]) == (3 - codec.lookahead) * HOP
    lengths = [len(generated_codes(result.ids, s)) for result in rows]
    assert min(lengths) == 2  # one ends at once: only its prompt is heard
    assert max(lengths) > 3


def test_long_sounds_are_not_decoded_once_a_frame():
    """Most codecs decode from the start: what they decode in all must grow with the length, not with its square."""
    decoded: list[int] = []

    class Counting(FakeCodec):
        def decode_part(self, codes: np.ndarray, first: int, end: int) -> np.ndarray:
            decoded.append(end)
            return super().decode_part(codes, first, end)

    space = TokenSpace(text_size=30, bos=0, eos=2, codebooks=4, entries=16)
    codes, heard = np.random.default_rng(0).integers(0, 16, (400, 4)), []
    listener = Listener(space, Counting(), lambda row, wave: heard.append(wave))
    for token in [space.audio_start, *space.audio_ids(codes).tolist(), space.audio_end]:
        listener(0, token)
    listener.finish()
    np.testing.assert_array_equal(np.concatenate(heard), FakeCodec().decode([codes])[0])
    assert len(heard[0]) == HOP
    assert sum(decoded) < 6 * len(codes)
