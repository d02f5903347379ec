import math
from itertools import pairwise

import pytest

from megatron_soda.training.schedule import learning_rate, rate_at, stable_steps


def rates(count: int, **settings) -> list[float]:
    settings = {"schedule": "wsd", "steps": 100, "peak": 2.0, "warmup_share": 0.1, "decay_share": 0.2, **settings}
    return [learning_rate(i, **settings) for i in range(count)]


def test_warm_up_stable_decay():
    found = rates(101)
    assert found[:11] == pytest.approx([0.2 * i for i in range(11)])  # the first step does not move
    assert found[10:81] == [2.0] * 71
    assert found[80:] == pytest.approx([2.0 * (20 - i) / 20 for i in range(21)])


def test_shares_are_cut_to_whole_steps():
    """Not rounded: 238,419 steps have 23,841 of warm-up and 47,683 of decay, where rounding gave 23,842 and 47,684."""
    of = {"steps": 238_419, "schedule": "wsd", "peak": 1.0, "warmup_share": 0.1, "decay_share": 0.2}
    assert learning_rate(23_840, **of) == pytest.approx(23_840 / 23_841, rel=1e-12)
    assert learning_rate(23_841, **of) == 1.0
    assert learning_rate(238_419 - 47_683, **of) == 1.0
    assert learning_rate(238_419 - 47_682, **of) == pytest.approx(47_682 / 47_683, rel=1e-12)
    assert rates(4, steps=4) == [2.0] * 4  # less than a step is none


def piecewise(step: int, pieces: list[tuple[int, float, float]]) -> float:
    """The definition of the authors' library: linear pieces (length, from, to) one after the other, each counting its
    own steps from 0."""
    for length, start, end in pieces:
        if step < length:
            return start + (end - start) * step / length
        step -= length
    return pieces[-1][2]


@pytest.mark.parametrize(("steps", "up", "down"), [(100, 10, 20), (37, 3, 7), (11, 1, 2), (9, 0, 1), (900, 90, 180)])
def test_against_the_pieces_it_is_made_of(steps, up, down):
    pieces = [(up, 0.0, 2.0), (steps - up - down, 2.0, 2.0), (down, 2.0, 0.0)]
    assert rates(steps + 1, steps=steps) == pytest.approx([piecewise(i, pieces) for i in range(steps + 1)])


def test_no_warm_up_no_decay():
    assert set(rates(100, warmup_share=0, decay_share=0)) == {2.0}


def test_cosine():
    found = rates(101, schedule="cosine")
    assert found[:10] == pytest.approx([0.2 * i for i in range(10)])
    assert found[10:] == pytest.approx([1 + math.cos(math.pi * i / 90) for i in range(91)], abs=1e-12)
    assert all(b < a for a, b in pairwise(found[10:]))


def test_a_cosine_that_ends_above_0():
    """As in optax's cosine_decay_schedule with alpha."""
    found = rates(101, schedule="cosine", final_share=0.1)
    assert found[:10] == pytest.approx([0.2 * i for i in range(10)])
    assert found[10:] == pytest.approx([0.2 + 0.9 * (1 + math.cos(math.pi * i / 90)) for i in range(91)])
    assert (found[10], found[55], found[100]) == pytest.approx((2.0, 1.1, 0.2))


def test_checkpoints_of_earlier_versions_ended_at_0():
    settings = {"schedule": "cosine", "steps": 100, "learning_rate": 2.0, "warmup_share": 0.1, "decay_share": 0.2}
    assert rate_at(100, settings) == pytest.approx(0.0)
    assert rate_at(100, {**settings, "final_share": 0.1}) == pytest.approx(0.2)


def test_a_leg_that_branched_off():
    found = rates(101, schedule="decay", branched_at=60)[60:]
    assert found == pytest.approx([2.0 * (40 - i) / 40 for i in range(41)])
    # Another schedule counts its shares from the branch on.
    found = rates(101, branched_at=50)[50:]
    assert found[:5] == pytest.approx([2.0 * i / 5 for i in range(5)])
    assert found[5:41] == [2.0] * 36
    assert found[40:] == pytest.approx([2.0 * (10 - i) / 10 for i in range(11)])


@pytest.mark.parametrize("branched_at", [0, 40])
def test_stable_steps_are_those_at_the_peak(branched_at):
    settings = {"schedule": "wsd", "steps": 140, "learning_rate": 2.0, "warmup_share": 0.1, "decay_share": 0.2}
    last_rates = {s: rate_at(s - 1, settings, branched_at) for s in range(branched_at + 1, 141)}
    assert [s for s, rate in last_rates.items() if rate == 2.0] == list(stable_steps(settings, branched_at))
    assert not stable_steps({**settings, "schedule": "cosine"})
    assert not stable_steps({**settings, "schedule": "decay"}, 40)
