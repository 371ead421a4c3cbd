"""Phases in time: chunks and pairs by hand, whole schedules against the plain simulator and published targets."""

from dataclasses import replace
from functools import cache

import pytest

from parallel.pipeline.actions import Action, Pair, Schedule, parts
from parallel.pipeline.overlap import LEVELS, Placed, plan
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts, time_of
from parallel.pipeline.phases import backward_program, forward_program
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.simulate import Costs, simulate
from parallel.pipeline.simulate_phases import PhaseTimeline, simulate_phases

LAYER = LayerCosts.even(1.0, 1.0)  # attention 0.5, shared expert 0.1, experts 0.4, dispatch and combine 0.5 each
F, B = Action("F", 0, 0), Action("B", 0, 1)


def forward(layers: int, halves: int = 1, costs: LayerCosts = LAYER) -> float:
    phases = [Placed(F, phase) for phase in forward_program(1 + layers, halves=halves)]
    return time_of(phases, PhaseCosts(costs, layers), halves=halves)


def backward(layers: int, halves: int = 1, *, weights: bool, costs: LayerCosts = LAYER) -> float:
    phases = [Placed(B, phase) for phase in backward_program(1 + layers, halves=halves, weights=weights)]
    return time_of(phases, PhaseCosts(costs, layers), halves=halves)


def test_a_chunk_alone_hides_its_shared_expert() -> None:
    """attend 0.5, dispatch 0.5 over the shared expert, experts 0.4, combine 0.5."""
    assert forward(1) == pytest.approx(1.9)
    assert forward(4) == pytest.approx(4 * 1.9)


def test_in_two_halves_one_computes_while_the_other_travels() -> None:
    """0.5 attend; dispatches end at 0.75 and 1.0, experts run to 0.95 and 1.2, combines to 1.25 and 1.5."""
    assert forward(1, halves=2) == pytest.approx(1.5)


def test_an_input_gradient_alone_and_in_halves() -> None:
    """combine's gradient 0.5 over the shared expert's 0.1; experts 0.4; dispatch's gradient 0.5; attention 0.5."""
    assert backward(1, weights=False) == pytest.approx(1.9)
    assert backward(1, halves=2, weights=False) == pytest.approx(1.5)


def test_weight_gradients_run_under_transfers() -> None:
    """Two layers: those of the upper one, and of the experts, hide under what travels; the sum would be 5.8."""
    whole = backward(2, weights=True)
    assert 2 * 2.0 <= whole < backward(2, weights=False) + 2.0
    free = replace(LAYER, attend_weights=0.0, shared_weights=0.0, experts_weights=0.0)
    assert backward(2, weights=True, costs=free) == pytest.approx(backward(2, weights=False))


def pair_time(layers: int, costs: LayerCosts) -> float:
    schedule = Schedule("x", 1, 1, 2, ((0,),), ((Action("F", 0, 0), Pair(Action("F", 0, 1), Action("B", 0, 0))),))
    work = plan(schedule, 0, num_links=lambda stage: 1 + layers, level="pairs")[1]
    return time_of(work.phases, PhaseCosts(costs, layers))


@pytest.mark.parametrize("layers", [1, 2, 4, 8])
def test_a_pair_is_no_shorter_than_its_computation_and_near_it(layers: int) -> None:
    """3 of computation and 2 of transfers a layer: what stands out at the ends does not grow with the layers."""
    found = pair_time(layers, LAYER)
    assert 3 * layers - 1e-9 <= found <= 3 * layers + 0.5
    serial = forward(layers) + backward(layers, weights=True)
    assert found < serial


def test_a_pair_cannot_beat_its_transfers() -> None:
    assert pair_time(4, LayerCosts.even(0.1, 1.0)) >= 4 * 2.0


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("message", [0.0, 0.3])
def test_without_overlap_it_is_the_plain_simulator(name: str, message: float) -> None:
    """Up to what lies inside a step: a backward sends its gradient before its weight gradients, not after them."""
    schedule = split(build(name, num_ranks=4, num_microbatches=9))
    plain = Costs(1.0, 1.0, 1.0, message, forward_comm=1.0, input_grad_comm=1.0)
    expected = simulate(schedule, plain)
    found = simulate_phases(schedule, PhaseCosts(LAYER, message=message), level="off")
    assert found.makespan == pytest.approx(expected.makespan)
    for ours, theirs in zip(found.ranks, expected.ranks, strict=True):
        assert [timed.start for timed in ours] == pytest.approx([timed.start for timed in theirs])
    assert found.compute_seconds == pytest.approx([3 * 9 * schedule.stages_per_rank] * 4)


def split(schedule: Schedule) -> Schedule:
    """Pairs apart, every B as I and W."""
    ranks = []
    for steps in schedule.ranks:
        actions = [action for step in steps for action in parts(step)]
        kinds = {"B": "IW"}
        ranks.append(
            tuple(Action(kind, a.stage, a.microbatch) for a in actions for kind in kinds.get(a.kind, a.kind))
        )  # fmt: skip
    return replace(schedule, ranks=tuple(ranks))


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_level_of_overlap_gains(name: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=12)
    off, pairs, every = (simulate_phases(schedule, PhaseCosts(LAYER, 2), level=level).makespan for level in LEVELS)
    assert every < pairs <= off
    bound = 3 * 2 * 12 * schedule.stages_per_rank
    assert every >= bound - 1e-9


def test_steps_are_those_of_the_schedule_and_never_two_at_once() -> None:
    schedule = build("dualpipe", num_ranks=4, num_microbatches=12)
    for level in LEVELS:
        found = simulate_phases(schedule, PhaseCosts(LAYER, 2, end=0.5, end_grad=0.5, end_weights=0.2), level=level)
        for rank, steps in enumerate(found.ranks):
            expected = {a for step in schedule.ranks[rank] for a in parts(step)}
            assert {a for timed in steps for a in parts(timed.step)} == expected
            ends = [timed.end for timed in steps]
            assert all(end <= timed.start + 1e-9 for end, timed in zip(ends, steps[1:], strict=False))


@cache
def eight_steps(microbatches: int, level: str, layers: int) -> PhaseTimeline:
    """P 16, all-to-all as long as computation, units of the computation of a chunk's F, of which a stage has two."""
    schedule = build("dualpipe", num_ranks=16, num_microbatches=microbatches)
    costs = PhaseCosts(LayerCosts.even(2 / layers, 2 / layers), layers)
    return simulate_phases(schedule, costs, level=level)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize(("microbatches", "eight", "half_hidden"), [(32, 302, 261), (64, 494, 453), (120, 830, 789)])
def test_halves_and_weights_hide_what_half_of_the_transfers_would_cost(
    microbatches: int, eight: int, half_hidden: int, layers: int
) -> None:
    """Attention half of the computation, shared expert a tenth: the eight steps with nothing but pairs overlapped, and
    with the transfers of lone chunks hidden by their own other half and by weight gradients.
    """
    assert half_hidden < eight_steps(microbatches, "pairs", layers).makespan < eight
    assert eight_steps(microbatches, "all", layers).makespan <= half_hidden


def test_stages_of_different_length_are_priced_each() -> None:
    schedule = build("1f1b", num_ranks=2, num_microbatches=1)
    costs = PhaseCosts(LAYER, (1, 3), end=(0.0, 2.0), end_grad=(0.0, 2.0), end_weights=(0.0, 1.0))
    first, last = simulate_phases(schedule, costs, level="pairs").ranks
    assert first[0].end == pytest.approx(1.9)
    assert last[0].end - last[0].start == pytest.approx(3 * 1.9 + 2)
