"""The simulator reproduces the closed forms exactly, keeps every dependency, and never lets a rank do two things."""

import itertools
from dataclasses import replace

import pytest

from parallel.pipeline.actions import Pair, Schedule, Step, parts
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs, simulate

SHAPES = [(2, 4), (4, 8), (4, 20), (8, 20), (16, 32), (16, 120), (32, 64)]


def idle(schedule: Schedule, costs: Costs) -> list[float]:
    """Seconds in which each rank does nothing."""
    timeline = simulate(schedule, costs)
    return [timeline.makespan - sum(t.end - t.start for t in steps) for steps in timeline.ranks]


@pytest.mark.parametrize(("ranks", "microbatches"), [*SHAPES, (1, 3), (5, 2), (7, 1), (3, 9)])
@pytest.mark.parametrize("costs", [Costs(), Costs(1, 2, 1), Costs(5, 1, 1), Costs(1, 0.5, 3)])
def test_1f1b_idles_by_its_closed_form(ranks: int, microbatches: int, costs: Costs) -> None:
    """(P - 1)(F + B) on every rank, for any costs and any number of micro-batches."""
    schedule = build("1f1b", num_ranks=ranks, num_microbatches=microbatches)
    closed = (ranks - 1) * (costs.forward + costs.input_grad + costs.weight_grad)
    assert idle(schedule, costs) == [closed] * ranks


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("costs", [Costs(), Costs(2, 2, 1), Costs(1, 1, 0), Costs(4, 4, 3)])
def test_dualpipe_idles_by_its_closed_form(ranks: int, microbatches: int, costs: Costs) -> None:
    """(P/2 - 1)(F&B + B - 3W) on every rank, where forward and input gradient cost the same and W no more."""
    schedule = build("dualpipe", num_ranks=ranks, num_microbatches=microbatches)
    backward = costs.input_grad + costs.weight_grad
    closed = (ranks / 2 - 1) * (costs.forward + backward + backward - 3 * costs.weight_grad)
    assert idle(schedule, costs) == [closed] * ranks


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("overlap", [0.25, 0.5, 1.0])
def test_overlapped_pairs_shorten_the_bubble_by_the_closed_form(ranks: int, microbatches: int, overlap: float) -> None:
    """F&B = F + B - overlap * min(F, B). Ranks further in run fewer pairs, so they idle less: the most is the form."""
    costs = Costs(2, 2, 2, overlap=overlap)
    schedule = build("dualpipe", num_ranks=ranks, num_microbatches=microbatches)
    pair = 2 + 4 - overlap * 2
    assert max(idle(schedule, costs)) == (ranks / 2 - 1) * (pair + 4 - 3 * 2)


@pytest.mark.parametrize(
    ("ranks", "microbatches", "chunk_ms", "name", "makespan_ms"),
    [
        (4, 20, 20, "1f1b", 2760), (4, 20, 20, "dualpipe", 2480), (8, 20, 20, "1f1b", 3240),
        (8, 20, 20, "dualpipe", 2640), (16, 32, 50, "1f1b", 14100), (16, 32, 50, "dualpipe", 11000),
    ],
)  # fmt: skip
def test_makespans_equal_an_independent_simulation(
    ranks: int, microbatches: int, chunk_ms: int, name: str, makespan_ms: int
) -> None:
    """Figures of another simulator for chunks of half a stage; a stage is two chunks."""
    schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
    assert simulate(schedule, Costs(*[2 * chunk_ms] * 3)).makespan == makespan_ms


@pytest.mark.parametrize("name", ["1f1b", "dualpipe"])
def test_no_step_starts_before_its_rank_and_its_inputs_are_ready(name: str) -> None:
    schedule = build(name, num_ranks=8, num_microbatches=20)
    timeline = simulate(schedule, Costs(3, 2, 1, message=0.5, overlap=0.4))
    sent = {}
    for rank, steps in enumerate(timeline.ranks):
        assert [timed.step for timed in steps] == list(schedule.ranks[rank])
        for before, after in itertools.pairwise(steps):
            assert before.end <= after.start < after.end
        for timed in steps:
            for action in parts(timed.step):
                sent[schedule.output(action)] = timed.end + 0.5
    for timed in (timed for steps in timeline.ranks for timed in steps):
        for action in parts(timed.step):
            if schedule.inputs(action) is not None:
                assert timed.start >= sent[schedule.inputs(action)]
    assert timeline.makespan == max(timed.end for steps in timeline.ranks for timed in steps)
    busy = sum(timed.end - timed.start for steps in timeline.ranks for timed in steps)
    assert timeline.bubble == pytest.approx(1 - busy / (8 * timeline.makespan))


def test_a_message_takes_its_time_on_every_hop() -> None:
    """One micro-batch through P ranks: P forwards, P backwards, 2 (P - 1) messages."""
    schedule = build("1f1b", num_ranks=4, num_microbatches=1)
    assert simulate(schedule, Costs(message=0.25)).makespan == 4 * 1 + 4 * 2 + 6 * 0.25


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize(("shift", "ends"), [(0, False), (1, True)])
def test_overlapping_two_forwards_of_one_index_deadlocks_the_middle(ranks: int, shift: int, ends: bool) -> None:
    """F0_k with F1_k as one step: each middle rank waits for the other. F1_k with F0_k+1 is safe."""
    schedule = build("dualpipe", num_ranks=ranks, num_microbatches=2 * ranks)
    for rank in (ranks // 2 - 1, ranks // 2):
        schedule = replace(schedule, ranks=_join_forwards(schedule, rank, shift))
    if ends:
        assert (
            simulate(schedule).makespan
            == simulate(build("dualpipe", num_ranks=ranks, num_microbatches=2 * ranks)).makespan
        )
    else:
        with pytest.raises(AssertionError, match="check the schedule first"):
            simulate(schedule)


def _join_forwards(schedule: Schedule, rank: int, shift: int) -> tuple[tuple[Step, ...], ...]:
    """Step 2 of the rank, F0 F1 F0 F1 ..., with neighbours joined from the shift-th on."""
    steps = schedule.ranks[rank]
    forwards = [action for step in steps[: schedule.num_ranks] for action in parts(step)]
    assert len(forwards) == schedule.num_ranks and all(action.kind == "F" for action in forwards)
    last = len(forwards) - shift
    joined = [Pair(forwards[i], forwards[i + 1]) for i in range(shift, last, 2)]
    ranks = list(schedule.ranks)
    ranks[rank] = (*forwards[:shift], *joined, *forwards[last:], *steps[schedule.num_ranks :])
    return tuple(ranks)
