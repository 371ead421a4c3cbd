"""Every schedule is sound for every shape, keeps its peak, and an impossible shape is answered with one that works."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.check import check
from parallel.pipeline.schedules import BIDIRECTIONAL, SCHEDULES, ScheduleError, build

SHAPES = settings(deadline=None, max_examples=10)


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    return build("dualpipe", num_ranks=ranks, num_microbatches=microbatches)


@SHAPES
@given(st.integers(1, 64), st.integers(1, 512))
def test_1f1b_is_sound_and_holds_no_more_than_its_distance_to_the_end(ranks: int, microbatches: int) -> None:
    schedule = build("1f1b", num_ranks=ranks, num_microbatches=microbatches)
    peaks = check(schedule)
    assert peaks.live_activations == tuple(min(microbatches, ranks - rank) for rank in range(ranks))
    assert not any(peaks.deferred_weight_grads)
    assert all(len(steps) == 2 * microbatches for steps in schedule.ranks)


@SHAPES
@given(st.integers(1, 32).map(lambda half: 2 * half), st.integers(0, 512))
def test_dualpipe_is_sound_and_holds_at_most_one_more_than_its_ranks(ranks: int, more: int) -> None:
    microbatches = min(2 * ranks + 2 * more, 512)
    peaks = check(dualpipe(ranks, microbatches))
    assert max(peaks.live_activations) <= ranks + 1
    assert max(peaks.live_activations) == ranks + 1  # and somewhere as many
    half = ranks // 2
    assert max(peaks.deferred_weight_grads) <= half + 1


def test_the_largest_shapes_are_sound() -> None:
    for name in SCHEDULES:
        check(build(name, num_ranks=64, num_microbatches=512))


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_dualpipe_takes_the_published_steps(ranks: int, microbatches: int) -> None:
    """Counts of the eight steps, summed over them, for each rank's distance hr to the outer end."""
    schedule, half = dualpipe(ranks, microbatches), ranks // 2
    for rank, steps in enumerate(schedule.ranks):
        hr = min(rank, ranks - 1 - rank)
        outer, main = half - hr - 1, microbatches // 2 - ranks + hr + 1
        innermost = hr == half - 1  # the first pair of step 4 is taken apart there
        pairs = 2 * main - innermost + outer
        alone = Counter(step.kind for step in steps if isinstance(step, Action))
        assert sum(isinstance(step, Pair) for step in steps) == pairs
        assert alone["F"] == 2 * outer + 2 * (hr + 1) + outer + innermost
        assert alone["B"] + alone["I"] == outer + innermost + outer + 2 * (hr + 1) + outer
        assert alone["W"] == alone["I"]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (8, 20)])
def test_dualpipe_pairs_a_forward_and_a_backward_of_opposite_directions(ranks: int, microbatches: int) -> None:
    schedule = dualpipe(ranks, microbatches)
    pairs = [step for steps in schedule.ranks for step in steps if isinstance(step, Pair)]
    assert pairs
    for pair in pairs:
        assert pair.forward.kind == "F" and pair.backward.kind == "B"
        directions = {schedule.direction(pair.forward.microbatch), schedule.direction(pair.backward.microbatch)}
        assert directions == {0, 1}


def test_dualpipe_mirrors_itself() -> None:
    """Rank P-1-r does to direction 1 what rank r does to direction 0."""
    schedule = dualpipe(8, 20)

    def mirrored(action: Action) -> Action:
        return Action(action.kind, action.stage, (action.microbatch + 10) % 20)

    for rank in range(4):
        here = [action for step in schedule.ranks[rank] for action in parts(step)]
        there = [action for step in schedule.ranks[7 - rank] for action in parts(step)]
        assert list(map(mirrored, here)) == there


def test_every_stage_lives_where_the_layout_says() -> None:
    schedule, plain = dualpipe(4, 8), build("1f1b", num_ranks=4, num_microbatches=8)
    assert [schedule.holders(stage) for stage in range(4)] == [(0, 3), (1, 2), (1, 2), (0, 3)]
    assert [schedule.stages_of(rank) for rank in range(4)] == [(0, 3), (1, 2), (2, 1), (3, 0)]
    assert [plain.holders(stage) for stage in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [plain.stages_of(rank) for rank in range(4)] == [(0,), (1,), (2,), (3,)]
    assert [schedule.direction(m) for m in range(8)] == [0] * 4 + [1] * 4
    assert BIDIRECTIONAL == ("dualpipe",)
    for rank, steps in enumerate(schedule.ranks):
        assert {action.stage for step in steps for action in parts(step)} == set(schedule.stages_of(rank))


@pytest.mark.parametrize(("ranks", "microbatches"), [(4, 7), (4, 9), (4, 2), (8, 1), (2, 3), (6, 11), (64, 100)])
def test_wrong_micro_batches_are_answered_with_a_number_that_works(ranks: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="even number of micro-batches, at least") as caught:
        dualpipe(ranks, microbatches)
    found = re.search(r"use (\d+), or (\w+)", str(caught.value))
    assert found, str(caught.value)
    assert str(microbatches) in str(caught.value)
    check(dualpipe(ranks, int(found[1])))
    check(build(found[2], num_ranks=ranks, num_microbatches=microbatches))


@pytest.mark.parametrize("ranks", [1, 3, 7, 63])
@pytest.mark.parametrize("microbatches", [2, 199])
def test_odd_ranks_are_answered_with_numbers_that_work(ranks: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="must be even") as caught:
        dualpipe(ranks, microbatches)
    found = re.search(r"use (\d+) ranks with (\d+) micro-batches, or (\w+)", str(caught.value))
    assert found and f"not {ranks}" in str(caught.value)
    check(dualpipe(int(found[1]), int(found[2])))
    check(build(found[3], num_ranks=ranks, num_microbatches=microbatches))


def test_an_unknown_schedule_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ScheduleError, match="'zigzag' does not exist: choose from 1f1b, dualpipe"):
        build("zigzag", num_ranks=2, num_microbatches=4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(0, 4), (2, 0), (-1, 1)])
def test_nothing_to_do_is_an_error(name: str, ranks: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1 rank and 1 micro-batch"):
        build(name, num_ranks=ranks, num_microbatches=microbatches)
