"""The checker catches every planted fault and names it; sound lists pass."""

import re
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from parallel.pipeline.actions import Action, Message, Pair, Schedule, Step, parts
from parallel.pipeline.check import InvalidSchedule, check
from parallel.pipeline.schedules import SCHEDULES, build

EVERY = [build(name, num_ranks=4, num_microbatches=m) for name in SCHEDULES for m in (3, 9)]
DUALPIPE = build("dualpipe", num_ranks=4, num_microbatches=8)
PLAIN = build("1f1b", num_ranks=3, num_microbatches=4)


def with_rank(schedule: Schedule, rank: int, steps: list[Step]) -> Schedule:
    ranks = list(schedule.ranks)
    ranks[rank] = tuple(steps)
    return replace(schedule, ranks=tuple(ranks))


def flat(schedule: Schedule) -> Schedule:
    """The same lists with every pair taken apart, so that single actions can be moved."""
    return replace(schedule, ranks=tuple(tuple(a for step in steps for a in parts(step)) for steps in schedule.ranks))


def fault(schedule: Schedule) -> str:
    with pytest.raises(InvalidSchedule) as caught:
        check(schedule)
    assert str(caught.value).startswith(f"{schedule.name}: ")
    return str(caught.value)


def position(schedule: Schedule, rank: int, action: Action) -> int:
    return [str(step) for step in schedule.ranks[rank]].index(str(action))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_missing_action_is_named(data: st.DataObject) -> None:
    schedule = flat(data.draw(st.sampled_from(EVERY)))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = list(schedule.ranks[rank])
    gone = steps.pop(data.draw(st.integers(0, len(steps) - 1)))
    assert isinstance(gone, Action)
    assert f"stage {gone.stage} micro-batch {gone.microbatch} has actions" in fault(with_rank(schedule, rank, steps))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_doubled_action_is_named(data: st.DataObject) -> None:
    schedule = flat(data.draw(st.sampled_from(EVERY)))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = list(schedule.ranks[rank])
    twice = data.draw(st.sampled_from(steps))
    steps.insert(data.draw(st.integers(0, len(steps))), twice)
    assert f"{twice.describe()} is done 2 times" in fault(with_rank(schedule, rank, steps))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_misplaced_action_is_named_with_both_ranks(data: st.DataObject) -> None:
    schedule = flat(data.draw(st.sampled_from(EVERY)))
    source = data.draw(st.integers(0, schedule.num_ranks - 1))
    target = data.draw(st.integers(0, schedule.num_ranks - 1).filter(lambda rank: rank != source))
    steps = list(schedule.ranks[source])
    moved = steps.pop(data.draw(st.integers(0, len(steps) - 1)))
    broken = with_rank(schedule, source, steps)
    broken = with_rank(broken, target, [*broken.ranks[target], moved])
    assert f"{moved.describe()} is on rank {target}, belongs on {source}" in fault(broken)


def test_all_faults_are_listed_together() -> None:
    steps = list(PLAIN.ranks[1])
    message = fault(with_rank(PLAIN, 1, [steps[0], *steps[:-1]]))
    assert "F stage 1 micro-batch 0 is done 2 times" in message
    assert "stage 1 micro-batch 3 has actions 'F', needs F and B, or F, I and W" in message


def test_both_a_whole_and_a_split_backward_are_one_too_many() -> None:
    broken = with_rank(PLAIN, 0, [*PLAIN.ranks[0], Action("W", 0, 3)])
    assert "stage 0 micro-batch 3 has actions 'FBW'" in fault(broken)


def test_actions_outside_the_pipeline_are_named() -> None:
    broken = with_rank(PLAIN, 0, [*PLAIN.ranks[0], Action("F", 0, 4)])
    assert "F stage 0 micro-batch 4 is outside 3 stages and 4 micro-batches" in fault(broken)


def test_backward_before_its_forward_is_refused() -> None:
    """On the last stage nobody sends what B waits for: only its own forward holds it back."""
    steps = list(PLAIN.ranks[2])
    steps[0], steps[1] = steps[1], steps[0]
    message = fault(with_rank(PLAIN, 2, steps))
    assert "rank 2 at B stage 2 micro-batch 0 waits for its own forward" in message


def test_a_weight_gradient_before_its_input_gradient_is_refused() -> None:
    schedule = flat(DUALPIPE)
    steps = list(schedule.ranks[0])
    at = position(schedule, 0, Action("I", 3, 4))
    assert steps[at + 1] == Action("W", 3, 4)
    steps[at], steps[at + 1] = steps[at + 1], steps[at]
    assert "rank 0 at W stage 3 micro-batch 4 waits for its own input gradient" in fault(with_rank(schedule, 0, steps))


def test_a_cycle_of_waits_is_printed_with_its_ranks() -> None:
    """Rank 0 wants the gradient of micro-batch 1 before it sends micro-batch 1: nobody can go on."""
    schedule = build("1f1b", num_ranks=2, num_microbatches=2)
    f0, f1, b0, b1 = schedule.ranks[0]
    message = fault(with_rank(schedule, 0, [f0, b1, f1, b0]))
    assert "deadlock: rank 0 at B stage 0 micro-batch 1 waits for a gradient from rank 1" in message
    assert "rank 1 at F stage 1 micro-batch 1 waits for an activation from rank 0" in message


def test_ranks_that_queue_behind_a_cycle_are_not_printed() -> None:
    """Ranks 1 and 2 wait for each other; rank 0, from which the search starts, only waits for rank 1."""
    steps = list(PLAIN.ranks[1])
    f2, b0 = position(PLAIN, 1, Action("F", 1, 2)), position(PLAIN, 1, Action("B", 1, 2))
    steps[f2], steps[b0] = steps[b0], steps[f2]
    message = fault(with_rank(PLAIN, 1, steps))
    assert "rank 1 at B stage 1 micro-batch 2 waits for a gradient from rank 2" in message
    assert "rank 2 at F stage 2 micro-batch 2 waits for an activation from rank 1" in message
    assert "rank 0 at" not in message


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_the_checker_passes_runs_to_its_end(data: st.DataObject) -> None:
    """Any exchange of two neighbours on one rank is judged as a plain walk over the lists judges it."""
    schedule = flat(data.draw(st.sampled_from(EVERY)))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = list(schedule.ranks[rank])
    at = data.draw(st.integers(0, len(steps) - 2))
    steps[at], steps[at + 1] = steps[at + 1], steps[at]
    swapped = with_rank(schedule, rank, steps)
    if runs_to_its_end(swapped):
        check(swapped)
    else:
        assert "deadlock" in fault(swapped)


def runs_to_its_end(schedule: Schedule) -> bool:
    """One rank after the other, one action at a time, until nobody can."""
    todo = [[a for step in steps for a in parts(step)] for steps in schedule.ranks]
    before = {"F": (), "B": ("F",), "I": ("F",), "W": ("I",)}
    done: set[Action] = set()
    arrived: set[Message] = set()
    while any(todo):
        ready = [
            actions
            for actions in todo
            if actions
            and all(Action(kind, actions[0].stage, actions[0].microbatch) in done for kind in before[actions[0].kind])
            and schedule.inputs(actions[0]) in arrived | {None}
        ]
        if not ready:
            return False
        action = ready[0].pop(0)
        done.add(action)
        message = schedule.output(action)
        if message is not None:
            arrived.add(message)
    return True


def test_peaks_count_what_a_walk_over_the_list_counts() -> None:
    peaks = check(DUALPIPE)
    for rank in range(4):
        live: set[tuple[int, int]] = set()
        waiting: set[tuple[int, int]] = set()
        most = most_waiting = 0
        for action in (a for step in DUALPIPE.ranks[rank] for a in parts(step)):
            key = (action.stage, action.microbatch)
            {"F": live.add, "B": live.discard, "W": live.discard, "I": waiting.add}[action.kind](key)
            if action.kind == "W":
                waiting.remove(key)
            most, most_waiting = max(most, len(live)), max(most_waiting, len(waiting))
        assert (peaks.live_activations[rank], peaks.deferred_weight_grads[rank]) == (most, most_waiting)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_a_planted_cycle_is_printed(data: st.DataObject) -> None:
    """A rank does a forward only after the backward of the same micro-batch on a later stage of its own or a peer's."""
    schedule = flat(data.draw(st.sampled_from(EVERY)))
    rank = data.draw(st.integers(0, schedule.num_ranks - 1))
    steps = list(schedule.ranks[rank])
    at = data.draw(st.sampled_from([i for i, a in enumerate(steps) if isinstance(a, Action) and a.kind == "F"]))
    forward = steps.pop(at)
    assert isinstance(forward, Action)
    last = max(i for i, a in enumerate(steps) if isinstance(a, Action) and a.kind in "BI" and same(a, forward))
    steps.insert(last + 1, forward)
    message = fault(with_rank(schedule, rank, steps))
    assert "deadlock: rank " in message and " waits for " in message
    ranks = [int(found) for found in re.findall(r"rank (\d+) at", message)]
    others = [int(found) for found in re.findall(r"from rank (\d+)", message)]
    assert others == [*ranks[1:], ranks[0]]  # each waits for the next, the last for the first


def same(a: Action, b: Action) -> bool:
    return (a.stage, a.microbatch) == (b.stage, b.microbatch)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_largest_shape_is_judged_in_seconds(name: str) -> None:
    schedule = build(name, num_ranks=64, num_microbatches=512)
    started = time.process_time()
    check(schedule)
    assert time.process_time() - started < 10  # half a second on an idle core


def test_a_flood_of_faults_is_cut_short() -> None:
    empty = replace(DUALPIPE, ranks=((),) * 4)
    assert fault(empty).endswith("and 20 more")
    assert fault(replace(PLAIN, num_stages=5)).endswith("does not put 5 stages on each of 3 ranks")


def test_a_pair_is_written_as_torch_writes_it() -> None:
    pair = Pair(Action("F", 0, 4), Action("B", 7, 1))
    assert str(pair) == "(0F4;7B1)OVERLAP_F_B"
    assert pair.describe() == "F stage 0 micro-batch 4 with B stage 7 micro-batch 1"


def test_a_pair_starts_only_when_both_halves_can() -> None:
    """Two forwards of the same index on the middle ranks wait for each other once they are pairs."""
    schedule = build("dualpipe", num_ranks=2, num_microbatches=4)
    together = tuple((Pair(steps[0], steps[1]), *steps[2:]) for steps in schedule.ranks)  # type: ignore[arg-type]
    assert "deadlock" in fault(replace(schedule, ranks=together))


def test_a_forward_cannot_be_paired_with_its_own_backward() -> None:
    schedule = build("1f1b", num_ranks=2, num_microbatches=2)
    forward, backward, *rest = schedule.ranks[1]
    own = with_rank(schedule, 1, [Pair(forward, backward), *rest])  # type: ignore[arg-type]
    assert "its own forward" in fault(own)


def test_unknown_kinds_and_missing_ranks_are_faults() -> None:
    assert "no known kind" in fault(with_rank(PLAIN, 0, [*PLAIN.ranks[0], Action("X", 0, 0)]))
    assert "2 lists of actions for 3 ranks" in fault(replace(PLAIN, ranks=PLAIN.ranks[:2]))
