"""A schedule in time with its chunks phase by phase: what the executor would do with an overlap level. No torch."""

from dataclasses import dataclass

from parallel.pipeline.actions import Action, Message, Pair, Schedule
from parallel.pipeline.overlap import Placed, Work, halves_of, plan
from parallel.pipeline.phase_costs import PhaseCosts, Resources
from parallel.pipeline.phases import Phase
from parallel.pipeline.simulate import Timed, Timeline


@dataclass(frozen=True)
class PhaseTimeline(Timeline):
    """compute_seconds: of each rank; what is left of the makespan is waiting for peers or for transfers."""

    compute_seconds: tuple[float, ...] = ()


def simulate_phases(schedule: Schedule, costs: PhaseCosts, *, level: str) -> PhaseTimeline:
    """Run a checked schedule as the executor does: a chunk takes its input before its first phase and sends its
    result after its last.

    level: as for `overlap.plan`; `off` leaves every transfer bare.
    """
    ranks = [_Rank(schedule, rank, costs, level) for rank in range(schedule.num_ranks)]
    arrival: dict[Message, float] = {}
    looking = list(range(schedule.num_ranks))
    while looking:
        rank = looking.pop()
        looking += {schedule.consumer(message) for message in ranks[rank].advance(arrival)} - {rank}
    assert all(rank.ended for rank in ranks), "check the schedule first"
    makespan = max(rank.resources.compute for rank in ranks)
    busy = sum(timed.end - timed.start for rank in ranks for timed in rank.timed)
    return PhaseTimeline(
        tuple(tuple(rank.timed) for rank in ranks),
        makespan,
        1 - busy / (makespan * schedule.num_ranks),
        tuple(rank.resources.busy for rank in ranks),
    )


class _Rank:
    """One rank, moved on as far as the messages that are known allow."""

    def __init__(self, schedule: Schedule, rank: int, costs: PhaseCosts, level: str) -> None:
        self.schedule, self.rank, self.costs = schedule, rank, costs
        self.resources = Resources(costs, halves_of(schedule, level), serial=level == "off")
        self.todo = plan(schedule, rank, num_links=costs.num_links, level=level)
        self.timed: list[Timed] = []
        self._work = self._position = 0
        self._phases: tuple[Placed, ...] | None = None
        self._begun: set[Action] = set()
        self._start = 0.0

    @property
    def ended(self) -> bool:
        """Whether all work is done."""
        return self._work == len(self.todo)

    def advance(self, arrival: dict[Message, float]) -> list[Message]:
        """Until something is missing; what was sent, whose time of arrival it notes."""
        sent: list[Message] = []
        while not self.ended:
            work = self.todo[self._work]
            if self._phases is None and not self._open(work, arrival):
                break
            assert self._phases is not None
            if not self._step(self._phases[self._position], arrival, sent):
                break
            self._position += 1
            if self._position == len(self._phases):
                self._close(work)
        return sent

    def _open(self, work: Work, arrival: dict[Message, float]) -> bool:
        """The phases in the order in which they will run: weight gradients do not wait for a late message."""
        phases = work.phases
        if [action.kind for action in work.actions] == ["W", "I"]:
            needed = self.schedule.inputs(work.actions[1])
            if needed is not None:
                if needed not in arrival:
                    return False
                if arrival[needed] > self.resources.compute:
                    phases = tuple(sorted(phases, key=lambda placed: placed.action.kind != "W"))
        self._phases, self._position, self._begun = phases, 0, set()
        self._start = -1.0
        return True

    def _step(self, placed: Placed, arrival: dict[Message, float], sent: list[Message]) -> bool:
        """One phase; False if its action's message is not known yet."""
        action, resources = placed.action, self.resources
        if action not in self._begun:
            needed = self.schedule.inputs(action)
            if needed is not None:
                if needed not in arrival:
                    return False
                resources.compute = max(resources.compute, arrival[needed])
            self._begun.add(action)
        if self._start < 0:
            self._start = resources.compute
        resources.run(placed)
        last_link = self.costs.num_links(action.stage) - 1
        last = (Phase("end", last_link), Phase("attend_grad", 0) if last_link else Phase("end_grad", 0))
        message = self.schedule.output(action) if placed.phase in last else None
        if message is not None:
            away = self.schedule.consumer(message) != self.rank
            arrival[message] = resources.compute + self.costs.message * away
            sent.append(message)
        return True

    def _close(self, work: Work) -> None:
        """Note the work in time; of two actions joined the first half is drawn for the first."""
        start, end = self._start, self.resources.compute
        actions = sorted(work.actions, key=lambda action: action.kind != "F")
        if len(actions) == 2 and actions[0].kind == "F":
            self.timed.append(Timed(Pair(actions[0], actions[1]), start, end))
        else:
            share = (end - start) / len(work.actions)
            for i, action in enumerate(work.actions):
                self.timed.append(Timed(action, start + i * share, start + (i + 1) * share))
        self._work += 1
        self._phases = None
