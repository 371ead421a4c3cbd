"""A schedule in time with its chunks phase by phase: what the executor would do with an overlap level. No torch."""

from dataclasses import dataclass

from parallel.pipeline.actions import Action, Message, Pair, Schedule
from parallel.pipeline.overlap import Work, completes, halves_of, plan, sending
from parallel.pipeline.phase_costs import PhaseCosts, Resources
from parallel.pipeline.simulate import Timed, Timeline


@dataclass(frozen=True)
class PhaseTimeline(Timeline):
    """compute_seconds: of each rank; what is left of the makespan is waiting for peers or for transfers."""

    compute_seconds: tuple[float, ...] = ()


def simulate_phases(schedule: Schedule, costs: PhaseCosts, *, level: str) -> PhaseTimeline:
    """Run a checked schedule as the executor does: a chunk takes its input before its first phase and sends its
    result as soon as it is complete.

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
        self._work = 0
        self._open()

    def _open(self) -> None:
        """Before the first phase of a work."""
        self._position = self._num_sent = 0
        self._begun: set[Action] = set()
        self._complete: set[Action] = set()
        self._start = -1.0

    @property
    def ended(self) -> bool:
        """Whether all work is done."""
        return self._work == len(self.todo)

    def advance(self, arrival: dict[Message, float]) -> list[Message]:
        """Until something is missing; what was sent, whose time of arrival it notes."""
        sent: list[Message] = []
        while not self.ended:
            work = self.todo[self._work]
            if not self._step(work, arrival, sent):
                break
            self._position += 1
            if self._position == len(work.phases):
                self._close(work)
        return sent

    def _step(self, work: Work, arrival: dict[Message, float], sent: list[Message]) -> bool:
        """One phase; False if its action's message is not known yet."""
        placed, resources = work.phases[self._position], self.resources
        action = placed.action
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
        if completes(placed, num_links=self.costs.num_links(action.stage)):
            self._complete.add(action)
            self._send(work, arrival, sent)
        return True

    def _send(self, work: Work, arrival: dict[Message, float], sent: list[Message]) -> None:
        """What is complete leaves, in the order that the peers expect."""
        actions = sending(work)
        while self._num_sent < len(actions) and actions[self._num_sent] in self._complete:
            message = self.schedule.output(actions[self._num_sent])
            self._num_sent += 1
            if message is not None:
                away = self.schedule.consumer(message) != self.rank
                arrival[message] = self.resources.compute + self.costs.message * away
                sent.append(message)

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
        self._open()
