"""Every schedule is sound for every shape, keeps its peak, and an impossible shape is answered with one that works."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.check import check
from parallel.pipeline.schedules import SCHEDULES, ScheduleError, build
from parallel.pipeline.schedules.dualpipe import eight_steps
from parallel.pipeline.simulate import Costs, simulate

# Shapes grow with the example: most are small, some reach 64 ranks and 512 micro-batches.
SHAPES = settings(deadline=None, max_examples=15)
RANKS = st.integers(1, 64)
MICROBATCHES = st.one_of(st.integers(1, 160), st.integers(1, 512))


def dualpipe(ranks: int, microbatches: int) -> Schedule:
    return build("dualpipe", num_ranks=ranks, num_microbatches=microbatches)


def most_live(name: str, rank: int, *, ranks: int, microbatches: int, per_rank: int) -> int:
    """Live stage activations that a rank may hold at most."""
    return {
        "gpipe": microbatches,
        "1f1b": min(microbatches, ranks - rank),
        "interleaved": min(microbatches * per_rank, (per_rank - 1) * ranks + 2 * (ranks - 1 - rank) + 1),
        "zb1p": min(microbatches, ranks),
        "zbv": 2 * min(microbatches, ranks),
        "dualpipev": min(2 * microbatches, 2 * ranks + 1),
        "dualpipe": min(microbatches, ranks + 1),
    }[name]


@pytest.mark.parametrize("name", SCHEDULES)
@SHAPES
@given(RANKS, MICROBATCHES, st.integers(1, 3))
def test_every_schedule_is_sound_and_keeps_its_memory(name: str, ranks: int, microbatches: int, per_rank: int) -> None:
    ranks += name == "dualpipe" and ranks % 2
    wanted = per_rank if name == "interleaved" else None
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches, stages_per_rank=wanted)
    peaks = check(schedule)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, ranks, microbatches)
    for rank, live in enumerate(peaks.live_activations):
        allowed = most_live(name, rank, ranks=ranks, microbatches=microbatches, per_rank=per_rank)
        assert live <= allowed, f"rank {rank} holds {live}"
    if name in ("gpipe", "1f1b", "interleaved"):
        assert not any(peaks.deferred_weight_grads)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sends_may_block_with_two_receives_posted_ahead(name: str) -> None:
    for ranks, microbatches in ((2, 1), (2, 5), (4, 3), (4, 9), (8, 20), (6, 16)):
        check(build(name, num_ranks=ranks, num_microbatches=microbatches), blocking=2)


def makespan(schedule: Schedule) -> float:
    """In units of F = I = W of the layers of a rank."""
    cost = 1 / schedule.stages_per_rank
    return simulate(schedule, Costs(cost, cost, cost)).makespan


@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipev", "dualpipe"])
@SHAPES
@given(st.integers(1, 32), st.integers(1, 100))
def test_never_slower_than_1f1b_at_equal_costs(name: str, ranks: int, microbatches: int) -> None:
    ranks += name == "dualpipe" and ranks % 2
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    assert makespan(schedule) <= 3 * (microbatches + ranks - 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipev", "dualpipe"])
def test_never_slower_than_1f1b_for_any_number_of_micro_batches(name: str) -> None:
    """Every M to 2P and beyond, where the schedules are cut from larger ones; from there on they only grow."""
    for ranks in (2, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64):
        for microbatches in range(1, 2 * ranks + 8):
            schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
            assert makespan(schedule) <= 3 * (microbatches + ranks - 1), (ranks, microbatches)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SCHEDULES)
@settings(deadline=None, max_examples=150)
@given(RANKS, MICROBATCHES)
def test_many_shapes_are_sound(name: str, ranks: int, microbatches: int) -> None:
    ranks += name == "dualpipe" and ranks % 2
    check(build(name, num_ranks=ranks, num_microbatches=microbatches), blocking=4)


@SHAPES
@given(st.integers(1, 32).map(lambda half: 2 * half), st.integers(1, 512))
def test_dualpipe_feeds_both_ends_evenly(ranks: int, microbatches: int) -> None:
    schedule = dualpipe(ranks, microbatches)
    entering = [schedule.rank_of(0, m) for m in range(microbatches)]
    assert entering == [0] * ((microbatches + 1) // 2) + [ranks - 1] * (microbatches // 2)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (8, 20), (16, 120)])
def test_dualpipe_takes_the_published_steps(ranks: int, microbatches: int) -> None:
    """Counts of the eight steps, summed over them, for each rank's distance hr to the outer end."""
    schedule, half = dualpipe(ranks, microbatches), ranks // 2
    assert schedule == eight_steps(num_ranks=ranks, num_microbatches=microbatches)
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


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (8, 20), (8, 13)])
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


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_stage_lives_where_the_layout_says(name: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=8)
    for rank, steps in enumerate(schedule.ranks):
        assert {action.stage for step in steps for action in parts(step)} == set(schedule.stages_of(rank))
    assert schedule.bidirectional == (name == "dualpipe")
    assert schedule.stages_per_rank == {"interleaved": 2, "zbv": 2, "dualpipev": 2}.get(name, 1)


def test_first_and_last_stage_of_a_v_share_rank_0() -> None:
    for name in ("zbv", "dualpipev"):
        schedule = build(name, num_ranks=4, num_microbatches=3)
        assert schedule.holders(0) == schedule.holders(schedule.num_stages - 1) == (0,)


def test_directions_of_an_odd_number_of_micro_batches() -> None:
    """The first direction gets the larger half."""
    schedule = dualpipe(4, 5)
    assert [schedule.direction(m) for m in range(5)] == [0, 0, 0, 1, 1]


@pytest.mark.parametrize("ranks", [1, 3, 7, 63])
def test_odd_ranks_are_answered_with_numbers_that_work(ranks: int) -> None:
    with pytest.raises(ScheduleError, match="must be even") as caught:
        dualpipe(ranks, 6)
    assert f"not {ranks}" in str(caught.value)
    found = re.search(r"use ([\d or]+) ranks, or (\w+) or (\w+) on (\d+)", str(caught.value))
    assert found, str(caught.value)
    for number in re.findall(r"\d+", found[1]):
        check(dualpipe(int(number), 6))
    for name in (found[2], found[3]):
        check(build(name, num_ranks=int(found[4]), num_microbatches=6))


def test_an_unknown_schedule_is_answered_with_those_that_exist() -> None:
    with pytest.raises(ScheduleError, match="'zigzag' does not exist: choose from gpipe, 1f1b, interleaved, zb1p, zbv"):
        build("zigzag", num_ranks=2, num_microbatches=4)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("ranks", "microbatches"), [(0, 4), (2, 0), (-1, 1)])
def test_nothing_to_do_is_an_error(name: str, ranks: int, microbatches: int) -> None:
    with pytest.raises(ScheduleError, match="at least 1 rank and 1 micro-batch"):
        build(name, num_ranks=ranks, num_microbatches=microbatches)


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("zbv", 3, "zbv has 2 stages a rank, not 3"),
        ("1f1b", 2, "1f1b has 1 stage a rank, not 2: use 1, or interleaved"),
        ("interleaved", 0, "at least 1 stage a rank, not 0: use 2"),
    ],
)
def test_stages_a_rank_that_cannot_be_had_are_named(name: str, wanted: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        build(name, num_ranks=4, num_microbatches=8, stages_per_rank=wanted)
