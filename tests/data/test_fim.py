import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.fim import FimTokens, Parts, cuts, is_turned, parts, plain, turned

TOKENS = FimTokens(begin=3, hole=4, end=5, end_of_sentence=1)
IDS = st.lists(st.integers(6, 99), max_size=12)
WORDS = st.integers(0, 2**64 - 1)


@given(prefix=IDS, middle=IDS, suffix=IDS)
def test_turning_is_undone(prefix, middle, suffix):
    stored = np.array(turned(prefix, middle, suffix, TOKENS))
    assert stored.tolist() == [3, *prefix, 4, *suffix, 5, *middle, 1]
    found = parts(stored, TOKENS)
    assert isinstance(found, Parts)
    assert (found.prefix.tolist(), found.middle.tolist(), found.suffix.tolist()) == (prefix, middle, suffix)
    back = plain(stored, TOKENS)
    assert back.tolist() == [*prefix, *middle, *suffix, 1, 1, 1, 1] and back.size == stored.size


@given(document=IDS)
def test_others_stay_as_they_are(document):
    ordinary = np.array([*document, 1])
    assert parts(ordinary, TOKENS) is None and plain(ordinary, TOKENS) is ordinary


@pytest.mark.parametrize("broken", [[3, 6, 4, 7, 5, 8], [3, 6, 5, 7, 4, 8, 1], [3, 4, 4, 5, 1], [3, 6, 7, 8, 1]])
def test_what_is_not_turned_is_not_taken_apart(broken):
    assert parts(np.array(broken), TOKENS) is None


@given(length=st.integers(0, 1000), name=WORDS, seed=st.integers())
def test_cuts_lie_inside(length, name, seed):
    begin, end = cuts(length, name, seed=seed)
    assert 0 <= begin <= end <= length


def test_cuts_cover_every_place():
    """Over all pairs of positions of a text of 3 characters, equal pairs once and others twice: 16 equal chances."""
    counts = np.zeros((4, 4))
    for name in range(16_000):
        counts[cuts(3, name, seed=1)] += 1
    for begin in range(4):
        for end in range(begin, 4):
            expected = 1000 * (1 if begin == end else 2)
            assert abs(counts[begin, end] - expected) < 5 * expected**0.5
    assert np.tril(counts, -1).sum() == 0


def test_rate_is_kept_and_nested():
    names = range(20_000)
    chosen = {rate: {name for name in names if is_turned(name, rate=rate, seed=7)} for rate in (0.0, 0.05, 0.1, 1.0)}
    assert not chosen[0.0] and chosen[0.05] <= chosen[0.1] and len(chosen[1.0]) == 20_000
    assert abs(len(chosen[0.1]) - 2000) < 5 * 1800**0.5
    other = {name for name in names if is_turned(name, rate=0.1, seed=8)}
    assert abs(len(other & chosen[0.1]) - 200) < 5 * 198**0.5
