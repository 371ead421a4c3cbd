"""Schedules as pure functions: shape of the pipeline in, every rank's list of actions out. No torch."""

from collections import deque
from collections.abc import Callable

from parallel.pipeline.actions import Action, Pair, Schedule, Step


class ScheduleError(ValueError):
    """A schedule that cannot exist; the message names the constraint and the nearest that works."""


def one_f_one_b(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """1F1B (PipeDream-flush): warm up by the distance to the last rank, then alternate, then drain.

    Bubble (P - 1)(F + B); rank r holds at most min(M, P - r) activations.
    """
    ranks: list[tuple[Step, ...]] = []
    for rank in range(num_ranks):
        warmup = min(num_ranks - 1 - rank, num_microbatches)
        steps: list[Step] = [Action("F", rank, m) for m in range(warmup)]
        for m in range(num_microbatches - warmup):
            steps += [Action("F", rank, m + warmup), Action("B", rank, m)]
        steps += [Action("B", rank, m) for m in range(num_microbatches - warmup, num_microbatches)]
        ranks.append(tuple(steps))
    return Schedule("1f1b", num_ranks, num_ranks, num_microbatches, False, tuple(ranks))


class _DualPipeRank:
    """One rank's walk through DualPipe: micro-batch counters for both directions and the queue of deferred W."""

    def __init__(self, rank: int, num_ranks: int, num_microbatches: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.half_microbatches = num_microbatches // 2
        self.second_half = rank >= num_ranks // 2
        self.count: dict[tuple[str, int], int] = {}
        self.deferred: deque[Action] = deque()
        self.steps: list[Step] = []

    def next(self, kind: str, near: int) -> Action:
        """Next action of a kind; near 0: the direction that enters at this half's end of the pipeline, 1: the other."""
        direction = near ^ self.second_half
        stage = self.num_ranks - 1 - self.rank if direction else self.rank
        key = ("F" if kind == "F" else "B", direction)
        index = self.count[key] = self.count.get(key, -1) + 1
        return Action(kind, stage, direction * self.half_microbatches + index)

    def forward(self, near: int) -> None:
        self.steps.append(self.next("F", near))

    def backward(self, near: int, *, defer: bool = False) -> None:
        action = self.next("I" if defer else "B", near)
        self.steps.append(action)
        if defer:
            self.deferred.append(Action("W", action.stage, action.microbatch))

    def weight(self) -> None:
        self.steps.append(self.deferred.popleft())

    def pair(self, forward: int, backward: int) -> None:
        self.steps.append(Pair(self.next("F", forward), self.next("B", backward)))


def dualpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe (report section 3.2.1 and figure 5): micro-batches from both ends, forwards paired with backwards.

    Every rank holds two stages, r and P - 1 - r. Needs P and M even and M >= 2P. Bubble (P/2 - 1)(F&B + B - 3W); at
    most P + 1 live stage activations.
    """
    half = num_ranks // 2
    ranks = []
    for rank in range(num_ranks):
        inner = min(rank, num_ranks - 1 - rank)  # distance to this half's outer end
        r = _DualPipeRank(rank, num_ranks, num_microbatches)
        for _ in range(2 * (half - inner - 1)):  # step 1
            r.forward(0)
        for _ in range(inner + 1):  # step 2
            r.forward(0)
            r.forward(1)
        for _ in range(half - inner - 1):  # step 3
            r.backward(1, defer=True)
            r.weight()
            r.forward(1)
        for i in range(num_microbatches // 2 - num_ranks + inner + 1):  # step 4, the main one
            if i == 0 and inner == half - 1:
                # Not a pair, as in the released schedule: the forward alone reaches the next rank sooner.
                r.forward(0)
                r.backward(1)
            else:
                r.pair(0, 1)
            r.pair(1, 0)
        for _ in range(half - inner - 1):  # step 5
            r.backward(1)
            r.pair(1, 0)
        defer = False
        for i in range(inner + 1):  # step 6, input gradients only from half way
            defer |= i == (inner + 1) // 2 and inner % 2 == 1
            r.backward(1, defer=defer)
            defer |= i == (inner + 1) // 2 and inner % 2 == 0
            r.backward(0, defer=defer)
        for _ in range(half - inner - 1):  # step 7
            r.weight()
            r.backward(0, defer=True)
        for _ in range(inner + 1):  # step 8
            r.weight()
        ranks.append(tuple(r.steps))
    return Schedule("dualpipe", num_ranks, num_ranks, num_microbatches, True, tuple(ranks))


_BUILDERS: dict[str, Callable[..., Schedule]] = {"1f1b": one_f_one_b, "dualpipe": dualpipe}
SCHEDULES = tuple(_BUILDERS)
BIDIRECTIONAL = ("dualpipe",)


def build(name: str, *, num_ranks: int, num_microbatches: int) -> Schedule:
    """The schedule `name` of num_ranks pipeline ranks and num_microbatches (both directions together).

    ScheduleError where it does not exist, with the nearest shape that does.
    """
    if name not in _BUILDERS:
        raise ScheduleError(f"schedule {name!r} does not exist: choose from {', '.join(SCHEDULES)}")
    if num_ranks < 1 or num_microbatches < 1:
        raise ScheduleError(f"{name} needs at least 1 rank and 1 micro-batch, not {num_ranks} and {num_microbatches}")
    if name == "dualpipe":
        ranks = num_ranks + num_ranks % 2
        nearest = max(2 * ranks, num_microbatches + num_microbatches % 2)
        if num_ranks % 2:
            raise ScheduleError(
                f"dualpipe pairs the two halves of the pipeline, so its ranks must be even, not {num_ranks}: "
                f"use {ranks} ranks with {nearest} micro-batches, or 1f1b"
            )
        if nearest != num_microbatches:
            raise ScheduleError(
                f"dualpipe on {num_ranks} ranks needs an even number of micro-batches, at least {2 * num_ranks}, "
                f"not {num_microbatches}: use {nearest}, or 1f1b"
            )
    return _BUILDERS[name](num_ranks=num_ranks, num_microbatches=num_microbatches)
