import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.config import DataConfig, DataPhase, SourceConfig
from data.cursor import Cursor, phase_problems
from data.sampler import SamplerError

TWO = (SourceConfig("b", 0.25), SourceConfig("c", 0.25))


def cursor(*phases: DataPhase, **changes) -> Cursor:
    return Cursor(DataConfig("a", 8, weight=0.5, blend=TWO, phases=phases, **changes))


def test_lengths_and_tokens_at_the_boundaries():
    made = cursor(DataPhase(80, sequence_length=32), DataPhase(144, sequence_length=8), DataPhase(160, 16))
    assert [stretch.first_sample for stretch in made.stretches] == [0, 10, 12, 14]
    assert [made.stretch(sample).sequence_length for sample in (0, 9, 10, 11, 12, 13, 14, 10**12)] == [
        8, 8, 32, 32, 8, 8, 16, 16,
    ]  # fmt: skip
    assert [made.tokens_seen(sample) for sample in (0, 9, 10, 11, 12, 14, 15)] == [0, 72, 80, 112, 144, 160, 176]
    assert made.sequence_lengths == (8, 32, 16)
    with pytest.raises(SamplerError, match=r"samples 9 to 10 are of \[8, 32\] tokens: sample 10 begins a phase"):
        made.places(np.array([9, 10]))


@settings(max_examples=50, deadline=None)
@given(first=st.integers(1, 60), second=st.integers(1, 60), seed=st.integers(0, 9))
def test_a_change_of_weights_disturbs_no_source(first, second, seed):
    """Each source still gives its windows 0, 1, 2 ... without gap; only the pace changes."""
    made = cursor(
        DataPhase(8 * first, weights=(0.1, 0.8, 0.1)), DataPhase(8 * (first + second), weights=(1, 1, 2)), seed=seed
    )
    places = made.places(np.arange(300))
    for k in range(3):
        mine = places.rank[places.source == k]
        assert mine.tolist() == list(range(len(mine)))
    plain = cursor(seed=seed).places(np.arange(first))
    assert np.array_equal(places.source[:first], plain.source) and np.array_equal(places.rank[:first], plain.rank)
    later = np.bincount(places.source[first : first + second], minlength=3)
    assert abs(later[1] - 0.8 * second) < 4


def test_a_length_that_comes_back_goes_on_where_it_was():
    made = cursor(DataPhase(80, sequence_length=32), DataPhase(144, sequence_length=8))
    short = np.r_[0:10, 12:40]
    straight = cursor().places(np.arange(38))
    places = made.places(short)
    for k in range(3):
        assert sorted(places.rank[places.source == k]) == list(range(np.count_nonzero(places.source == k)))
    assert np.array_equal(places.rank[:10], straight.rank[:10])
    long = made.places(np.array([10, 11]))
    assert all(rank < 2 for rank in long.rank)


def test_pure_function_of_the_sample():
    made = cursor(DataPhase(800, weights=(1, 2, 3)))
    ids = np.random.default_rng(0).permutation(400)
    whole, mixed = made.places(np.arange(400)), made.places(ids)
    assert np.array_equal(whole.source[ids], mixed.source) and np.array_equal(whole.rank[ids], mixed.rank)


def test_every_problem_is_named():
    config = DataConfig(
        "a", 8, weight=0.0, blend=(SourceConfig("b", -1.0), SourceConfig("c")),
        phases=(
            DataPhase(20, sequence_length=-1), DataPhase(20), DataPhase(40, weights=(1.0,)),
            DataPhase(48, 4, (1, 0, 1)),
        ),
    )  # fmt: skip
    found = phase_problems(config)
    expected = [
        "data: weight 0.0 of a: must be above 0", "data: weight -1.0 of b",
        "data.phases.0.sequence_length=-1",
        "data.phases.0.from_tokens=20: not reached by whole samples of 8 tokens: use 16 or 24",
        "data.phases.1.from_tokens=20: must be more than 20",
        "data.phases.2.weights=[1.0]: 1 weights for 3 sources; give one for each of a, b, c",
        "data.phases.3: weight 0 of b",
    ]  # fmt: skip
    for part in expected:
        assert any(part in message for message in found), (part, found)
    with pytest.raises(SamplerError) as caught:
        Cursor(config)
    assert all(message in str(caught.value) for message in found)


def test_a_weight_too_small_to_be_kept_is_refused():
    (message,) = phase_problems(DataConfig("a", weight=1.0, blend=(SourceConfig("b", 1e-7),)))
    assert "weight 1e-07 of b is 1e-07 of the sum, but would get 1.53e-05" in message
