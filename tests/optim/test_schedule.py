"""Schedules over tokens: every boundary of the published recipe to the token, and the shapes between them."""

import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.config import compose
from optim.config import OptimConfig, Segment
from optim.schedule import value_at

TRILLION = 10**12
WARMUP = 2000 * 3072 * 4096


@pytest.fixture(scope="module")
def recipe() -> OptimConfig:
    return compose(["optim=deepseek_v3"]).optim


@pytest.mark.parametrize(
    ("tokens", "lr"),
    [
        (0, 0.0), (WARMUP // 2, 1.1e-4), (WARMUP, 2.2e-4), (WARMUP + 1, 2.2e-4), (5 * TRILLION, 2.2e-4),
        (10 * TRILLION - 1, 2.2e-4), (10 * TRILLION, 2.2e-4), (10 * TRILLION + 2150 * 10**9, (2.2e-4 + 2.2e-5) / 2),
        (14_300 * 10**9, 2.2e-5), (14_500 * 10**9, 2.2e-5), (14_633 * 10**9 - 1, 2.2e-5), (14_633 * 10**9, 7.3e-6),
        (14_800 * 10**9 - 1, 7.3e-6), (14_800 * 10**9, 7.3e-6), (20 * TRILLION, 7.3e-6),
    ],
)  # fmt: skip
def test_learning_rate_of_the_recipe(recipe: OptimConfig, tokens: int, lr: float) -> None:
    assert value_at(recipe.lr, tokens) == pytest.approx(lr, rel=1e-12, abs=1e-18)


def test_the_recipe_changes_at_its_boundaries_and_not_a_token_before(recipe: OptimConfig) -> None:
    step = 2.2e-4 / WARMUP
    assert value_at(recipe.lr, WARMUP - 1) == pytest.approx(2.2e-4 - step, rel=1e-12)
    assert value_at(recipe.lr, WARMUP - 1) < value_at(recipe.lr, WARMUP)
    assert value_at(recipe.lr, 10 * TRILLION + 10**9) < 2.2e-4  # the cosine has begun
    assert value_at(recipe.lr, 14_300 * 10**9 - 10**9) > 2.2e-5  # and not yet ended
    assert sum(segment.tokens for segment in recipe.lr) == 14_800 * 10**9


def test_the_cosine_of_the_recipe_is_a_cosine(recipe: OptimConfig) -> None:
    for share in (0.1, 0.25, 0.7, 0.99):
        expected = 2.2e-5 + (2.2e-4 - 2.2e-5) * 0.5 * (1 + math.cos(math.pi * share))
        assert value_at(recipe.lr, 10 * TRILLION + share * 4300 * 10**9) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("tokens", "value"), [(0, 0.3), (10 * TRILLION - 1, 0.3), (10 * TRILLION, 0.1), (1e15, 0.1)])
def test_mtp_lambda_of_the_recipe(recipe: OptimConfig, tokens: int, value: float) -> None:
    assert value_at(recipe.mtp_lambda, tokens) == value


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 1e-3), (14_300 * 10**9 - 1, 1e-3), (14_300 * 10**9, 0.0), (14_800 * 10**9, 0.0)]
)
def test_bias_update_speed_of_the_recipe(recipe: OptimConfig, tokens: int, value: float) -> None:
    assert value_at(recipe.bias_update_speed, tokens) == value


def test_the_rest_of_the_recipe_is_the_published_one(recipe: OptimConfig) -> None:
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert recipe.moments == "bf16"


def test_a_constant_jumps_and_a_line_starts_where_the_one_before_ended() -> None:
    segments = (Segment("constant", 4.0, 10), Segment("linear", 0.0, 8), Segment("cosine", 2.0, 4))
    assert [value_at(segments, tokens) for tokens in (0, 9, 10, 14, 18)] == [4, 4, 4, 2, 0]
    assert value_at(segments, 20) == pytest.approx(1.0)
    assert [value_at(segments, tokens) for tokens in (22, 100)] == [2, 2]


def test_the_first_segment_starts_from_the_initial_value() -> None:
    line = (Segment("linear", 3.0, 4),)
    assert [value_at(line, tokens, initial=1.0) for tokens in (0, 2, 4)] == [1, 2, 3]


def test_an_unknown_shape_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ValueError, match="'step' does not exist: use constant, linear or cosine"):
        value_at((Segment("step", 1.0, 5),), 2)


segments = st.lists(
    st.builds(Segment, st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1), st.integers(1, 1000)),
    min_size=1, max_size=5,
)  # fmt: skip


@given(segments, st.integers(0, 6000))
def test_values_stay_between_those_of_their_segment(chosen: Sequence[Segment], tokens: int) -> None:
    value, begin, low = value_at(chosen, tokens), 0.0, 0.0
    for segment in chosen:
        if tokens < begin + segment.tokens:
            assert min(low, segment.value) - 1e-12 <= value <= max(low, segment.value) + 1e-12
            return
        begin, low = begin + segment.tokens, segment.value
    assert value == chosen[-1].value
