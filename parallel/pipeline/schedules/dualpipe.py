"""DualPipe: micro-batches from both ends, forwards of one direction paired with backwards of the other."""

from collections import deque

from parallel.pipeline.actions import Action, Pair, Schedule, Step
from parallel.pipeline.placement import mirror
from parallel.pipeline.schedules.prune import keep


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


def eight_steps(*, num_ranks: int, num_microbatches: int) -> Schedule:
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
    return Schedule("dualpipe", num_ranks, num_ranks, num_microbatches, mirror(num_ranks), tuple(ranks))


def dualpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipe for any number of micro-batches, P even: where they are odd or below 2P, the eight steps of the next
    possible number without the first ones of each direction.

    The last ones are kept because around them the eight steps split backwards, which shortens the way of a gradient.
    At equal costs of F, I and W never slower than 1F1B, for P to 64 and any M; live activations stay at most P + 1.
    """
    whole = max(2 * num_ranks, num_microbatches + num_microbatches % 2)
    schedule = eight_steps(num_ranks=num_ranks, num_microbatches=whole)
    down, up = (num_microbatches + 1) // 2, num_microbatches // 2
    return keep(schedule, [*range(whole // 2 - down, whole // 2), *range(whole - up, whole)])
