"""A schedule, simulated or measured, as the spans that `timeline` draws."""

from collections.abc import Sequence
from pathlib import Path

from launcher.show.timeline import Span, Ways, timeline
from parallel.pipeline.actions import Action, Pair, Schedule, Step
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import StepCosts, Timed, simulate

Rows = Sequence[Sequence[Span]]


def way(schedule: Schedule, action: Action) -> int:
    """The hue of an action: its direction; with one direction and several stages a rank, the turn, even or odd."""
    if schedule.bidirectional:
        return schedule.direction(action.microbatch)
    return action.stage // schedule.num_ranks % 2


def ways(schedule: Schedule) -> Ways:
    """What the hues mean, in words that also follow CAPITALS and small letters."""
    if schedule.bidirectional:
        return Ways("from rank 0", f"from rank {schedule.num_ranks - 1}")
    per_rank = schedule.stages_per_rank
    if per_rank <= 2:
        return Ways("first stage", "second stage")
    return Ways("turns 1, 3, ...", "turns 2, 4, ...")


def span(schedule: Schedule, step: Step, start: float, end: float) -> Span:
    """One step of a rank as a box; a pair as one box with both halves."""
    if isinstance(step, Pair):
        f, b = step.forward, step.backward
        return Span(
            start, end, "FB", f.stage, f.microbatch, way(schedule, f), b.stage, b.microbatch, way(schedule, b), b.kind
        )  # fmt: skip
    return Span(start, end, step.kind, step.stage, step.microbatch, way(schedule, step))


def spans(schedule: Schedule, ranks: Sequence[Sequence[Timed]]) -> Rows:
    """Every rank's boxes, in time."""
    return [[span(schedule, timed.step, timed.start, timed.end) for timed in rank] for rank in ranks]


def draw(
    name: str,
    path: Path,
    *,
    num_ranks: int,
    num_microbatches: int,
    costs: StepCosts,
    stages_per_rank: int | None = None,
) -> None:
    """PNG of a schedule under the given costs, from the very action lists that the executor runs."""
    schedule = build(
        name, num_ranks=num_ranks, num_microbatches=num_microbatches, stages_per_rank=stages_per_rank
    )  # fmt: skip
    found = simulate(schedule, costs)
    timeline(
        spans(schedule, found.ranks),
        path,
        title=f"{name}: {num_ranks} pipeline ranks, {num_microbatches} micro-batches",
        subtitle=f"simulated from the action lists that run; idle {found.bubble:.1%} of {found.makespan:g}",
        time_label="time, in units of one forward",
        ways=ways(schedule),
    )


if __name__ == "__main__":
    # python -m launcher.show.schedule_picture OUT.png: the README's picture
    import sys

    from parallel.pipeline.simulate import Costs

    draw("dualpipe", Path(sys.argv[1]), num_ranks=8, num_microbatches=20, costs=Costs(overlap=0.5))
