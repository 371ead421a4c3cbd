"""Stages that sleep instead of computing: the real executor, transport and schedule at the speed of chosen costs.

Computation sleeps on the rank; a transfer is a deadline on the rank's own link, on which transfers follow one another
while the rank goes on. Two cores can so run sixteen ranks, and what is measured beyond the simulated ideal is the
engine's own cost.
"""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss
from parallel.pipeline.chunk import Chunk
from parallel.pipeline.phases import Phase, waits_for

# How a layer's computation divides among its phases; the same for forward, input and weight gradients.
SHARES = {"attend": 0.4, "shared": 0.1, "experts": 0.5}


@dataclass(frozen=True)
class SleptCosts:
    """Seconds of one stage: computation of F, I and W, and transfers of F and of I, half each way.

    layers: MoE layers of a stage among which they are divided; 0: the stage is one piece and cannot be cut.
    """

    forward: float
    input_grad: float
    weight_grad: float
    forward_transfer: float = 0.0
    input_grad_transfer: float = 0.0
    layers: int = 1


class Link:
    """A rank's network link: one transfer after the other."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def transfer(self, seconds: float) -> float:
        """Start one when the link is free; the time at which it will have ended."""
        self._free_at = max(time.perf_counter(), self._free_at) + seconds
        return self._free_at


def sleep_until(deadline: float) -> None:
    """Return at a time of `time.perf_counter`, or at once if it has passed."""
    remaining = deadline - time.perf_counter()
    if remaining > 0:
        time.sleep(remaining)


class SleptStages:
    """`Stages` whose chunks sleep; every chunk passes its input on, plus one, so that a lost message would show."""

    hidden_size = 4

    def __init__(self, costs: SleptCosts, *, num_stages: int, cut: bool) -> None:
        self.costs, self.num_stages, self._cut = costs, num_stages, cut and costs.layers > 0
        self.link = Link()

    def new_chunk(self, stage: int, batch: Microbatch, halves: int) -> Chunk:
        """See `Stages`."""
        return SleptChunk(self, stage, batch, halves=halves, cut=self._cut)

    def num_links(self, stage: int) -> int:
        """See `Stages`."""
        return self.costs.layers + 1 if self._cut else 1


class SleptChunk:
    """`Chunk` that sleeps."""

    def __init__(self, stages: SleptStages, stage: int, batch: Microbatch, *, halves: int, cut: bool) -> None:
        self._stages, self._stage, self._batch, self._halves, self._cut = stages, stage, batch, halves, cut
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
        if phase.is_transfer:
            self._arrives[phase] = self._stages.link.transfer(self._transfer_seconds(phase))
        else:
            sleep_until(time.perf_counter() + self._compute_seconds(phase))
        assert self._tensor is not None
        if phase.kind == "end":
            self._finish_forward(self._tensor)
        elif phase == Phase("attend_grad" if self._cut else "end_grad", 0):
            self.input_grad = self._tensor + 1 if self._stage else None

    def _finish_forward(self, tensor: Tensor) -> None:
        if self._stage < self._stages.num_stages - 1:
            self.output = tensor + 1
            return
        expected = float(self._batch.tokens[0, 0]) + self._stage
        assert bool((tensor == expected).all()), f"the last stage got {tensor.flatten()[0]}, expected {expected}"
        self.loss = StageLoss(tensor.sum(), tensor.sum(), ())

    def _transfer_seconds(self, phase: Phase) -> float:
        costs = self._stages.costs
        whole = costs.input_grad_transfer if phase.kind.endswith("_grad") else costs.forward_transfer
        return whole / (2 * costs.layers * self._halves)

    def _compute_seconds(self, phase: Phase) -> float:
        costs = self._stages.costs
        if phase.kind == "weights":
            links = [link for link in self._put_off if link >= phase.link]
            return sum(self._put_off.pop(link) for link in links)
        if phase.kind == "end":
            return 0.0 if self._cut else costs.forward + costs.forward_transfer
        if phase.kind == "end_grad":
            return 0.0 if self._cut else self._backward_seconds(0, 1.0) + costs.input_grad_transfer
        share = SHARES[phase.kind.removesuffix("_grad")] / costs.layers
        if phase.kind.startswith("experts"):
            share /= self._halves
        return self._backward_seconds(phase.link, share) if phase.kind.endswith("_grad") else costs.forward * share

    def _backward_seconds(self, link: int, share: float) -> float:
        """Input gradient now, its weight gradient put off."""
        costs = self._stages.costs
        self._put_off[link] = self._put_off.get(link, 0.0) + costs.weight_grad * share
        return costs.input_grad * share
