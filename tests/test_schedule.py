import math
from itertools import pairwise

import pytest

from megatron_soda.training.schedule import learning_rate


def rates(count: int, **settings) -> list[float]:
    settings = {"schedule": "wsd", "steps": 100, "peak": 2.0, "warmup_share": 0.1, "decay_share": 0.2, **settings}
    return [learning_rate(i, **settings) for i in range(count)]


def test_warm_up_stable_decay():
    found = rates(101)
    assert found[0] == pytest.approx(0.2)
    assert found[9:80] == [2.0] * 71
    assert found[80] == pytest.approx(2.0 * 20 / 21)
    assert found[99] == pytest.approx(2.0 / 21)
    assert found[100] == 0
    steps = [b - a for a, b in pairwise(found[80:])]
    assert all(s == pytest.approx(-2.0 / 21) for s in steps)


def test_no_warm_up_no_decay():
    assert set(rates(100, warmup_share=0, decay_share=0)) == {2.0}


def test_cosine():
    found = rates(101, schedule="cosine")
    assert found[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert found[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(91)], abs=1e-12)
    assert all(b < a for a, b in pairwise(found[10:]))


def test_a_leg_that_branched_off():
    found = rates(101, schedule="decay", branched_at=60)[60:]
    assert found == pytest.approx([2.0 * (40 - i) / 41 for i in range(41)])
    # Another schedule counts its shares from the branch on.
    found = rates(101, branched_at=50)[50:]
    assert found[:5] == pytest.approx([2.0 * (i + 1) / 5 for i in range(5)])
    assert found[5:40] == [2.0] * 35
    assert found[40:] == pytest.approx([2.0 * (10 - i) / 11 for i in range(11)])
