"""Stages that sleep instead of computing: the real executor, transport and schedule at the speed of chosen costs.

A rank's computation and its link are two queues in time, as the streams of a GPU are: what is issued follows on what
was issued before, and the rank sleeps where a result has to leave it. Two cores can so run sixteen ranks, and what is
measured beyond the simulated ideal is the engine's own cost.
"""

import ctypes
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss
from parallel.pipeline.actions import Action
from parallel.pipeline.chunk import Chunk
from parallel.pipeline.overlap import Placed
from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.phases import Phase, waits_for

NAP_SECONDS = 2e-3


class SleptDevice:
    """One rank's computation and its network link; times are those of `time.perf_counter`.

    A piece starts when it is issued and what was issued before it is done, so pieces issued while the device is busy
    follow each other without the rank's own overhead between them, as on a GPU to which the rank issues ahead. Where a
    result leaves, the rank sleeps until it is computed, unless `sends` says that lanes do (`slept_lanes.py`). blocking:
    the rank sleeps through every piece, as on a CPU that computes itself. serial: a transfer stops computation.
    """

    def __init__(self, *, blocking: bool = False, serial: bool = False, sends: bool = False) -> None:
        self.blocking, self._serial, self.sends = blocking, serial, sends
        self.free_at = self._link_free_at = 0.0

    def compute(self, seconds: float, *, after: float = 0.0) -> None:
        """Issue a piece of computation that needs what arrives at `after`."""
        if self.blocking:
            sleep_until(after)
        now = time.perf_counter()
        was_idle, self.free_at = now > self.free_at, max(self.free_at, now, after) + seconds
        if self.blocking:
            sleep_until(self.free_at)
        elif was_idle:
            # What this rank issues next is not urgent, and others that share its core may be waiting to start.
            time.sleep(min(NAP_SECONDS, 0.1 * seconds))

    def transfer(self, seconds: float) -> float:
        """Issue a transfer of what was computed last; the time at which it will have arrived."""
        self._link_free_at = max(self.free_at, time.perf_counter(), self._link_free_at) + seconds
        if self._serial:
            self.free_at = self._link_free_at
        return self._link_free_at

    def result_leaves(self) -> None:
        """What was computed last is about to be sent."""
        if not self.sends:
            self.synchronize()

    def synchronize(self) -> None:
        """Sleep until all that was issued is computed."""
        sleep_until(self.free_at)


def sleep_precisely() -> None:
    """Ask Linux to end this thread's sleeps within a microsecond instead of 50; the thread's own setting."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(29, 1000, 0, 0, 0)  # PR_SET_TIMERSLACK, in nanoseconds


def sleep_until(deadline: float) -> None:
    """Return at a time of `time.perf_counter`, or at once if it has passed."""
    remaining = deadline - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


@dataclass(frozen=True, slots=True)
class _Cost:
    """Of a phase: what it waits for, how long it takes, weight gradients that it puts off, all in seconds."""

    needs: tuple[Phase, ...]
    seconds: float
    put_off: float


class SleptStages:
    """`Stages` whose chunks sleep; every chunk passes its input on, plus one, so that a lost message would show.

    costs: those that the simulator prices. device: see there.
    """

    hidden_size = 4

    def __init__(self, costs: PhaseCosts, *, num_stages: int, device: SleptDevice) -> None:
        self.costs, self.num_stages, self.device = costs, num_stages, device
        self._known: dict[tuple[int, int, Phase], _Cost] = {}

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return SleptChunk(self, stage, batch, halves)

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return self.costs.num_links(stage)

    def cost(self, stage: int, halves: int, phase: Phase) -> _Cost:
        """Of any phase but `weights`; worked out once."""
        known = self._known.get((stage, halves, phase))
        if known is None:
            placed = Placed(Action("F", stage, 0), phase)
            known = self._known[stage, halves, phase] = _Cost(
                waits_for(phase, halves=halves),
                self.costs.seconds(placed, halves=halves),
                self.costs.put_off(placed, halves=halves),
            )
        return known


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
        device = self._stages.device
        if phase.kind == "weights":
            due = [link for link in self._put_off if link >= phase.link]
            device.compute(sum(self._put_off.pop(link) for link in due))
            return
        cost = self._stages.cost(self._stage, self._halves, phase)
        if phase.is_transfer:
            self._arrives[phase] = device.transfer(cost.seconds)
            return
        device.compute(cost.seconds, after=max((self._arrives.pop(needed) for needed in cost.needs), default=0.0))
        self._put_off[phase.link] = self._put_off.get(phase.link, 0.0) + cost.put_off
        self._pass_on(phase)

    def _pass_on(self, phase: Phase) -> None:
        """What leaves the rank leaves it no sooner than it has been computed."""
        first_link = Phase("attend_grad" if self._stages.num_links(self._stage) > 1 else "end_grad", 0)
        if phase != first_link and phase.kind != "end":
            return
        assert self._tensor is not None
        if phase == first_link:
            if self._stage:
                self.input_grad = self._tensor + 1
                self._stages.device.result_leaves()
        elif self._stage < self._stages.num_stages - 1:
            self.output = self._tensor + 1
            self._stages.device.result_leaves()
        else:
            expected = float(self._batch.tokens[0, 0]) + self._stage
            got = float(self._tensor.flatten()[0])
            assert got == expected, f"micro-batch {expected - self._stage:.0f} came to the last stage as {got}"
            self.loss = StageLoss(self._tensor.sum(), self._tensor.sum(), ())
