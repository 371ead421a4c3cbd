"""Static check of a schedule before anything runs: completeness, placement, order and deadlock. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from parallel.pipeline.actions import Action, Schedule, parts
from parallel.pipeline.order import Walk, walk
from parallel.pipeline.placement import is_complete
from parallel.pipeline.transport import walk_blocking

MOST_FAULTS = 12  # printed; a schedule that is wrong throughout has millions
_BITS = {"F": 1, "B": 2, "I": 4, "W": 8}
_WHOLE, _SPLIT = 1 + 2, 1 + 4 + 8


class InvalidSchedule(ValueError):
    """A schedule that would compute the wrong thing or never end; the message lists the faults found."""

    user_error = True  # a schedule may come from a file


@dataclass(frozen=True)
class Peaks:
    """Per rank: most stage activations alive at once, and most weight gradients waiting at once.

    An activation lives from its F to its W (or B): a deferred weight gradient still needs its inputs.
    """

    live_activations: tuple[int, ...]
    deferred_weight_grads: tuple[int, ...]


def check(schedule: Schedule, *, blocking: int | None = None) -> Peaks:
    """Peaks of a sound schedule; InvalidSchedule otherwise.

    blocking: also demand that it ends where sends block, with so many receives posted ahead (`walk_blocking`).
    """
    faults = _malformed(schedule)
    if not faults:
        faults = [*_incomplete(schedule), *_misplaced(schedule)]
    if not faults:
        faults = _stuck(walk(schedule), "deadlock")
    if not faults and blocking is not None:
        name = f"deadlock where sends block with {blocking} receives posted ahead"
        faults = _stuck(walk_blocking(schedule, ahead=blocking), name)
    if faults:
        more = [f"and {len(faults) - MOST_FAULTS} more"] if len(faults) > MOST_FAULTS else []
        raise InvalidSchedule(f"{schedule.name}: " + "; ".join([*faults[:MOST_FAULTS], *more]))
    return _peaks(schedule)


def _actions(schedule: Schedule, rank: int) -> Iterator[Action]:
    for step in schedule.ranks[rank]:
        yield from parts(step)


def _malformed(schedule: Schedule) -> list[str]:
    """What makes the rest impossible to look at."""
    if len(schedule.ranks) != schedule.num_ranks:
        return [f"{len(schedule.ranks)} lists of actions for {schedule.num_ranks} ranks"]
    rows = {len(row) for row in schedule.placement}
    if rows != {schedule.num_stages} or not is_complete(schedule.placement, schedule.num_ranks):
        return [f"its placement does not put {schedule.num_stages} stages on each of {schedule.num_ranks} ranks"]
    return []


def _incomplete(schedule: Schedule) -> list[str]:
    """Actions that are missing, doubled, unknown or of a stage or micro-batch that does not exist."""
    S, M = schedule.num_stages, schedule.num_microbatches
    seen = bytearray(S * M)
    times: dict[Action, int] = {}  # of those that are done more than once
    strange: list[str] = []
    for rank in range(schedule.num_ranks):
        for action in _actions(schedule, rank):
            bit = _BITS.get(action.kind)
            if bit is None:
                strange.append(f"{action.describe()} is of no known kind")
            elif not (0 <= action.stage < S and 0 <= action.microbatch < M):
                strange.append(f"{action.describe()} is outside {S} stages and {M} micro-batches")
            else:
                key = action.stage * M + action.microbatch
                if seen[key] & bit:
                    times[action] = times.get(action, 1) + 1
                seen[key] |= bit
    faults = [f"{action.describe()} is done {count} times" for action, count in times.items()]
    for key, bits in enumerate(seen):
        if bits not in (_WHOLE, _SPLIT):
            kinds = "".join(kind for kind, bit in _BITS.items() if bits & bit)
            faults.append(f"stage {key // M} micro-batch {key % M} has actions '{kinds}', needs F and B, or F, I and W")
    return faults + strange


def _misplaced(schedule: Schedule) -> list[str]:
    S, M = schedule.num_stages, schedule.num_microbatches
    return [
        f"{action.describe()} is on rank {rank}, belongs on {schedule.rank_of(action.stage, action.microbatch)}"
        for rank in range(schedule.num_ranks)
        for action in _actions(schedule, rank)
        if 0 <= action.stage < S
        and 0 <= action.microbatch < M
        and schedule.rank_of(action.stage, action.microbatch) != rank
    ]


def _stuck(found: Walk, name: str) -> list[str]:
    return [f"{name}: " + ", ".join(map(str, found.cycle()))] if found.waits else []


def _peaks(schedule: Schedule) -> Peaks:
    live_peaks, deferred_peaks = [], []
    for rank in range(schedule.num_ranks):
        live = deferred = live_peak = deferred_peak = 0
        for action in _actions(schedule, rank):
            kind = action.kind
            if kind == "F":
                live += 1
                live_peak = max(live_peak, live)
            elif kind == "I":
                deferred += 1
                deferred_peak = max(deferred_peak, deferred)
            else:
                live -= 1
                deferred -= kind == "W"
        live_peaks.append(live_peak)
        deferred_peaks.append(deferred_peak)
    return Peaks(tuple(live_peaks), tuple(deferred_peaks))
