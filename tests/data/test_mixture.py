import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_soda.data.mixture import _PERIOD, Mixture, Stage
from megatron_soda.data.store import Store, write_store
from megatron_soda.data.windows import Windows
from megatron_soda.errors import SodaError
from megatron_soda.vocab import TokenSpace
from tests.helpers import SPACE, documents

MULTILINGUAL = [0.3557, 0.0738, 0.0350, 0.0232, 0.00097, 0.00078, 0.00059, 0.00050]  # hours of speech by language


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Eight stores, a to h, of different sizes."""
    folder = tmp_path_factory.mktemp("stores")
    for i, name in enumerate("abcdefgh"):
        write_store(folder / name, documents(5 + i, seed=i), SPACE)
    return {name: Windows(Store(folder / name), 16, seed=1) for name in "abcdefgh"}


def shares_of(weights) -> dict[str, float]:
    total = math.fsum(weights)
    return {name: weight / total for name, weight in zip("abcdefgh", weights, strict=False)}


def weights(smallest: int = 1, largest: int = 6):
    """Shares of some corpora: even ones, and such as differ by orders of magnitude."""
    weight = st.one_of(st.floats(0.001, 1), st.floats(0, 1), st.sampled_from([0.0, 1e-7, 0.25, 1.0]))
    return st.lists(weight, min_size=smallest, max_size=largest).filter(lambda w: math.fsum(w) > 1e-3)


@st.composite
def stage_lists(draw):
    firsts = [0, *sorted(draw(st.sets(st.integers(1, 3000), max_size=3)))]
    return [Stage(first, shares_of(draw(weights()))) for first in firsts]


def mixture(stores, stages, **branch) -> Mixture:
    names = {name for stage in stages for name in stage.shares}
    return Mixture({name: stores[name] for name in sorted(names)}, stages, **branch)


def test_one_corpus_is_itself(stores):
    mix = mixture(stores, [Stage(0, {"a": 1.0})])
    for sample in (0, 1, 77, _PERIOD - 1, _PERIOD, 5 * _PERIOD + 3):
        assert mix.locate(sample) == ("a", sample)
        assert mix.consumed(sample) == {"a": sample}
        assert np.array_equal(mix[sample].ids, stores["a"][sample].ids)
    assert mix.length == 16


@given(stage_lists())
@settings(max_examples=40)
def test_every_corpus_is_used_in_its_order(stores, stages):
    """Through all changes of the shares nothing is lost, nothing comes twice, and `consumed` tells how much is used."""
    mix = mixture(stores, stages)
    used = dict.fromkeys(mix.corpora, 0)
    firsts = [stage.first_sample for stage in stages]
    for sample in range(4000):
        if sample % 397 == 0 or sample in firsts:
            assert mix.consumed(sample) == used
        name, index = mix.locate(sample)
        assert index == used[name]
        stage = stages[int(np.searchsorted(firsts, sample, side="right")) - 1]
        assert stage.shares.get(name, 0) > 0
        used[name] += 1
    assert mix.consumed(4000) == used


def test_order_against_a_plain_sort(stores):
    """Runs go on with the same samples in later versions, too, so the order is what it is said to be, to the sample."""
    quotas = {"a": 40_009, "b": 20_011, "c": _PERIOD - 60_020}
    mix = mixture(stores, [Stage(3, {name: quota / _PERIOD for name, quota in quotas.items()})], start=3)
    order = sorted((Fraction(2 * j + 1, 2 * q), name, j) for name, q in quotas.items() for j in range(q))
    assert [mix.locate(3 + place) for place in range(_PERIOD)] == [(name, j) for _, name, j in order]


def test_order_goes_on_from_period_to_period(stores):
    mix = mixture(stores, [Stage(0, shares_of(MULTILINGUAL)), Stage(100_000, shares_of([1, 2, 3]))])
    used = dict.fromkeys(mix.corpora, 0)
    for sample in range(100_000 + _PERIOD + 10):
        name, index = mix.locate(sample)
        assert index == used[name]
        used[name] += 1
    assert mix.consumed(100_000 + _PERIOD + 10) == used


def check_shares(mix: Mixture, shares: dict[str, float]) -> None:
    """Within 0.1 % absolute in the first 10,000 samples and any longer prefix, and within a few samples in all."""
    names = list(shares)
    drawn = np.array([names.index(mix.locate(sample)[0]) for sample in range(30_000)])
    samples = np.arange(1, len(drawn) + 1)
    for i, name in enumerate(names):
        counts = np.cumsum(drawn == i)
        off = np.abs(counts - shares[name] * samples)
        assert (off[9_999:] / samples[9_999:]).max() < 0.001, (name, shares)
        assert off.max() < 3 + len(shares), (name, shares)


@given(weights())
@settings(max_examples=12)
def test_shares_are_met(stores, drawn):
    shares = shares_of(drawn)
    check_shares(mixture(stores, [Stage(0, shares)]), shares)


def test_shares_of_many_languages_are_met(stores):
    shares = shares_of(MULTILINGUAL)
    mix = mixture(stores, [Stage(0, shares)])
    check_shares(mix, shares)
    counts = mix.consumed(_PERIOD)
    assert sum(counts.values()) == _PERIOD
    for name, share in shares.items():
        assert abs(counts[name] - share * _PERIOD) <= 1


def test_a_tiny_share_is_not_lost(stores):
    counts = mixture(stores, [Stage(0, {"a": 1 - 1e-9, "b": 1e-9, "c": 0.0})]).consumed(_PERIOD)
    assert counts == {"a": _PERIOD - 1, "b": 1, "c": 0}


def test_samples_do_not_depend_on_the_order_of_keys(stores):
    shares = shares_of([1, 1, 1])
    backwards = dict(reversed(shares.items()))
    one = Mixture({name: stores[name] for name in "abc"}, [Stage(0, shares)])
    other = Mixture({name: stores[name] for name in "cba"}, [Stage(0, backwards)])
    assert [one.locate(i) for i in range(50)] == [other.locate(i) for i in range(50)]


@given(stage_lists(), st.integers(0, 4000))
@settings(max_examples=40)
def test_a_branch_with_the_same_mix_goes_on_as_the_run_did(stores, stages, start):
    trunk = mixture(stores, stages)
    branch = mixture(stores, stages, start=start, consumed=trunk.consumed(start))
    assert branch.consumed(start) == trunk.consumed(start)
    for sample in range(start, start + 1500):
        assert branch.locate(sample) == trunk.locate(sample)
    assert branch.consumed(start + 1500) == trunk.consumed(start + 1500)


@given(stage_lists(), weights(), st.integers(0, 4000), st.booleans())
@settings(max_examples=40)
def test_a_branch_with_another_mix_uses_what_is_left(stores, stages, drawn, start, from_there):
    """Also if its one stage is said to begin before the branch does, at sample 0."""
    trunk = mixture(stores, stages)
    shares = {name.translate(str.maketrans("abcdef", "cdefgh")): share for name, share in shares_of(drawn).items()}
    branch = mixture(stores, [Stage(start if from_there else 0, shares)], start=start, consumed=trunk.consumed(start))
    used = dict.fromkeys(branch.corpora, 0) | trunk.consumed(start)  # corpora that are new, and that are gone
    assert branch.consumed(start) == used
    for sample in range(start, start + 1500):
        name, index = branch.locate(sample)
        assert index == used[name]
        used[name] += 1
    assert branch.consumed(start + 1500) == used
    if start:
        with pytest.raises(IndexError, match="drawn before"):
            branch.locate(start - 1)


def test_windows_come_once_in_an_epoch_through_a_change_of_shares(stores):
    corpus = stores["b"]
    mix = mixture(stores, [Stage(0, {"a": 0.5, "b": 0.5}), Stage(11, {"a": 0.1, "b": 0.9})])
    drawn = [mix[sample].ids.tobytes() for sample in range(5 * corpus.count) if mix.locate(sample)[0] == "b"]
    assert sorted(drawn[: corpus.count]) == sorted(corpus[i].ids.tobytes() for i in range(corpus.count))


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "data.mix is empty"),
        ([Stage(1, {"a": 1.0})], "begins at sample 1, after the run's first sample, 0"),
        ([Stage(0, {"a": 1.0}), Stage(5, {"a": 1.0}), Stage(5, {"b": 1.0})], r"data.mix\[2\] begins at sample 5"),
        ([Stage(0, {"a": 0.5, "b": 0.4})], r"data.mix\[0\].*sum to 0.9, .*{a: 0.5555555556, b: 0.4444444444}"),
        ([Stage(0, {"a": 1.0}), Stage(5, {"a": 1.00001})], r"data.mix\[1\].*sum to 1.00001"),
        ([Stage(0, {"a": 1.5, "b": -0.5})], "b has share -0.5"),
        ([Stage(0, {"a": 1.0, "b": math.nan})], "b has share nan"),
        ([Stage(0, {"a": math.inf})], "a has share inf"),
        ([Stage(0, {"a": 0.0})], "no corpus has a share above 0"),
        ([Stage(0, {})], "no corpus has a share above 0"),
        ([Stage(0, {"a": 0.5, "yodass": 0.5})], "no corpus is called yodass. Did you mean yodas"),
        ([Stage(0, {"a": 0.5, "xyz": 0.5})], "no corpus is called xyz. The corpora are a, b, yodas"),
    ],
)
def test_shares_that_make_no_sense_are_named(stores, stages, message):
    with pytest.raises(SodaError, match=message):
        Mixture({"a": stores["a"], "b": stores["b"], "yodas": stores["c"]}, stages)


def test_normalised_shares_can_be_pasted(stores):
    wrong = dict(zip("abcdefgh", MULTILINGUAL, strict=True))
    with pytest.raises(SodaError) as caught:
        Mixture(stores, [Stage(0, wrong)])
    pasted = dict(pair.split(": ") for pair in str(caught.value).partition("{")[2].rstrip("}").split(", "))
    mix = Mixture(stores, [Stage(0, {name: float(share) for name, share in pasted.items()})])
    assert mix.consumed(_PERIOD) == mixture(stores, [Stage(0, shares_of(MULTILINGUAL))]).consumed(_PERIOD)


def test_corpora_must_fit_together(stores, tmp_path):
    with pytest.raises(SodaError, match="no corpora"):
        Mixture({}, [Stage(0, {"a": 1.0})])
    space = TokenSpace(65, 1, 2, 4, 16)
    write_store(tmp_path / "other", documents(5, space=space), space)
    other = Windows(Store(tmp_path / "other"), 16, 1)
    with pytest.raises(SodaError, match=r"other: .*another vocabulary.*corpus a "):
        Mixture({"a": stores["a"], "b": other}, [Stage(0, {"a": 1.0})])
    with pytest.raises(ValueError, match="different lengths"):
        Mixture({"a": stores["a"], "b": Windows(stores["b"].store, 8, 1)}, [Stage(0, {"a": 1.0})])


@pytest.mark.parametrize("what", ["codec", "tokenizer"])
def test_stores_of_different_fingerprints_refuse_to_mix(tmp_path, what):
    made_by = {"codec": "aa", "tokenizer": "bb"}
    write_store(tmp_path / "one", documents(20, seed=1), SPACE, **made_by)
    write_store(tmp_path / "two", documents(20, seed=2), SPACE, **{**made_by, what: "cc"})
    write_store(tmp_path / "text", documents(20, seed=3), SPACE, codec=None, tokenizer=made_by["tokenizer"])
    windows = {name: Windows(Store(tmp_path / name), 32, 0) for name in ("one", "two", "text")}
    with pytest.raises(SodaError, match=f"different {what}s"):
        Mixture(windows, [Stage(0, {"one": 0.5, "two": 0.5})])
    if what == "codec":
        Mixture({name: windows[name] for name in ("one", "text")}, [Stage(0, {"one": 0.5, "text": 0.5})])
