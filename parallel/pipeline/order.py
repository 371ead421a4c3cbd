"""An order in which the steps of a schedule can run, or the waits that stop them. No torch.

Both the checker and the simulator go by it. Actions are looked up in flat tables by stage * M + micro-batch, and a
rank is looked at again only when what it waits for has happened: 64 ranks with 512 micro-batches take a fraction of a
second.
"""

from dataclasses import dataclass, field

from parallel.pipeline.actions import Action, Schedule, Step, parts


@dataclass(frozen=True)
class Wait:
    """Rank `rank`, at `action`, cannot go on before rank `other` has done something; `what` in words."""

    rank: int
    action: Action
    what: str
    other: int

    def __str__(self) -> str:
        return f"rank {self.rank} at {self.action.describe()} waits for {self.what} from rank {self.other}"


@dataclass
class Walk:
    """Steps as (rank, position in its list), each after all it waits for; waits: of the ranks that are stuck."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    waits: dict[int, Wait] = field(default_factory=dict)

    def cycle(self) -> list[Wait]:
        """From a stuck rank along its waits until a rank repeats: the waits that hold each other up."""
        rank, path, seen = next(iter(sorted(self.waits))), [], {}
        while rank in self.waits and rank not in seen:
            seen[rank] = len(path)
            path.append(self.waits[rank])
            rank = path[-1].other
        return path[seen.get(rank, 0) :]


class Progress:
    """Which actions have run."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule, self.M = schedule, schedule.num_microbatches
        self.last = schedule.num_stages - 1
        size = schedule.num_stages * self.M
        self.forward, self.backward = bytearray(size), bytearray(size)  # backward: B or I

    def done(self, action: Action) -> None:
        """Note an action."""
        key = action.stage * self.M + action.microbatch
        if action.kind == "F":
            self.forward[key] = 1
        elif action.kind != "W":
            self.backward[key] = 1

    def missing(self, step: Step) -> Wait | None:
        """What keeps a step from starting, if anything; both halves of a pair must be ready, for they interleave."""
        for action in parts(step):
            kind, stage, microbatch = action.kind, action.stage, action.microbatch
            key = stage * self.M + microbatch
            if kind == "F":
                if stage and not self.forward[key - self.M]:
                    return self._wait(action, "an activation", stage - 1)
            elif kind == "W":
                if not self.backward[key]:
                    return self._wait(action, "its own input gradient", stage)
            elif stage < self.last and not self.backward[key + self.M]:
                return self._wait(action, "a gradient", stage + 1)
            elif not self.forward[key]:
                return self._wait(action, "its own forward", stage)
        return None

    def _wait(self, action: Action, what: str, stage: int) -> Wait:
        rank_of = self.schedule.rank_of
        return Wait(rank_of(action.stage, action.microbatch), action, what, rank_of(stage, action.microbatch))


def walk(schedule: Schedule) -> Walk:
    """Every rank as far as it gets, messages never blocking their senders."""
    progress, found = Progress(schedule), Walk()
    position = [0] * schedule.num_ranks
    looking = list(reversed(range(schedule.num_ranks)))
    waiting_for: dict[int, set[int]] = {}  # rank -> ranks that wait for something of it
    while looking:
        rank = looking.pop()
        steps, at = schedule.ranks[rank], position[rank]
        wait = None
        while at < len(steps):
            wait = progress.missing(steps[at])
            if wait is not None:
                waiting_for.setdefault(wait.other, set()).add(rank)
                found.waits[rank] = wait
                break
            for action in parts(steps[at]):
                progress.done(action)
            found.steps.append((rank, at))
            at += 1
        if wait is None:
            found.waits.pop(rank, None)
        if at > position[rank]:
            position[rank] = at
            looking += waiting_for.pop(rank, ())
    return found
