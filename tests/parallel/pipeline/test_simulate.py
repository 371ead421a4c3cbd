"""The simulator reproduces the closed forms exactly, keeps every dependency, and never lets a rank do two things."""

import itertools
from dataclasses import replace

import pytest

from parallel.pipeline.actions import Action, Pair, Schedule, Step, parts
from parallel.pipeline.check import check
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs, Memory, peak_bytes, simulate

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
    closed = (ranks - 1) * (costs.compute(Action("F", 0, 0)) + costs.compute(Action("B", 0, 0)))
    assert idle(schedule, costs) == [closed] * ranks


@pytest.mark.parametrize(("ranks", "microbatches"), SHAPES)
@pytest.mark.parametrize("costs", [Costs(), Costs(2, 2, 1), Costs(1, 1, 0), Costs(4, 4, 3)])
def test_dualpipe_idles_by_its_closed_form(ranks: int, microbatches: int, costs: Costs) -> None:
    """(P/2 - 1)(F&B + B - 3W) on every rank, where forward and input gradient cost the same and W no more."""
    schedule = build("dualpipe", num_ranks=ranks, num_microbatches=microbatches)
    forward, backward, weight = (costs.compute(Action(kind, 0, 0)) for kind in "FBW")
    closed = (ranks / 2 - 1) * (forward + backward + backward - 3 * weight)
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


# --- closed forms of the other schedules --------------------------------------------------------------------------


@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 3), (2, 4), (4, 9), (8, 20), (16, 32)])
@pytest.mark.parametrize("costs", [Costs(), Costs(1, 2, 1), Costs(5, 1, 1)])
def test_gpipe_idles_by_its_closed_form(ranks: int, microbatches: int, costs: Costs) -> None:
    schedule = build("gpipe", num_ranks=ranks, num_microbatches=microbatches)
    closed = (ranks - 1) * (costs.compute(Action("F", 0, 0)) + costs.compute(Action("B", 0, 0)))
    assert simulate(schedule, costs).idle() == (closed,) * ranks


@pytest.mark.parametrize("per_rank", [1, 2, 3, 4])
@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 20), (8, 16), (16, 32)])
@pytest.mark.parametrize("costs", [Costs(), Costs(1, 1, 2), Costs(2, 1, 1)])
def test_interleaved_idles_by_its_closed_form(ranks: int, microbatches: int, per_rank: int, costs: Costs) -> None:
    """(P - 1)(F + B) of one of a rank's stages, where P divides M: 1/v of 1F1B's for the same layers."""
    schedule = build("interleaved", num_ranks=ranks, num_microbatches=microbatches, stages_per_rank=per_rank)
    closed = (ranks - 1) * (costs.compute(Action("F", 0, 0)) + costs.compute(Action("B", 0, 0)))
    assert max(simulate(schedule, costs).idle()) == closed


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16, 33, 64])
@pytest.mark.parametrize("more", [0, 1, 5, 40])
def test_zb1p_idles_by_its_closed_form(ranks: int, more: int) -> None:
    """(P - 1)(F + I - W), which is P - 1 at equal costs, for M >= P."""
    schedule = build("zb1p", num_ranks=ranks, num_microbatches=ranks + more)
    assert simulate(schedule).idle() == (ranks - 1,) * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8, 16, 33, 64])
@pytest.mark.parametrize("more", [0, 1, 5, 40])
def test_zbv_has_no_bubble_once_a_rank_has_begun(ranks: int, more: int) -> None:
    """F = I = W and M >= 2P - 1: rank r begins at r and is busy until it ends, at r + 6M."""
    microbatches = 2 * ranks - 1 + more
    timeline = simulate(build("zbv", num_ranks=ranks, num_microbatches=microbatches))
    for rank, steps in enumerate(timeline.ranks):
        assert (steps[0].start, steps[-1].end) == (rank, rank + 6 * microbatches)
    assert timeline.makespan == 6 * microbatches + ranks - 1


def test_zbv_has_bubbles_below_its_condition_or_at_other_costs() -> None:
    def inside(microbatches: int, costs: Costs) -> float:
        timeline = simulate(build("zbv", num_ranks=4, num_microbatches=microbatches), costs)
        return max(steps[-1].end - steps[0].start - sum(t.end - t.start for t in steps) for steps in timeline.ranks)

    assert inside(7, Costs()) == 0
    assert inside(5, Costs()) > 0
    assert inside(7, Costs(1, 2, 1)) > 0


@pytest.mark.parametrize("ranks", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("costs", [Costs(), Costs(2, 2, 1), Costs(4, 4, 3)])
def test_dualpipev_idles_by_its_closed_form(ranks: int, costs: Costs) -> None:
    """(P - 1)(F&B + B - 3W) in costs of its stages of half a rank's layers."""
    schedule = build("dualpipev", num_ranks=ranks, num_microbatches=2 * ranks + 3)
    backward = costs.compute(Action("B", 0, 0))
    pair = costs.compute(Action("F", 0, 0)) + backward
    closed = (ranks - 1) * (pair + backward - 3 * costs.compute(Action("W", 0, 0)))
    assert simulate(schedule, costs).idle() == (closed,) * ranks


@pytest.mark.parametrize("ranks", range(4, 66, 2))
def test_dualpipe_has_its_bubble_and_its_memory_for_every_even_number_of_ranks(ranks: int) -> None:
    schedule = build("dualpipe", num_ranks=ranks, num_microbatches=2 * ranks + 4)
    assert simulate(schedule).idle() == ((ranks // 2 - 1) * (3 + 2 - 3),) * ranks
    assert max(check(schedule).live_activations) == ranks + 1


# --- all-to-all: figures of another simulator, in units of the computation of one chunk's F, 2P chunks in the model ---

NO_A2A = {  # (ranks, micro-batches) -> schedule -> makespan
    (8, 20): {"1f1b": 162, "zbv": 127, "dualpipev": 134, "dualpipe": 132},
    (16, 32): {"1f1b": 282, "zbv": 207, "dualpipev": 222, "dualpipe": 220, "interleaved": 237},
    (16, 64): {"1f1b": 474, "zbv": 399, "dualpipev": 414, "dualpipe": 412, "interleaved": 429},
    (16, 120): {"1f1b": 810, "zbv": 735, "dualpipev": 750, "dualpipe": 748},
}
A2A = {
    (8, 20): {"1f1b": 270, "zbv": 214, "dualpipev": 175, "dualpipe": 174},
    (16, 32): {"1f1b": 470, "zbv": 350, "dualpipev": 303, "dualpipe": 302, "interleaved": 395},
    (16, 64): {"1f1b": 790, "zbv": 670, "dualpipev": 495, "dualpipe": 494, "interleaved": 715},
    (16, 120): {"1f1b": 1350, "zbv": 1230, "dualpipev": 831, "dualpipe": 830},
}
HALF_HIDDEN = {(16, 32): 261, (16, 64): 453, (16, 120): 789}
ALL_HIDDEN = {(16, 32): 220, (16, 64): 412, (16, 120): 748}


def chunks(name: str, shape: tuple[int, int], *, a2a: float, hidden: float = 0.0) -> float:
    schedule = build(name, num_ranks=shape[0], num_microbatches=shape[1])
    size = 2 / schedule.stages_per_rank
    costs = Costs(size, size, size, forward_comm=a2a * size, input_grad_comm=a2a * size, hidden=hidden)
    return simulate(schedule, costs).makespan


def rows(table: dict[tuple[int, int], dict[str, int]]) -> list[tuple[tuple[int, int], str, int]]:
    return [(shape, name, figure) for shape, row in table.items() for name, figure in row.items()]


@pytest.mark.parametrize(("shape", "name", "figure"), rows(NO_A2A))
def test_makespans_without_all_to_all(shape: tuple[int, int], name: str, figure: int) -> None:
    assert chunks(name, shape, a2a=0) == figure


@pytest.mark.parametrize(("shape", "name", "figure"), rows(A2A))
def test_makespans_with_all_to_all_as_long_as_computation(shape: tuple[int, int], name: str, figure: int) -> None:
    assert chunks(name, shape, a2a=1) == figure


@pytest.mark.parametrize("shape", HALF_HIDDEN)
def test_makespans_when_chunks_without_a_partner_hide_some_of_their_all_to_all(shape: tuple[int, int]) -> None:
    assert chunks("dualpipe", shape, a2a=1, hidden=0.5) == HALF_HIDDEN[shape]
    assert chunks("dualpipe", shape, a2a=1, hidden=1.0) == ALL_HIDDEN[shape] == NO_A2A[shape]["dualpipe"]


# --- uneven stages, memory ----------------------------------------------------------------------------------------


def test_every_stage_has_its_own_costs() -> None:
    """One micro-batch down and up a pipeline takes the sum of its parts."""
    schedule = build("1f1b", num_ranks=3, num_microbatches=1)
    costs = Costs((1.0, 2.0, 4.0), (8.0, 16.0, 32.0), (64.0, 128.0, 256.0))
    assert simulate(schedule, costs).makespan == 511
    assert [steps[0].end - steps[0].start for steps in simulate(schedule, costs).ranks] == [1, 2, 4]


def test_the_slowest_stage_sets_the_pace() -> None:
    schedule = build("1f1b", num_ranks=4, num_microbatches=50)
    assert simulate(schedule, Costs((1.0, 1.0, 3.0, 1.0), 1.0, 1.0)).makespan == pytest.approx(50 * 5, rel=0.05)


def test_peak_bytes_of_1f1b_are_its_live_activations() -> None:
    schedule = build("1f1b", num_ranks=4, num_microbatches=8)
    assert peak_bytes(schedule, Memory(activation=10.0, deferred=0.0, parameters=1.0)) == (41, 31, 21, 11)


def test_peak_bytes_count_deferred_weight_gradients_and_both_stages_of_a_rank() -> None:
    schedule = build("dualpipe", num_ranks=4, num_microbatches=8)
    live = check(schedule).live_activations
    assert peak_bytes(schedule, Memory(activation=1.0, deferred=1.0)) == live
    assert peak_bytes(schedule, Memory(1.0, 1.0, parameters=(1.0, 10.0, 100.0, 1000.0))) == tuple(
        count + extra for count, extra in zip(live, (1001, 110, 110, 1001), strict=True)
    )


@pytest.mark.parametrize("name", ["zb1p", "zbv", "dualpipe"])
def test_peak_bytes_equal_a_walk_over_the_list(name: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=9)
    S = schedule.num_stages
    memory = Memory(tuple(100.0 + s for s in range(S)), tuple(30.0 + s for s in range(S)))
    for rank, found in enumerate(peak_bytes(schedule, memory)):
        held: dict[tuple[int, int], float] = {}
        most = 0.0
        for action in (a for step in schedule.ranks[rank] for a in parts(step)):
            key = (action.stage, action.microbatch)
            held[key] = {"F": 100.0 + action.stage, "I": 30.0 + action.stage, "B": 0.0, "W": 0.0}[action.kind]
            most = max(most, sum(held.values()))
        assert found == most
