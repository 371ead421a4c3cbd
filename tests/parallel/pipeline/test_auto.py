"""`auto` takes the fastest that fits, says why, and never differs between two calls."""

from typing import Any

import pytest

from parallel.pipeline.actions import Schedule
from parallel.pipeline.auto import Fits, Phases, choose
from parallel.pipeline.check import check
from parallel.pipeline.phase_costs import LayerCosts, PhaseCosts
from parallel.pipeline.schedules import SCHEDULES, ScheduleError, build
from parallel.pipeline.simulate import Costs, Memory, peak_bytes, simulate
from parallel.pipeline.simulate_phases import simulate_phases


def chunks(a2a: float, *, message: float = 0.0):
    """Costs in units of one chunk's F, of which a rank has two."""

    def costs_of(schedule: Schedule) -> Costs:
        size = 2 / schedule.stages_per_rank
        return Costs(size, size, size, message, forward_comm=a2a * size, input_grad_comm=a2a * size)

    return costs_of


def memory_of(schedule: Schedule) -> Memory:
    return Memory(2.0**30 / schedule.stages_per_rank, 2.0**30 / schedule.stages_per_rank, 2.0**30)


def test_without_all_to_all_it_takes_zbv_and_one_copy() -> None:
    choice = choose(num_ranks=16, num_microbatches=32, fits=Fits(num_layers=61), costs_of=chunks(0))
    assert choice.best.name == "zbv" and choice.best.copies == 1
    assert choice.best.makespan is not None and choice.best.makespan <= 207


def test_with_all_to_all_it_takes_dualpipe_and_says_what_that_costs() -> None:
    choice = choose(num_ranks=16, num_microbatches=120, fits=Fits(num_layers=61), costs_of=chunks(1))
    assert choice.best.name == "dualpipe" and choice.best.makespan == 830
    assert choice.reason().endswith("at the price of a second copy of the weights")
    single = choose(num_ranks=16, num_microbatches=120, fits=Fits(61, max_copies=1), costs_of=chunks(1))
    assert single.best.name == "dualpipev"
    assert "dualpipe: 2 copies of the weights, 1 allowed" in single.why()


@pytest.mark.parametrize("a2a", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (2, 3), (3, 7), (4, 8), (8, 20)])
def test_nothing_that_fits_is_faster(a2a: float, ranks: int, microbatches: int) -> None:
    fits = Fits(num_layers=2 * ranks, live=ranks + 1)
    choice = choose(num_ranks=ranks, num_microbatches=microbatches, fits=fits, costs_of=chunks(a2a, message=0.1))
    assert choice.best.makespan is not None
    for name in SCHEDULES:
        if name == "dualpipe" and ranks % 2:
            continue
        schedule = build(name, num_ranks=ranks, num_microbatches=microbatches)
        live = max(check(schedule).live_activations) / schedule.stages_per_rank
        makespan = simulate(schedule, chunks(a2a, message=0.1)(schedule)).makespan
        assert live > ranks + 1 or choice.best.makespan <= makespan + 1e-9
    again = choose(num_ranks=ranks, num_microbatches=microbatches, fits=fits, costs_of=chunks(a2a, message=0.1))
    assert again == choice


def test_every_candidate_is_listed_with_its_figures_or_its_reason() -> None:
    choice = choose(num_ranks=3, num_microbatches=8, fits=Fits(num_layers=5), costs_of=chunks(0))
    assert {c.name for c in choice.candidates} == set(SCHEDULES)
    reasons = {c.name: c.rejected for c in choice.candidates if c.rejected}
    assert reasons["zbv"] == reasons["dualpipev"] == reasons["interleaved"] == "6 stages for 5 layers"
    assert "must be even, not 3" in (reasons["dualpipe"] or "")
    for c in choice.candidates:
        assert c.rejected or None not in (c.makespan, c.bubble, c.peak_live, c.copies, c.uneven)
    assert all(len(line) <= 80 for line in choice.why() if "must be even" not in line)


def test_given_layers_allow_only_their_number_of_stages() -> None:
    choice = choose(num_ranks=4, num_microbatches=8, fits=Fits(8, stages=8), costs_of=chunks(0))
    assert {c.name for c in choice.candidates if not c.rejected} == {"interleaved", "zbv", "dualpipev"}


def test_memory_caps_reject_and_are_named() -> None:
    shape: Any = {"num_ranks": 4, "num_microbatches": 16}
    choice = choose(**shape, fits=Fits(8, bytes=6 * 2**30), costs_of=chunks(0), memory_of=memory_of)
    for c in choice.candidates:
        if c.name == "interleaved" and c.rejected and "stages" in c.rejected:
            continue
        schedule = build(c.name, **shape)
        assert c.peak_bytes == max(peak_bytes(schedule, memory_of(schedule)))
        assert bool(c.rejected) == (c.peak_bytes > 6 * 2**30)
    assert "gpipe: 17.0 GiB on its fullest rank, 6.0 allowed" in choice.why()
    with pytest.raises(ScheduleError, match=r"no schedule fits 4 ranks and 16 micro-batches: gpipe: 17\.0 GiB"):
        choose(**shape, fits=Fits(8, bytes=2**30), costs_of=chunks(0), memory_of=memory_of)


def test_a_tie_goes_to_one_copy_and_less_memory() -> None:
    """One rank: every schedule takes the same time; 1F1B holds one activation."""
    choice = choose(num_ranks=1, num_microbatches=4, fits=Fits(1), costs_of=chunks(0))
    assert choice.best.name == "1f1b" and choice.best.peak_live == 1
    assert "ties with" in choice.reason()


def test_uneven_stages_are_counted() -> None:
    """A last stage of twice the cost hurts where its rank has another stage too."""

    def costs_of(schedule: Schedule) -> Costs:
        size = [1 / schedule.stages_per_rank] * schedule.num_stages
        size[-1] += 1.0
        cost = tuple(size)
        return Costs(cost, cost, cost)

    choice = choose(num_ranks=4, num_microbatches=16, fits=Fits(8), costs_of=costs_of)
    uneven = {c.name: c.uneven for c in choice.candidates if c.uneven}
    assert uneven["1f1b"] == pytest.approx(2 / (5 / 4)) and uneven["zbv"] == pytest.approx(1.5 / (5 / 8))


def test_phases_are_priced_with_pairs_and_halves_where_they_are_given() -> None:
    """All-to-all as long as computation: half of that of lone chunks is hidden under `all`, none with `pairs`."""
    found = {}
    for level in ("pairs", "all"):
        phases = Phases(lambda schedule: PhaseCosts.of_stage_costs(chunks(1)(schedule)), level)
        choice = choose(num_ranks=8, num_microbatches=20, fits=Fits(40), costs_of=chunks(1), phases=phases)
        found[level] = {c.name: c for c in choice.candidates}
        for c in choice.candidates:
            wanted = c.stages_per_rank if c.name == "interleaved" else None
            schedule = build(c.name, num_ranks=8, num_microbatches=20, stages_per_rank=wanted)
            alone = simulate_phases(schedule, phases.costs_of(schedule), level=level)
            assert c.makespan == alone.makespan >= (choice.best.makespan or 0.0)
    one, other = found["all"]["dualpipe"], found["pairs"]["dualpipe"]
    assert one.makespan is not None and other.makespan is not None and one.makespan < 0.95 * other.makespan
    assert one.makespan != choose(num_ranks=8, num_microbatches=20, fits=Fits(40), costs_of=chunks(1)).best.makespan


def test_without_transfers_the_phases_of_dualpipe_beat_zbv() -> None:
    """A gradient leaves before its chunk's weight gradients: 206 units where whole steps take 220, and ZBV 207."""
    phases = Phases(lambda schedule: _in_one_piece(2 / schedule.stages_per_rank), "pairs")
    choice = choose(num_ranks=16, num_microbatches=32, fits=Fits(61), costs_of=chunks(0), phases=phases)
    assert choice.best.name == "dualpipe" and choice.best.makespan == pytest.approx(206)
    assert {c.name: c.makespan for c in choice.candidates}["zbv"] == pytest.approx(207)


def _in_one_piece(seconds: float) -> PhaseCosts:
    return PhaseCosts(LayerCosts.even(0, 0), 0, end=seconds, end_grad=seconds, end_weights=seconds)
