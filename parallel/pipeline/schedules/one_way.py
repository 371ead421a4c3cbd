"""Schedules whose micro-batches all enter at rank 0 and, a rank having one stage or going round and round, leave at
the last: GPipe, 1F1B, interleaved 1F1B, ZB1P.
"""

import heapq

from parallel.pipeline.actions import Action, Schedule, Step
from parallel.pipeline.placement import linear, loop
from parallel.pipeline.schedules.prune import keep


def gpipe(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """GPipe (arXiv 1811.06965): all forwards, then all backwards. Bubble (P - 1)(F + B), M live activations."""
    ranks = []
    for rank in range(num_ranks):
        forwards = [Action("F", rank, m) for m in range(num_microbatches)]
        ranks.append((*forwards, *(Action("B", rank, m) for m in range(num_microbatches))))
    return Schedule("gpipe", num_ranks, num_ranks, num_microbatches, linear(num_ranks), tuple(ranks))


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
    return Schedule("1f1b", num_ranks, num_ranks, num_microbatches, linear(num_ranks), tuple(ranks))


def interleaved(*, num_ranks: int, num_microbatches: int, stages_per_rank: int) -> Schedule:
    """Interleaved 1F1B (arXiv 2104.04473): every micro-batch goes round the ranks v times, P micro-batches a round.

    Bubble (P - 1)(F + B) of one stage, which is 1/v of a rank's layers; rank r holds at most (v - 1)P + 2(P - 1 - r)
    + 1 stage activations. Where P does not divide M the last round is short: it is a whole round without the
    micro-batches too many.
    """
    whole = -(-num_microbatches // num_ranks) * num_ranks
    total = whole * stages_per_rank

    def visit(index: int, rank: int, *, backward: bool) -> tuple[int, int]:
        """Stage and micro-batch of a rank's index-th forward or backward."""
        group, inside = divmod(index, num_ranks * stages_per_rank)
        turn, position = divmod(inside, num_ranks)
        turn = stages_per_rank - 1 - turn if backward else turn
        return turn * num_ranks + rank, group * num_ranks + position

    ranks: list[tuple[Step, ...]] = []
    for rank in range(num_ranks):
        forwards = [Action("F", *visit(i, rank, backward=False)) for i in range(total)]
        backwards = [Action("B", *visit(i, rank, backward=True)) for i in range(total)]
        warmup = min((stages_per_rank - 1) * num_ranks + 2 * (num_ranks - 1 - rank), total)
        steps: list[Step] = list(forwards[:warmup])
        for i in range(total - warmup):
            steps += [forwards[warmup + i], backwards[i]]
        ranks.append((*steps, *backwards[total - warmup :]))
    placement = loop(num_ranks, stages_per_rank)
    schedule = Schedule("interleaved", num_ranks, num_ranks * stages_per_rank, whole, placement, tuple(ranks))
    return keep(schedule, range(num_microbatches))


def zb1p(*, num_ranks: int, num_microbatches: int) -> Schedule:
    """ZB1P, also ZB-H1 (arXiv 2401.10241): 1F1B whose weight gradients wait and fill the gaps, in 1F1B's memory.

    Bubble (P - 1)(F + I - W) where F, I and W cost the same and M >= P; no rank holds more than min(M, P) activations.
    Made by running the ranks against each other at equal costs: a forward goes first, if rank r has fewer than P - r
    out and fewer than P activations alive, then an input gradient, else a weight gradient.
    """
    return _Greedy(num_ranks, num_microbatches).schedule()


class _Greedy:
    """The ranks of ZB1P in time; every action takes one unit."""

    def __init__(self, num_ranks: int, num_microbatches: int) -> None:
        self.num_ranks, self.num_microbatches = num_ranks, num_microbatches
        self.forwards, self.backwards, self.weights = ([0] * num_ranks for _ in range(3))
        # When each micro-batch's input is at the rank, in the order of micro-batches
        self.activation_at: list[list[int]] = [[] for _ in range(num_ranks)]
        self.gradient_at: list[list[int]] = [[] for _ in range(num_ranks)]
        self.activation_at[0] = [0] * num_microbatches
        self.steps: list[list[Step]] = [[] for _ in range(num_ranks)]

    def schedule(self) -> Schedule:
        ready = [(0, rank) for rank in reversed(range(self.num_ranks))]  # (time, rank)
        heapq.heapify(ready)
        while ready:
            now, rank = heapq.heappop(ready)
            kind = self._choice(rank, now)
            if kind is not None:
                self._do(kind, rank, now + 1)
            if self.weights[rank] < self.num_microbatches:
                heapq.heappush(ready, (now + 1, rank))
        P, M = self.num_ranks, self.num_microbatches
        return Schedule("zb1p", P, P, M, linear(P), tuple(map(tuple, self.steps)))

    def _choice(self, rank: int, now: int) -> str | None:
        f, b, w = self.forwards[rank], self.backwards[rank], self.weights[rank]
        room = f - b < self.num_ranks - rank and f - w < self.num_ranks
        if room and f < len(self.activation_at[rank]) and self.activation_at[rank][f] <= now:
            return "F"
        if b < len(self.gradient_at[rank]) and self.gradient_at[rank][b] <= now:
            return "I"
        return "W" if w < b else None

    def _do(self, kind: str, rank: int, end: int) -> None:
        counts = {"F": self.forwards, "I": self.backwards, "W": self.weights}[kind]
        self.steps[rank].append(Action(kind, rank, counts[rank]))
        counts[rank] += 1
        last = self.num_ranks - 1
        if kind == "F" and rank < last:
            self.activation_at[rank + 1].append(end)
        elif kind == "F":
            self.gradient_at[last].append(end)
        elif kind == "I" and rank > 0:
            self.gradient_at[rank - 1].append(end)
