"""Sound of generations while they are sampled: what is heard is what the codes of the result decode to."""

import numpy as np
import pytest

from megatron_soda.hf.load import load_model
from megatron_soda.inference.decoder import Decoder
from megatron_soda.inference.listen import Listener
from megatron_soda.inference.sample import Constraint, sample
from megatron_soda.inference.studio import generated_codes
from megatron_soda.inference.task import Prompt
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
