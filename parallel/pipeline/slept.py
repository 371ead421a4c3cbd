"""Stages that sleep instead of computing: the real executor, transport and schedule at the speed of chosen costs.

Computation sleeps on the rank; a transfer is a deadline on the rank's own link, on which transfers follow one another
while the rank goes on. Two cores can so run sixteen ranks, and what is measured beyond the simulated ideal is the
engine's own cost.
"""

import ctypes
import sys
import time

import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss
from parallel.pipeline.actions import Action
from parallel.pipeline.chunk import Chunk
from parallel.pipeline.overlap import Placed
from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.phases import Phase, waits_for


class Link:
    """A rank's network link: one transfer after the other."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def transfer(self, seconds: float) -> float:
        """Start one when the link is free; the time at which it will have ended."""
        self._free_at = max(time.perf_counter(), self._free_at) + seconds
        return self._free_at


def sleep_precisely() -> None:
    """Ask Linux to end this thread's sleeps within a microsecond instead of 50; the thread's own setting."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, 1000, 0, 0, 0)  # PR_SET_TIMERSLACK, in nanoseconds


def sleep_until(deadline: float) -> None:
    """Return at a time of `time.perf_counter`, or at once if it has passed."""
    remaining = deadline - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


class SleptStages:
    """`Stages` whose chunks sleep; every chunk passes its input on, plus one, so that a lost message would show.

    costs: those that the simulator prices. serial: nothing else runs on the rank during a transfer.
    """

    hidden_size = 4

    def __init__(self, costs: PhaseCosts, *, num_stages: int, serial: bool = False) -> None:
        self.costs, self.num_stages, self.serial = costs, num_stages, serial
        self.link = Link()

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return SleptChunk(self, stage, batch, halves)

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return self.costs.num_links(stage)


class SleptChunk:
    """`Chunk` that sleeps."""

    def __init__(self, stages: SleptStages, stage: int, batch: Microbatch, halves: int) -> None:
        self._stages, self._stage, self._batch, self._halves = stages, stage, batch, halves
        self._arrives: dict[Phase, float] = {}
        self._put_off: dict[int, float] = {}
        self._tensor: Tensor | None = None
        self.output: Tensor | None = None
        self.loss: StageLoss | None = None
        self.input_grad: Tensor | None = None

    def begin(self, hidden_BSD: Tensor | None) -> None:
        """See `Chunk`."""
        first = torch.full((1, 1, self._stages.hidden_size), float(self._batch.tokens[0, 0]))
        self._tensor = first if hidden_BSD is None else hidden_BSD

    def begin_backward(self, grad_BSD: Tensor | None) -> None:
        """See `Chunk`."""
        self._tensor = torch.zeros(1, 1, self._stages.hidden_size) if grad_BSD is None else grad_BSD

    def run(self, phase: Phase) -> None:
        """See `Chunk`."""
        deadlines = [self._arrives.pop(transfer) for transfer in waits_for(phase, halves=self._halves)]
        sleep_until(max(deadlines, default=0.0))
        if phase.kind == "weights":
            due = [link for link in self._put_off if link >= phase.link]
            sleep_until(time.perf_counter() + sum(self._put_off.pop(link) for link in due))
            return
        placed = Placed(Action("F", self._stage, 0), phase)
        seconds = self._stages.costs.seconds(placed, halves=self._halves)
        if phase.is_transfer:
            self._arrives[phase] = self._stages.link.transfer(seconds)
            if self._stages.serial:
                sleep_until(self._arrives[phase])
            return
        sleep_until(time.perf_counter() + seconds)
        put_off = self._stages.costs.put_off(placed, halves=self._halves)
        self._put_off[phase.link] = self._put_off.get(phase.link, 0.0) + put_off
        self._pass_on(phase)

    def _pass_on(self, phase: Phase) -> None:
        assert self._tensor is not None
        last = self._stages.num_links(self._stage) - 1
        if phase == Phase("attend_grad" if last else "end_grad", 0):
            self.input_grad = self._tensor + 1 if self._stage else None
        elif phase.kind == "end" and self._stage < self._stages.num_stages - 1:
            self.output = self._tensor + 1
        elif phase.kind == "end":
            expected = float(self._batch.tokens[0, 0]) + self._stage
            got = float(self._tensor.flatten()[0])
            assert got == expected, f"micro-batch {expected - self._stage:.0f} came to the last stage as {got}"
            self.loss = StageLoss(self._tensor.sum(), self._tensor.sum(), ())
