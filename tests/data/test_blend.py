from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blend import MAX_PERIOD, Interleave, level_order, quotas

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=7)


def test_weights_of_few_decimals_are_exact():
    assert quotas([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert quotas([0.35, 0.65]) == [7, 13] and quotas([3.0]) == [1] and quotas([2, 2]) == [1, 1]
    assert quotas([1e300, 1e300]) == [1, 1]


@given(st.lists(st.floats(0.001, 1), min_size=2, max_size=9))
def test_other_weights_are_close(weights):
    found = quotas(weights)
    assert sum(found) <= MAX_PERIOD and min(found) >= 1
    exact = [Fraction(repr(weight)) for weight in weights]
    for weight, quota in zip(exact, found, strict=True):
        assert abs(weight / sum(exact) - Fraction(quota, sum(found))) <= Fraction(1, MAX_PERIOD)


@settings(max_examples=80, deadline=None)
@given(quota=WEIGHTS)
def test_every_prefix_of_a_period_is_within_one(quota):
    order, period = level_order(quota), sum(quota)
    for k, share in enumerate(quota):
        had = np.cumsum(order == k)
        assert had[-1] == share
        assert abs(had * period - np.arange(1, period + 1) * share).max() < period


@settings(max_examples=60, deadline=None)
@given(quota=WEIGHTS, seed=st.integers(0, 99), begin=st.integers(0, 500), size=st.integers(1, 500))
def test_any_window_holds_its_share(quota, seed, begin, size):
    interleave = Interleave(quota, seed=seed)
    turns = interleave.turns(np.arange(begin, begin + size))
    for k, share in enumerate(interleave.quota):
        assert abs(np.count_nonzero(turns.source == k) - size * share / interleave.period) < 4


@settings(max_examples=60, deadline=None)
@given(quota=WEIGHTS, seed=st.integers(0, 99))
def test_ranks_count_each_source_without_gap(quota, seed):
    interleave = Interleave(quota, seed=seed)
    turns = interleave.turns(np.arange(300))
    for k in range(len(quota)):
        assert turns.rank[turns.source == k].tolist() == list(range(np.count_nonzero(turns.source == k)))
    for number in (0, 1, 99, 300):
        expected = np.bincount(turns.source[:number], minlength=len(quota))
        assert interleave.counts(number).tolist() == expected.tolist()
    far = 10**13
    (source,), (rank,) = (getattr(interleave.turns(np.array([far])), name) for name in ("source", "rank"))
    assert interleave.counts(far)[source] == rank and interleave.counts(far + 1)[source] == rank + 1
    assert interleave.counts(far).sum() == far


def test_no_rank_is_left_with_one_source():
    """With a strict A B A B each of two data ranks would see one source only."""
    turns = Interleave([0.5, 0.5], seed=0).turns(np.arange(20_000))
    assert abs(np.count_nonzero(turns.source[::2]) - 5000) < 5 * 50


@pytest.mark.parametrize("weights", [[0.0, 1.0], [-1.0], [float("inf"), 1.0], [float("nan")]])
def test_impossible_weights(weights):
    with pytest.raises(AssertionError):
        quotas(weights)


def test_order_is_pinned():
    """A change here changes the data of every blended run that resumes: it must be deliberate."""
    turns = Interleave([0.7, 0.2, 0.1], seed=42).turns(np.arange(20))
    assert turns.source.tolist() == GOLDEN


GOLDEN = [2, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 1, 0, 0, 2, 0, 0]
