"""Ranks that share cores, against the simulator that gives everybody a core, closed forms and hand-made cases."""

from dataclasses import replace

import pytest

from parallel.pipeline.actions import Action, Schedule
from parallel.pipeline.overlap import LEVELS
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.placement import linear
from parallel.pipeline.schedules import SCHEDULES, build
from parallel.pipeline.simulate_phases import simulate_phases
from parallel.plan.shared_cores import MeasuredCosts, OfPhases, PhaseKey, simulate_shared

LAYER = LayerCosts(0.3, 0.1, 0.6, 0.4, 0.35, 0.35, 0.15, 0.5, 0.45, 0.3, 0.2, 0.1, 0.7)


def uneven(schedule: Schedule) -> PhaseCosts:
    stages = range(schedule.num_stages)
    return PhaseCosts(
        LAYER,
        num_layers=tuple(stage % 3 for stage in stages),
        end=tuple(0.1 + 0.05 * stage for stage in stages),
        end_grad=tuple(0.2 + 0.01 * stage for stage in stages),
        end_weights=0.15,
        message=0.07,
    )


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_with_a_core_for_everybody_it_is_the_simulator(name: str, level: str) -> None:
    schedule = build(name, num_ranks=4, num_microbatches=9)
    costs = uneven(schedule)
    expected = simulate_phases(schedule, costs, level=level).makespan
    # a rank's thread and its transfer at once, on two copies of four ranks
    found = simulate_shared(schedule, OfPhases(costs), level=level, cores=16, copies=2)
    assert found.seconds == pytest.approx(expected, rel=1e-9)
    assert simulate_shared(schedule, OfPhases(costs), level=level, cores=4).seconds >= expected - 1e-9


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_one_core_never_idles(name: str, level: str) -> None:
    """Messages that take no time always leave something that can run."""
    schedule = build(name, num_ranks=4, num_microbatches=8)
    costs = replace(uneven(schedule), message=0.0)
    found = simulate_shared(schedule, OfPhases(costs), level=level, cores=1)
    assert found.seconds == pytest.approx(found.core_seconds) and found.busy == pytest.approx(1)
    layers = sum(stage % 3 for stage in range(schedule.num_stages))
    ends = sum(0.1 + 0.05 * s + 0.2 + 0.01 * s + 0.15 for s in range(schedule.num_stages))
    whole = sum(getattr(LAYER, name) for name in LAYER.__dataclass_fields__)
    assert found.core_seconds == pytest.approx(8 * (layers * whole + ends))


def test_two_copies_on_two_cores_are_one_on_one() -> None:
    schedule = build("1f1b", num_ranks=4, num_microbatches=8)
    costs = OfPhases(uneven(schedule))
    one = simulate_shared(schedule, costs, level="pairs", cores=1)
    two = simulate_shared(schedule, costs, level="pairs", cores=2, copies=2)
    assert two.seconds == pytest.approx(one.seconds) and two.core_seconds == pytest.approx(2 * one.core_seconds)


def test_four_threads_on_three_cores_by_hand() -> None:
    """Two forwards of 1 s through two ranks: one rank alone at full speed, both at three quarters, one alone."""
    schedule = build("gpipe", num_ranks=2, num_microbatches=2)
    costs = OfPhases(PhaseCosts(LayerCosts.even(0.0, 0.0), 0, end=1.0))
    found = simulate_shared(schedule, costs, level="off", cores=3, copies=2)
    assert found.seconds == pytest.approx(1 + 4 / 3 + 1)
    assert found.core_seconds == pytest.approx(8)


def one_layer(own: float, beside: float) -> MeasuredCosts:
    """A stage of one layer: every phase of the forward takes `own`, every transfer `beside` on other threads."""
    kinds = [("attend", 0), ("dispatch", 0), ("shared", 0), ("experts", 0), ("combine", 0), ("end", 1)]
    back = [("end_grad", 1), ("combine_grad", 0), ("shared_grad", 0), ("experts_grad", 0), ("dispatch_grad", 0),
            ("attend_grad", 0)]  # fmt: skip
    keys = {PhaseKey(0, 1, kind, link): own for kind, link in kinds}
    nothing = {PhaseKey(0, 1, kind, link): 0.0 for kind, link in back}
    transfers = [key for key in (*keys, *nothing) if "dispatch" in key.kind or "combine" in key.kind]
    travel = {key: beside if key in keys else 0.0 for key in transfers}
    return MeasuredCosts({0: 2}, {**keys, **nothing}, travel, {})


def test_a_transfer_takes_a_core_from_its_own_rank() -> None:
    """attend 1, dispatch 1 + 2 beside shared 1, experts 1, combine 1 + 2, end 1: 1 s and 2 s are waited for."""
    chunk = (Action("F", 0, 0), Action("B", 0, 0))
    schedule = Schedule("one", 1, 1, 1, linear(1), (chunk,))
    costs = one_layer(1.0, 2.0)
    assert simulate_shared(schedule, costs, level="pairs", cores=2).seconds == pytest.approx(6 + 1 + 2)
    assert simulate_shared(schedule, costs, level="pairs", cores=1).seconds == pytest.approx(6 + 4)
    assert simulate_shared(schedule, costs, level="off", cores=2).seconds == pytest.approx(6 + 4)
    late = replace(costs, latency=0.25)
    # of the dispatch and the combine, and of the backward's two, which take nothing else
    assert simulate_shared(schedule, late, level="pairs", cores=2).seconds == pytest.approx(9 + 4 * 0.25)


def test_waiting_inside_a_phase_takes_no_core() -> None:
    """Two ranks on one core: alone a second of work and one of waiting; together, in step, two of work and one."""
    schedule = build("gpipe", num_ranks=2, num_microbatches=4)
    stages = {0: 1, 1: 1}
    own = {PhaseKey(stage, 1, kind, 0): float(kind == "end") for stage in stages for kind in ("end", "end_grad")}
    asleep = {PhaseKey(stage, 1, "end", 0): 1.0 for stage in stages}
    costs = MeasuredCosts(stages, own, {}, {}, asleep)
    found = simulate_shared(schedule, costs, level="off", cores=1)
    assert found.seconds == pytest.approx(2 + 3 * 3 + 2) and found.core_seconds == pytest.approx(8)


def test_weight_gradients_are_paid_where_they_are_computed() -> None:
    schedule = build("zb1p", num_ranks=2, num_microbatches=4)
    own = {PhaseKey(stage, 1, kind, 0): 0.0 for stage in (0, 1) for kind in ("end", "end_grad")}
    put_off = {PhaseKey(stage, 1, "end_grad", 0): 1.0 for stage in (0, 1)}
    costs = MeasuredCosts({0: 1, 1: 1}, own, {}, put_off)
    found = simulate_shared(schedule, costs, level="off", cores=2)
    assert found.core_seconds == pytest.approx(8) and found.seconds == pytest.approx(4)
