"""A step whose ranks share the cores of one machine: processor sharing over the very phases that run. No torch.

Each rank has a thread of its own, which issues phases in their order, and threads beside it for its transfers. All
that can run share the cores evenly, none more than one core at a time, and no core idles while anything can run
(work-conserving processor sharing). With a core for everybody this is `simulate_phases`.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from parallel.pipeline.actions import Action, Message, Schedule
from parallel.pipeline.overlap import Placed, Work, completes, halves_of, plan, sending
from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.phases import Phase, waits_for

_DONE = 1e-12  # seconds: what is left of a piece of work by rounding


class CoreCosts(Protocol):
    """Processor seconds of phases on an idle machine."""

    @property
    def latency(self) -> float:
        """From a transfer's last work until it is there."""
        ...

    @property
    def message(self) -> float:
        """Of a message between pipeline ranks."""
        ...

    def num_links(self, stage: int) -> int:
        """Of the stage's chain, the end included."""
        ...

    def own(self, placed: Placed, *, halves: int) -> float:
        """Of the rank's own thread, in any phase but `weights`; of a transfer, what starting it takes."""
        ...

    def beside(self, placed: Placed, *, halves: int) -> float:
        """Of other threads, for a transfer; nothing else has any."""
        ...

    def asleep(self, placed: Placed, *, halves: int) -> float:
        """Seconds that a computing phase waits for peers inside itself, where its transfers are no phases."""
        ...

    def put_off(self, placed: Placed, *, halves: int) -> float:
        """Weight gradients that a phase leaves to a later `weights`."""
        ...


@dataclass(frozen=True)
class OfPhases:
    """`PhaseCosts` as `CoreCosts`: starting a transfer is free, its seconds are work of other threads."""

    costs: PhaseCosts
    latency: float = 0.0

    @property
    def message(self) -> float:
        """See `CoreCosts`."""
        return self.costs.message

    def num_links(self, stage: int) -> int:
        """See `CoreCosts`."""
        return self.costs.num_links(stage)

    def own(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return 0.0 if placed.phase.is_transfer else self.costs.seconds(placed, halves=halves)

    def beside(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.costs.seconds(placed, halves=halves) if placed.phase.is_transfer else 0.0

    def asleep(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return 0.0

    def put_off(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.costs.put_off(placed, halves=halves)


@dataclass(frozen=True)
class Shared:
    """seconds: until the last rank has ended. core_seconds: of all ranks together; cores: that they shared."""

    seconds: float
    core_seconds: float
    cores: float

    @property
    def busy(self) -> float:
        """Share of the cores' time that is used."""
        return self.core_seconds / (self.seconds * self.cores) if self.seconds else 0.0


def simulate_shared(schedule: Schedule, costs: CoreCosts, *, level: str, cores: float, copies: int = 1) -> Shared:
    """Run a checked schedule on `cores` cores.

    copies: ranks that do each pipeline rank's work at the same time, as the data ranks of a pipeline do: they share the
    cores too. level: as for `overlap.plan`; `off` waits for every transfer where it starts.
    """
    arrivals: dict[Message, float] = {}
    ranks = [_Rank(schedule, rank, costs, level, arrivals) for rank in range(schedule.num_ranks)]
    now = used = 0.0
    while True:
        while any([rank.issue(now) for rank in ranks]):  # a list: every rank moves on before the next look
            pass
        if all(rank.ended for rank in ranks):
            return Shared(now, used * copies, cores)
        running = [work for rank in ranks for work in rank.running()]
        rate = min(1.0, cores / (copies * len(running))) if running else 0.0
        due = min((left.seconds for left in running), default=math.inf) / rate if running else math.inf
        waited = [time - now for rank in ranks for time in rank.wakes() if time > now]
        step = min(due, *waited) if waited else due
        assert 0 < step < math.inf, "check the schedule first"
        now += step
        for left in running:
            left.seconds -= rate * step
            used += rate * step


@dataclass
class _Left:
    """Processor seconds of a piece of work that are left."""

    seconds: float


Key = tuple[tuple[int, int], Phase]  # chunk (stage, micro-batch), transfer


@dataclass
class _Transfer:
    key: Key
    left: _Left


@dataclass
class _Rank:
    """One rank: what its thread does, and its transfers, one after the other."""

    schedule: Schedule
    rank: int
    costs: CoreCosts
    level: str
    arrivals: dict[Message, float]
    _thread: _Left | None = None
    _until: float | None = None  # when the phase's waiting inside itself ends
    _transfers: deque[_Transfer] = field(default_factory=deque)
    _there: dict[Key, float] = field(default_factory=dict)  # when what has ended is there
    _put_off: dict[tuple[int, int], dict[int, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._halves: Mapping[tuple[int, int], int] = halves_of(self.schedule, self.level)
        works = plan(self.schedule, self.rank, num_links=self.costs.num_links, level=self.level)
        self._phases = iter([(work, placed) for work in works for placed in work.phases])
        self._current: tuple[Work, Placed] | None = next(self._phases, None)
        self._begun: set[Action] = set()
        self._complete: dict[int, set[Action]] = {}
        self._sent: dict[int, int] = {}

    @property
    def ended(self) -> bool:
        """Whether nothing is left to do."""
        return self._current is None and not self._transfers

    def running(self) -> Iterator[_Left]:
        """What uses a core now; a thread that waits for its transfer does not."""
        if self._thread is not None and self._thread.seconds > _DONE:
            yield self._thread
        if self._transfers:
            yield self._transfers[0].left

    def wakes(self) -> Iterator[float]:
        """Times at which something that the rank may wait for is there."""
        if self._until is not None:
            yield self._until
        yield from self._there.values()
        if self._current is not None:
            needed = self.schedule.inputs(self._current[1].action)
            if needed is not None and needed in self.arrivals:
                yield self.arrivals[needed]

    def issue(self, now: float) -> bool:
        """Note what has ended and start what can start; whether anything changed."""
        changed = False
        while self._transfers and self._transfer_ended(now):
            changed = True
        if self._current is None:
            return changed
        work, placed = self._current
        if self._thread is None:
            seconds = self._can_start(placed, now)
            if seconds is None:
                return changed
            self._thread, changed = _Left(seconds), True
        if self._thread.seconds > _DONE:
            return changed
        if placed.phase.is_transfer and not self._transferred(placed, now):
            return changed
        if self._until is None and placed.phase.kind != "weights":
            self._until = now + self.costs.asleep(placed, halves=self._halves.get(_chunk(placed), 1))
        if self._until is not None and self._until > now:
            return changed
        self._thread = self._until = None
        self._finish(work, placed, now)
        self._current = next(self._phases, None)
        return True

    def _transfer_ended(self, now: float) -> bool:
        """Take the first transfer from the queue if it is done."""
        if self._transfers[0].left.seconds > _DONE:
            return False
        self._there[self._transfers.popleft().key] = now + self.costs.latency
        return True

    def _can_start(self, placed: Placed, now: float) -> float | None:
        """Seconds of the thread's own work in a phase; None while something that it needs is not there."""
        action, chunk = placed.action, _chunk(placed)
        if action not in self._begun:
            needed = self.schedule.inputs(action)
            if needed is not None and self.arrivals.get(needed, math.inf) > now:
                return None
            self._begun.add(action)
        halves = self._halves.get(chunk, 1)
        if placed.phase.is_transfer:
            return self.costs.own(placed, halves=halves)
        keys = [(chunk, needed) for needed in waits_for(placed.phase, halves=halves)]
        if any(self._there.get(key, math.inf) > now for key in keys):
            return None
        for key in keys:
            del self._there[key]
        waiting = self._put_off.setdefault(chunk, {})
        if placed.phase.kind == "weights":
            return sum(waiting.pop(link) for link in [n for n in waiting if n >= placed.phase.link])
        more = self.costs.put_off(placed, halves=halves)
        waiting[placed.phase.link] = waiting.get(placed.phase.link, 0.0) + more
        return self.costs.own(placed, halves=halves)

    def _transferred(self, placed: Placed, now: float) -> bool:
        """Start a transfer; whether the thread goes on, which under `off` it does when the transfer is there."""
        key = _chunk(placed), placed.phase
        if key not in self._there and all(transfer.key != key for transfer in self._transfers):
            halves = self._halves.get(key[0], 1)
            self._transfers.append(_Transfer(key, _Left(self.costs.beside(placed, halves=halves))))
            self._transfer_ended(now)
        return self.level != "off" or self._there.get(key, math.inf) <= now

    def _finish(self, work: Work, placed: Placed, now: float) -> None:
        """After a phase its action's message may leave; those of a work in the order of `sending`."""
        if not completes(placed, num_links=self.costs.num_links(placed.action.stage)):
            return
        complete = self._complete.setdefault(id(work), set())
        complete.add(placed.action)
        actions = sending(work)
        number = self._sent.get(id(work), 0)
        while number < len(actions) and actions[number] in complete:
            message = self.schedule.output(actions[number])
            number += 1
            if message is not None:
                away = self.schedule.consumer(message) != self.rank
                self.arrivals[message] = now + self.costs.message * away
        self._sent[id(work)] = number


def _chunk(placed: Placed) -> tuple[int, int]:
    return placed.action.stage, placed.action.microbatch


@dataclass(frozen=True)
class PhaseKey:
    """A phase of a stage's chunk whose tokens go through the experts in `halves` parts."""

    stage: int
    halves: int
    kind: str
    link: int


@dataclass(frozen=True)
class MeasuredCosts:
    """`CoreCosts` as they were measured: seconds by phase; links: of every stage's chain."""

    links: Mapping[int, int]
    own_seconds: Mapping[PhaseKey, float]
    beside_seconds: Mapping[PhaseKey, float]
    put_off_seconds: Mapping[PhaseKey, float]
    asleep_seconds: Mapping[PhaseKey, float] = field(default_factory=dict)
    latency: float = 0.0
    message: float = 0.0

    def num_links(self, stage: int) -> int:
        """See `CoreCosts`."""
        return self.links[stage]

    def own(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.own_seconds[_key(placed, halves)]

    def beside(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.beside_seconds[_key(placed, halves)]

    def asleep(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.asleep_seconds.get(_key(placed, halves), 0.0)

    def put_off(self, placed: Placed, *, halves: int) -> float:
        """See `CoreCosts`."""
        return self.put_off_seconds.get(_key(placed, halves), 0.0)


def _key(placed: Placed, halves: int) -> PhaseKey:
    return PhaseKey(placed.action.stage, halves, placed.phase.kind, placed.phase.link)
