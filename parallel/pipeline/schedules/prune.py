"""Schedules for awkward numbers of micro-batches: those of a larger number, without the micro-batches too many."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from parallel.pipeline.actions import Action, Pair, Schedule, Step


def keep(schedule: Schedule, microbatches: Sequence[int]) -> Schedule:
    """The schedule with these micro-batches only, numbered anew in the given order.

    Always sound: whatever an action waits for, apart from its rank, belongs to its own micro-batch. A pair that loses
    one half becomes the other, alone. The order must keep the direction of each.
    """
    number = {old: new for new, old in enumerate(microbatches)}
    kept = replace(
        schedule,
        num_microbatches=len(microbatches),
        ranks=tuple(tuple(_kept(steps, number)) for steps in schedule.ranks),
    )
    assert all(kept.direction(new) == schedule.direction(old) for old, new in number.items())
    return kept


def _kept(steps: Iterable[Step], number: dict[int, int]) -> Iterable[Step]:
    for step in steps:
        if isinstance(step, Pair):
            forward, backward = _renamed(step.forward, number), _renamed(step.backward, number)
            renamed = Pair(forward, backward) if forward and backward else forward or backward
        else:
            renamed = _renamed(step, number)
        if renamed:
            yield renamed


def _renamed(action: Action, number: dict[int, int]) -> Action | None:
    if action.microbatch not in number:
        return None
    return Action(action.kind, action.stage, number[action.microbatch])
