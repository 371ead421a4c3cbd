"""A simulated schedule as the spans that `pictures` draws."""

from collections.abc import Sequence
from pathlib import Path

from launcher.pictures import Span, timeline
from parallel.pipeline.actions import Pair, Schedule
from parallel.pipeline.schedules import build
from parallel.pipeline.simulate import Costs, Timed, simulate


def span(schedule: Schedule, timed: Timed) -> Span:
    """One step of a rank as a box; a pair as one box with both halves."""
    step = timed.step
    if isinstance(step, Pair):
        f, b = step.forward, step.backward
        return Span(
            timed.start, timed.end, "FB", f.stage, f.microbatch, schedule.direction(f.microbatch),
            b.stage, b.microbatch, schedule.direction(b.microbatch), b.kind,
        )  # fmt: skip
    direction = schedule.direction(step.microbatch)
    return Span(timed.start, timed.end, step.kind, step.stage, step.microbatch, direction)


def spans(schedule: Schedule, costs: Costs) -> Sequence[Sequence[Span]]:
    """Every rank's boxes, from the very action lists that the executor runs."""
    return [[span(schedule, timed) for timed in rank] for rank in simulate(schedule, costs).ranks]


def draw(name: str, path: Path, *, num_ranks: int, num_microbatches: int, costs: Costs) -> None:
    """PNG of a schedule under the given costs."""
    schedule = build(name, num_ranks=num_ranks, num_microbatches=num_microbatches)
    found = simulate(schedule, costs)
    timeline(
        spans(schedule, costs),
        path,
        title=f"{name}: {num_ranks} pipeline ranks, {num_microbatches} micro-batches",
        subtitle=f"simulated from the action lists that run; idle {found.bubble:.1%} of {found.makespan:g}",
        time_label="time, in units of one forward",
    )


if __name__ == "__main__":
    # python -m launcher.schedule_picture OUT.png: the README's picture
    import sys

    draw("dualpipe", Path(sys.argv[1]), num_ranks=8, num_microbatches=20, costs=Costs(overlap=0.5))
