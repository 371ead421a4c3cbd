"""When every action of a schedule would start and end, from the costs of its actions. No torch."""

from dataclasses import dataclass

from parallel.pipeline.actions import Action, Message, Pair, Schedule, Step, parts


@dataclass(frozen=True)
class Costs:
    """Seconds of one stage's forward, input gradient and weight gradient, and of a message between ranks.

    overlap: share of the shorter part of a pair that is hidden under the longer (0: a pair costs F + B).
    """

    forward: float = 1.0
    input_grad: float = 1.0
    weight_grad: float = 1.0
    message: float = 0.0
    overlap: float = 0.0

    def of(self, action: Action) -> float:
        """Seconds of one action alone."""
        both = self.input_grad + self.weight_grad
        return {"F": self.forward, "I": self.input_grad, "W": self.weight_grad, "B": both}[action.kind]

    def of_step(self, step: Step) -> float:
        """Seconds of an action or of a pair."""
        times = [self.of(action) for action in parts(step)]
        return sum(times) - (self.overlap * min(times) if isinstance(step, Pair) else 0.0)


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


def simulate(schedule: Schedule, costs: Costs | None = None) -> Timeline:
    """Run a checked schedule in order on every rank: a step starts when its rank and its inputs are ready.

    Messages take `costs.message` seconds and never block their sender.
    """
    costs = costs or Costs()
    position = [0] * schedule.num_ranks
    clock = [0.0] * schedule.num_ranks
    arrival: dict[Message, float] = {}
    ranks: list[list[Timed]] = [[] for _ in range(schedule.num_ranks)]
    progress = True
    while progress:
        progress = False
        for rank, steps in enumerate(schedule.ranks):
            while position[rank] < len(steps):
                step = steps[position[rank]]
                needed = [m for m in (schedule.inputs(action) for action in parts(step)) if m is not None]
                if any(m not in arrival for m in needed):
                    break
                start = max([clock[rank], *(arrival[m] for m in needed)])
                end = start + costs.of_step(step)
                ranks[rank].append(Timed(step, start, end))
                clock[rank] = end
                for message in (schedule.output(action) for action in parts(step)):
                    if message is not None:
                        latency = costs.message if schedule.consumer(message) != rank else 0.0
                        arrival[message] = end + latency
                position[rank] += 1
                progress = True
    assert all(position[rank] == len(steps) for rank, steps in enumerate(schedule.ranks)), "check the schedule first"
    makespan = max(clock)
    busy = sum(timed.end - timed.start for timeds in ranks for timed in timeds)
    return Timeline(tuple(map(tuple, ranks)), makespan, 1 - busy / (makespan * schedule.num_ranks))
