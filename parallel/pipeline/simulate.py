"""When every step of a schedule would start and end, and what each rank would hold, from costs by stage. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from parallel.pipeline.actions import Action, Pair, Schedule, Step, parts
from parallel.pipeline.order import walk

Cost = float | tuple[float, ...]  # the same for every stage, or one for each


def of_stage(cost: Cost, stage: int) -> float:
    """A stage's own number."""
    return cost[stage] if isinstance(cost, tuple) else cost


class StepCosts(Protocol):
    """What the simulator asks of costs; all in one unit of time."""

    @property
    def message(self) -> float:
        """Time from the end of an action until another rank has its result."""
        ...

    def of_step(self, step: Step) -> float:
        """Time of an action or of a pair."""
        ...


@dataclass(frozen=True)
class Costs:
    """Seconds of a stage's forward, input gradient and weight gradient, one number for all stages or one for each.

    message: between ranks. forward_comm, input_grad_comm: all-to-all of the chunk, beside its computation.
    Of the shorter of computation and all-to-all, a chunk without a partner hides the share `hidden` and a pair the
    share `pair_hidden`. overlap: share of the shorter chunk of a pair whose computation runs beside the longer one's.
    """

    forward: Cost = 1.0
    input_grad: Cost = 1.0
    weight_grad: Cost = 1.0
    message: float = 0.0
    overlap: float = 0.0
    forward_comm: Cost = 0.0
    input_grad_comm: Cost = 0.0
    hidden: float = 0.0
    pair_hidden: float = 1.0

    def compute(self, action: Action) -> float:
        """Seconds of an action's computation."""
        kind, stage = action.kind, action.stage
        if kind == "F":
            return of_stage(self.forward, stage)
        seconds = of_stage(self.input_grad, stage) if kind != "W" else 0.0
        return seconds + (of_stage(self.weight_grad, stage) if kind != "I" else 0.0)

    def communication(self, action: Action) -> float:
        """Seconds of its all-to-all."""
        if action.kind == "W":
            return 0.0
        return of_stage(self.forward_comm if action.kind == "F" else self.input_grad_comm, action.stage)

    def of(self, action: Action) -> float:
        """Seconds of one action alone."""
        compute, communication = self.compute(action), self.communication(action)
        return compute + communication - self.hidden * min(compute, communication)

    def of_step(self, step: Step) -> float:
        """Seconds of an action or of a pair."""
        if not isinstance(step, Pair):
            return self.of(step)
        computes = [self.compute(action) for action in parts(step)]
        compute, communication = sum(computes), sum(self.communication(action) for action in parts(step))
        return compute + communication - self.pair_hidden * min(compute, communication) - self.overlap * min(computes)


@dataclass(frozen=True)
class Timed:
    """A step with its start and end in seconds."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """Each rank's steps in time; bubble: mean share of the makespan in which a rank idles."""

    ranks: tuple[tuple[Timed, ...], ...]
    makespan: float
    bubble: float

    def idle(self) -> tuple[float, ...]:
        """Seconds in which each rank does nothing."""
        return tuple(self.makespan - sum(timed.end - timed.start for timed in rank) for rank in self.ranks)


def simulate(schedule: Schedule, costs: StepCosts | None = None) -> Timeline:
    """Run a checked schedule in order on every rank: a step starts when its rank and its inputs are ready.

    Messages take `costs.message` seconds and never block their sender.
    """
    costs = costs or Costs()
    found = walk(schedule)
    assert not found.waits, "check the schedule first"
    clock = [0.0] * schedule.num_ranks
    ranks: list[list[Timed]] = [[] for _ in range(schedule.num_ranks)]
    inputs, durations = _Inputs(schedule, costs.message), _Durations(costs)
    for rank, position in found.steps:
        step = schedule.ranks[rank][position]
        start = max(clock[rank], *[inputs.ready(action) for action in parts(step)])
        clock[rank] = end = start + durations.of(step)
        ranks[rank].append(Timed(step, start, end))
        for action in parts(step):
            inputs.send(action, end)
    makespan = max(clock)
    busy = sum(timed.end - timed.start for timeds in ranks for timed in timeds)
    bubble = max(0.0, 1 - busy / (makespan * schedule.num_ranks)) if makespan else 0.0  # not -0 by rounding
    return Timeline(tuple(map(tuple, ranks)), makespan, bubble)


class _Durations:
    """Time of a step, asked once for each kind of step and stage."""

    def __init__(self, costs: StepCosts) -> None:
        self.costs, self.known = costs, {}

    def of(self, step: Step) -> float:
        key = tuple((action.kind, action.stage) for action in parts(step))
        if key not in self.known:
            self.known[key] = self.costs.of_step(step)
        return self.known[key]


class _Inputs:
    """When the input of each action is there, by stage * M + micro-batch."""

    def __init__(self, schedule: Schedule, message: float) -> None:
        self.schedule, self.message, self.M = schedule, message, schedule.num_microbatches
        self.last = schedule.num_stages - 1
        size = schedule.num_stages * self.M
        self.activation, self.gradient = [0.0] * size, [0.0] * size

    def ready(self, action: Action) -> float:
        if action.kind == "W":
            return 0.0
        table = self.activation if action.kind == "F" else self.gradient
        return table[action.stage * self.M + action.microbatch]

    def send(self, action: Action, end: float) -> None:
        if action.kind == "F" and action.stage < self.last:
            table, stage = self.activation, action.stage + 1
        elif action.kind in "BI" and action.stage > 0:
            table, stage = self.gradient, action.stage - 1
        else:
            return
        rank_of = self.schedule.rank_of
        if self.message and rank_of(stage, action.microbatch) != rank_of(action.stage, action.microbatch):
            end += self.message
        table[stage * self.M + action.microbatch] = end


@dataclass(frozen=True)
class Memory:
    """Bytes of a stage, one number for all or one for each.

    activation: of one micro-batch from its F to its B or I. deferred: what of it stays from I to W. parameters: of the
    stage's weights with their gradients and optimizer state, on each rank that holds it.
    """

    activation: Cost
    deferred: Cost
    parameters: Cost = 0.0


def peak_bytes(schedule: Schedule, memory: Memory) -> tuple[float, ...]:
    """Most bytes that each rank holds at once."""
    return tuple(
        sum(of_stage(memory.parameters, stage) for stage in schedule.stages_of(rank)) + _peak_activations(steps, memory)
        for rank, steps in enumerate(schedule.ranks)
    )


def _peak_activations(steps: Sequence[Step], memory: Memory) -> float:
    """A pair holds its new activation before it frees its old one."""
    held = peak = 0.0
    for action in (action for step in steps for action in parts(step)):
        whole, deferred = of_stage(memory.activation, action.stage), of_stage(memory.deferred, action.stage)
        held += {"F": whole, "B": -whole, "I": deferred - whole, "W": -deferred}[action.kind]
        peak = max(peak, held)
    return peak
