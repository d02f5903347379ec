from itertools import pairwise

import pytest

from megatron_soda.training.schedule import learning_rate


def test_warm_up_stable_decay():
    rates = [learning_rate(i, steps=100, peak=2.0, warmup_share=0.1, decay_share=0.2) for i in range(101)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9:80] == [2.0] * 71
    assert rates[80] == pytest.approx(2.0 * 20 / 21)
    assert rates[99] == pytest.approx(2.0 / 21)
    assert rates[100] == 0
    steps = [b - a for a, b in pairwise(rates[80:])]
    assert all(s == pytest.approx(-2.0 / 21) for s in steps)


def test_no_warm_up_no_decay():
    assert {learning_rate(i, steps=10, peak=1.0, warmup_share=0, decay_share=0) for i in range(10)} == {1.0}
