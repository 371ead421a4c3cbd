"""Static check of a schedule before anything runs: completeness, placement, order and deadlock. No torch."""

from collections import Counter, deque
from dataclasses import dataclass

from parallel.pipeline.actions import KINDS, Action, Message, Schedule, Step, parts


class InvalidSchedule(ValueError):
    """A schedule that would compute the wrong thing or never end; the message lists every fault found."""


@dataclass(frozen=True)
class Peaks:
    """Per rank: most stage activations alive at once, and most weight gradients waiting at once.

    An activation lives from its F to its W (or B): a deferred weight gradient still needs its inputs.
    """

    live_activations: tuple[int, ...]
    deferred_weight_grads: tuple[int, ...]


def check(schedule: Schedule) -> Peaks:
    """Peaks of a sound schedule; InvalidSchedule otherwise."""
    if len(schedule.ranks) != schedule.num_ranks:
        raise InvalidSchedule(f"{schedule.name}: {len(schedule.ranks)} lists of actions for {schedule.num_ranks} ranks")
    faults = _incomplete(schedule) + _misplaced(schedule)
    if not faults:
        faults = _out_of_order(schedule)
    if faults:
        raise InvalidSchedule(f"{schedule.name}: " + "; ".join(faults))
    return _peaks(schedule)


def _actions(schedule: Schedule, rank: int) -> list[Action]:
    return [action for step in schedule.ranks[rank] for action in parts(step)]


def _incomplete(schedule: Schedule) -> list[str]:
    found = Counter(action for rank in range(schedule.num_ranks) for action in _actions(schedule, rank))
    faults = [f"{action.describe()} is done {times} times" for action, times in found.items() if times > 1]
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_microbatches):
            kinds = "".join(kind for kind in "FBIW" if Action(kind, stage, m) in found)
            if kinds not in ("FB", "FIW"):
                faults.append(f"stage {stage} micro-batch {m} has actions '{kinds}', needs F and B, or F, I and W")
    faults += [f"{action.describe()} is of no known kind" for action in found if action.kind not in KINDS]
    faults += [
        f"{action.describe()} is outside {schedule.num_stages} stages and {schedule.num_microbatches} micro-batches"
        for action in found
        if not (0 <= action.stage < schedule.num_stages and 0 <= action.microbatch < schedule.num_microbatches)
    ]
    return faults


def _misplaced(schedule: Schedule) -> list[str]:
    return [
        f"{action.describe()} is on rank {rank}, belongs on {schedule.rank_of(action.stage, action.microbatch)}"
        for rank in range(schedule.num_ranks)
        for action in _actions(schedule, rank)
        if schedule.rank_of(action.stage, action.microbatch) != rank
    ]


def _out_of_order(schedule: Schedule) -> list[str]:
    """Run the lists against each other; whoever can never go on is in, or behind, a cycle of waits."""
    todo = [deque(steps) for steps in schedule.ranks]
    done: set[Action] = set()
    sent: set[Message] = set()
    progress = True
    while progress:
        progress = False
        for queue in todo:
            while queue and not _blocked(schedule, queue[0], done, sent):
                for action in parts(queue.popleft()):
                    done.add(action)
                    message = schedule.output(action)
                    if message is not None:
                        sent.add(message)
                progress = True
    if not any(todo):
        return []
    return ["deadlock: " + _cycle(schedule, [list(queue) for queue in todo], done, sent)]


def _blocked(schedule: Schedule, step: Step, done: set[Action], sent: set[Message]) -> Action | None:
    """The action that keeps a step from starting; both halves of a pair must be ready, for their phases interleave."""
    return next((action for action in parts(step) if _missing(schedule, action, done, sent)), None)


def _missing(schedule: Schedule, action: Action, done: set[Action], sent: set[Message]) -> str | None:
    """What the action still waits for, in words; None if it can run."""
    stage, m = action.stage, action.microbatch
    needed = schedule.inputs(action)
    if needed is not None and needed not in sent:
        return "an activation" if needed.kind == "F" else "a gradient"
    if action.kind in "BI" and Action("F", stage, m) not in done:
        return "its own forward"
    if action.kind == "W" and Action("I", stage, m) not in done:
        return "its own input gradient"
    return None


def _cycle(schedule: Schedule, todo: list[list[Step]], done: set[Action], sent: set[Message]) -> str:
    """Follow 'rank a's next action waits for rank b' from a stuck rank until a rank repeats."""
    rank = next(r for r, queue in enumerate(todo) if queue)
    seen: dict[int, int] = {}
    path: list[str] = []
    while rank not in seen:
        seen[rank] = len(path)
        action = _blocked(schedule, todo[rank][0], done, sent)
        assert action is not None
        needed = schedule.inputs(action)
        waits_for = _missing(schedule, action, done, sent)
        other = rank
        if needed is not None and needed not in sent:
            before = action.stage - 1 if action.kind == "F" else action.stage + 1
            other = schedule.rank_of(before, action.microbatch)
        path.append(f"rank {rank} at {action.describe()} waits for {waits_for} from rank {other}")
        rank = other
    return ", ".join(path[seen[rank] :])


def _peaks(schedule: Schedule) -> Peaks:
    live_peaks, deferred_peaks = [], []
    for rank in range(schedule.num_ranks):
        live = deferred = live_peak = deferred_peak = 0
        for action in _actions(schedule, rank):
            live += (action.kind == "F") - (action.kind in "BW")
            deferred += (action.kind == "I") - (action.kind == "W")
            live_peak, deferred_peak = max(live_peak, live), max(deferred_peak, deferred)
        live_peaks.append(live_peak)
        deferred_peaks.append(deferred_peak)
    return Peaks(tuple(live_peaks), tuple(deferred_peaks))
