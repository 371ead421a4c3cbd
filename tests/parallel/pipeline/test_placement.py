"""Placements name every rank, share stages where they say, and are known again by their shape."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.placement import (
    copies,
    describe,
    holders,
    is_complete,
    linear,
    loop,
    mirror,
    shape,
    stages_on,
    v_shape,
)


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 32), st.integers(1, 4))
def test_every_stage_is_on_one_rank_of_each_direction(ranks: int, per_rank: int) -> None:
    for placement, copied in ((loop(ranks, per_rank), 1), (v_shape(ranks), 1), (mirror(ranks), 2 if ranks > 1 else 1)):
        assert is_complete(placement, ranks)
        assert copies(placement) == copied
        for stage in range(len(placement[0])):
            found = {rank for rank in range(ranks) if stage in stages_on(placement, rank)}
            assert found == set(holders(placement, stage))


def test_stages_of_a_rank_come_in_the_order_of_its_directions() -> None:
    assert [stages_on(loop(4, 3), rank) for rank in range(4)] == [(0, 4, 8), (1, 5, 9), (2, 6, 10), (3, 7, 11)]
    assert [stages_on(v_shape(3), rank) for rank in range(3)] == [(0, 5), (1, 4), (2, 3)]
    assert [stages_on(mirror(4), rank) for rank in range(4)] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert [holders(mirror(4), stage) for stage in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    assert describe(v_shape(3), [0, 2]) == "rank 0: 0 and 5; rank 2: 2 and 3"


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shapes_are_known_again(ranks: int) -> None:
    assert shape(linear(ranks)) == "linear"
    assert shape(loop(ranks, 3)) == "loop"
    assert shape(v_shape(ranks)) == "v"
    assert shape(mirror(ranks)) == "mirror"
    assert shape((tuple(reversed(range(ranks))),)) == "free"


def test_a_placement_without_a_rank_or_with_one_too_many_is_not_complete() -> None:
    assert not is_complete(((0, 1, 1),), 3)
    assert not is_complete(((0, 1, 2),), 2)
    assert not is_complete((), 1)
