"""Layers over stages: no split has a cheaper most expensive stage, and what does not fit is answered with what does."""

import itertools
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.config import compose
from model.config import ModelConfig
from model.counts import counts
from parallel.pipeline.placement import Placement, mirror, v_shape
from parallel.pipeline.split import (
    SplitError,
    _balanced,
    _balanced_ranks,
    end_cost,
    layer_costs,
    split_layers,
    stage_costs,
)
from tests.model.reference import TINY

cost = st.integers(1, 9).map(float)


def largest(sizes: tuple[int, ...], costs: list[float], end: float) -> float:
    bounds = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
    stages = [sum(costs[low:high]) for low, high in itertools.pairwise(bounds)]
    stages[-1] += end
    return max(stages)


@settings(deadline=None, max_examples=150)
@given(st.lists(cost, min_size=1, max_size=8), st.integers(0, 20).map(float), st.data())
def test_no_split_has_a_cheaper_most_expensive_stage(costs: list[float], end: float, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    sizes = _balanced(costs, end, stages)
    cuts = itertools.combinations(range(1, len(costs)), stages - 1)
    every = [tuple(b - a for a, b in itertools.pairwise([0, *cut, len(costs)])) for cut in cuts]
    assert sizes in every
    assert largest(sizes, costs, end) == min(largest(other, costs, end) for other in every)


def test_671b_over_16_stages_is_15_times_4_and_1() -> None:
    """The last stage holds head and MTP as well."""
    stages = split_layers(compose(["model=671b"]).model, 16)
    assert [len(layers) for layers in stages] == [4] * 15 + [1]
    assert [layer for layers in stages for layer in layers] == list(range(61))


def test_costs_add_up_to_the_weights_a_token_uses() -> None:
    """Layers, head and MTP with its use of the head; only the final norms are left out."""
    config = compose(["model=671b"]).model
    count, head = counts(config), config.vocab_size * config.hidden_size
    assert sum(layer_costs(config)) == count.active - 2 * head - config.hidden_size
    idle = (256 - 8) * 3 * config.hidden_size * config.moe_intermediate_size
    assert end_cost(config) == pytest.approx(2 * head + count.mtp - 256 - idle, rel=1e-12)
    assert end_cost(replace(config, num_nextn_predict_layers=0)) == head


def test_given_layers_are_taken_as_they_are() -> None:
    assert split_layers(TINY, 2, (3, 1)) == (range(3), range(3, 4))
    assert split_layers(TINY, 1) == (range(4),)
    assert split_layers(TINY, 4) == (range(1), range(1, 2), range(2, 3), range(3, 4))


def test_mirrored_stages_of_671b_split_as_plain_ones() -> None:
    """A rank of DualPipe runs its two stages for different micro-batches: each stage must be short by itself."""
    config = compose(["model=671b"]).model
    assert split_layers(config, 16, placement=mirror(16)) == split_layers(config, 16)


def rank_costs(config: ModelConfig, sizes: list[int], placement: Placement) -> float:
    stages = stage_costs(layer_costs(config), end_cost(config), tuple(sizes))
    (row,) = placement
    return max(sum(stages[stage] for stage, rank in enumerate(row) if rank == wanted) for wanted in set(row))


def test_rank_0_of_a_v_gets_few_layers_beside_the_last_stage() -> None:
    config = compose(["model=671b"]).model
    stages, placed = split_layers(config, 32), split_layers(config, 32, placement=v_shape(16))
    assert rank_costs(config, [len(s) for s in placed], v_shape(16)) < rank_costs(
        config, [len(s) for s in stages], v_shape(16)
    )
    assert len(placed[0]) == 1 and len(placed[31]) == 1
    assert [layer for layers in placed for layer in layers] == list(range(61))


@settings(deadline=None, max_examples=60)
@given(st.lists(cost, min_size=4, max_size=9), st.integers(0, 9).map(float))
def test_moving_layers_never_makes_the_worst_rank_dearer(costs: list[float], end: float) -> None:
    before = _balanced(costs, end, 4)
    after = _balanced_ranks(costs, end, before, v_shape(2))
    assert sum(after) == len(costs) and min(after) >= 1

    def worst(sizes: tuple[int, ...]) -> float:
        a, b, c, d = stage_costs(costs, end, sizes)
        return max(a + d, b + c)

    assert worst(after) <= worst(before)


@pytest.mark.parametrize("given", [(1, 1, 1), (2, 3), (4, 0), (5, -1), ()])
def test_layers_that_do_not_fit_are_answered_with_some_that_do(given: tuple[int, ...]) -> None:
    with pytest.raises(SplitError, match=r"parallel\.layers_per_stage=.*model\.num_hidden_layers=4") as caught:
        split_layers(TINY, 2, given)
    found = re.search(r"for example (\[.*\])", str(caught.value))
    assert found
    assert len(split_layers(TINY, 2, tuple(json.loads(found[1])))) == 2


def test_more_stages_than_layers_are_answered_with_the_most_possible() -> None:
    with pytest.raises(SplitError, match=r"5 pipeline stages .*num_hidden_layers=4: use at most 4"):
        split_layers(TINY, 5)
