"""Schedules on a V: rank r holds stages r and 2P - 1 - r, so a micro-batch comes back to the rank where it entered."""

from collections import deque

from parallel.pipeline.actions import Action, Pair, Schedule, Step
from parallel.pipeline.placement import v_shape
from parallel.pipeline.schedules.prune import keep


class _Rank:
    """One rank's walk: `down` is its stage on the way to the last rank, `up` the one on the way back."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.down, self.up = rank, 2 * num_ranks - 1 - rank
        self.forwards = {self.down: 0, self.up: 0}
        self.backwards = {self.down: 0, self.up: 0}
        self.deferred: deque[Action] = deque()
        self.steps: list[Step] = []

    def _forward(self, stage: int) -> Action:
        self.forwards[stage] += 1
        return Action("F", stage, self.forwards[stage] - 1)

    def _backward(self, stage: int, kind: str = "B") -> Action:
        self.backwards[stage] += 1
        return Action(kind, stage, self.backwards[stage] - 1)

    def forward(self, stage: int) -> None:
        self.steps.append(self._forward(stage))

    def backward(self, stage: int, *, defer: bool = False) -> None:
        action = self._backward(stage, "I" if defer else "B")
        self.steps.append(action)
        if defer:
            self.deferred.append(Action("W", stage, action.microbatch))

    def weight(self, stage: int | None = None) -> None:
        """The oldest weight gradient that waits, of the stage if one is given."""
        action = next(a for a in self.deferred if stage in (None, a.stage))
        self.deferred.remove(action)
        self.steps.append(action)

    def pair(self, forward: int, backward: int) -> None:
        self.steps.append(Pair(self._forward(forward), self._backward(backward)))


def zbv(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """ZBV (arXiv 2401.10241): every backward split; with F = I = W no rank idles between its first and last action.

    The makespan is then 6M + P - 1 for M >= 2P - 1; at most 2P live activations of half a rank's layers each. Below
    that number of micro-batches the schedule is that of 2P - 1 without the last ones.
    """
    total = max(num_microbatches, 2 * num_ranks - 1)
    ranks = []
    for rank in range(num_ranks):
        r = _Rank(rank, num_ranks)
        for _ in range(2 * (num_ranks - rank) - 1):  # down alone
            r.forward(r.down)
        for _ in range(rank):  # the first ones come back
            r.forward(r.up)
            r.forward(r.down)
        for _ in range(num_ranks - rank):  # and turn into backwards
            r.forward(r.up)
            _whole(r, r.up)
        while r.forwards[r.up] < total:  # steady
            if r.forwards[r.down] < total:
                r.forward(r.down)
            _whole(r, r.down)
            r.forward(r.up)
            _whole(r, r.up)
        for _ in range(rank):  # drain: input gradients first, others wait for them
            r.backward(r.down, defer=True)
            r.backward(r.up, defer=True)
        for _ in range(num_ranks - rank):
            r.backward(r.down, defer=True)
            r.weight(r.down)
        for stage in (r.up, r.down):
            while any(action.stage == stage for action in r.deferred):
                r.weight(stage)
        ranks.append(tuple(r.steps))
    schedule = Schedule("zbv", num_ranks, 2 * num_ranks, total, v_shape(num_ranks), tuple(ranks))
    return keep(schedule, range(num_microbatches))


def _whole(r: _Rank, stage: int) -> None:
    """Input gradient, then at once weight gradient: as B, but the neighbour gets the gradient earlier."""
    r.backward(stage, defer=True)
    r.weight(stage)


def folded_eight_steps(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV, the eight steps of DualPipe folded into a V, for M >= 2P: one copy of the weights, twice the stages.

    Bubble (P - 1)(F&B + B - 3W) in costs of its stages of half a rank's layers; at most 2P + 1 live activations of
    those.
    """
    ranks = []
    for rank in range(num_ranks):
        r, outer = _Rank(rank, num_ranks), num_ranks - 1 - rank
        for _ in range(2 * outer):  # step 1
            r.forward(r.down)
        for _ in range(rank + 1):  # step 2
            r.forward(r.down)
            r.forward(r.up)
        for _ in range(outer):  # step 3
            _whole(r, r.up)
            r.forward(r.up)
        for i in range(num_microbatches - 2 * num_ranks + rank + 1):  # step 4, the main one
            if i == 0 and outer == 0:
                # Not a pair, as in the released schedule: the forward alone reaches its next stage sooner.
                r.forward(r.down)
                r.backward(r.up)
            else:
                r.pair(r.down, r.up)
            r.pair(r.up, r.down)
        for _ in range(outer):  # step 5
            r.backward(r.up)
            r.pair(r.up, r.down)
        defer = False
        for i in range(rank + 1):  # step 6, input gradients only from half way
            defer |= i == (rank + 1) // 2 and rank % 2 == 1
            r.backward(r.up, defer=defer)
            defer |= i == (rank + 1) // 2 and rank % 2 == 0
            r.backward(r.down, defer=defer)
        for _ in range(outer):  # step 7
            r.weight()
            r.backward(r.down, defer=True)
        for _ in range(rank + 1):  # step 8
            r.weight()
        ranks.append(tuple(r.steps))
    return Schedule("dualpipev", num_ranks, 2 * num_ranks, num_microbatches, v_shape(num_ranks), tuple(ranks))


def dualpipev(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """DualPipeV for any number of micro-batches: below 2P, the eight steps of 2P without the first ones.

    At equal costs of F, I and W never slower than 1F1B, for P to 64 and any M; live activations at most 2P + 1 still.
    """
    whole = max(2 * num_ranks, num_microbatches)
    schedule = folded_eight_steps(num_ranks=num_ranks, num_microbatches=whole)
    return keep(schedule, range(whole - num_microbatches, whole))
