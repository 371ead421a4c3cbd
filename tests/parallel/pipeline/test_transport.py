"""Sends that block: classic deadlocks are found and named, and enough receives posted ahead resolve them."""

from dataclasses import replace

import pytest

from parallel.pipeline.actions import Action
from parallel.pipeline.check import InvalidSchedule, check
from parallel.pipeline.order import walk
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.transport import least_ahead, walk_blocking


def test_1f1b_with_rendezvous_sends_deadlocks_as_everybody_knows() -> None:
    """Rank 0 sends the next activation while rank 1 sends a gradient, and neither receives."""
    schedule = build("1f1b", num_ranks=2, num_microbatches=3)
    assert not walk(schedule).waits
    cycle = walk_blocking(schedule, ahead=0).cycle()
    assert {(wait.rank, wait.other) for wait in cycle} == {(0, 1), (1, 0)}
    assert all(wait.what == "a receive of its result" for wait in cycle)
    with pytest.raises(InvalidSchedule, match="deadlock where sends block with 0 receives posted ahead: rank 0 at F"):
        check(schedule, blocking=0)
    check(schedule, blocking=1)


@pytest.mark.parametrize(
    ("name", "least"),
    [("gpipe", 0), ("1f1b", 1), ("interleaved", 1), ("zb1p", 1), ("zbv", 1), ("dualpipev", 2), ("dualpipe", 2)],
)
def test_least_receives_to_post_ahead(name: str, least: int) -> None:
    assert least_ahead(build(name, num_ranks=4, num_microbatches=20)) == least


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_deep_transport_gets_as_far_as_one_that_never_blocks(name: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=9)
    assert sorted(walk_blocking(schedule, ahead=1000).steps) == sorted(walk(schedule).steps)


def test_messages_may_be_consumed_in_another_order_than_sent() -> None:
    """The last rank takes micro-batches in reverse."""
    schedule = build("gpipe", num_ranks=2, num_microbatches=4)
    last = (*(Action("F", 1, m) for m in (3, 2, 1, 0)), *(Action("B", 1, m) for m in range(4)))
    swapped = replace(schedule, ranks=(schedule.ranks[0], last))
    check(swapped)
    # Coming to micro-batch 3, the receiver posts those of the three before it as well, in the sender's order.
    assert least_ahead(swapped) == 0


def test_a_true_deadlock_stays_one_however_deep_the_transport() -> None:
    schedule = build("1f1b", num_ranks=2, num_microbatches=2)
    f0, f1, b0, b1 = schedule.ranks[0]
    assert least_ahead(replace(schedule, ranks=((f0, b1, f1, b0), schedule.ranks[1])), most=8) is None
