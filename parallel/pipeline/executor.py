"""The one executor of every schedule: interprets a rank's work, phase by phase, over its chunks."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.transformer import Microbatch, StageLoss
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Action, Message, Schedule
from parallel.pipeline.check import check
from parallel.pipeline.chunk import Chunk, Stages
from parallel.pipeline.overlap import Work, completes, halves_of, plan
from parallel.pipeline.p2p import Mailbox, incoming_messages

OnAction = Callable[[Action], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Actions that ran as one, and when: seconds since the step began."""

    actions: tuple[Action, ...]
    start: float
    end: float


class Executor:
    """Runs training steps of one rank.

    overlap: see `parallel.pipeline.overlap.plan`. on_action: told each action before it starts. Peak of live stage
    activations is held to the schedule's own at run time. `measured`: the last step's work in time, from `began` on the
    machine's monotonic clock.
    """

    def __init__(
        self,
        schedule: Schedule,
        mesh: Mesh,
        groups: Groups,
        stages: Stages,
        *,
        dtype: torch.dtype,
        device: torch.device,
        overlap: str = "off",
        on_action: OnAction = lambda action: None,
    ) -> None:
        self.schedule, self.mesh, self.groups, self.stages = schedule, mesh, groups, stages
        self.dtype, self.device, self.on_action = dtype, device, on_action
        self.peak_allowed = check(schedule).live_activations[mesh.pipeline_rank]
        self.peak_live = 0
        self.work = plan(schedule, mesh.pipeline_rank, num_links=stages.num_links, level=overlap)
        self.halves = halves_of(schedule, overlap)
        self.incoming = incoming_messages(schedule, mesh.pipeline_rank)
        self.measured: list[Measured] = []
        self.began = 0.0

    def step(self, batch: Callable[[int], Microbatch]) -> dict[int, StageLoss]:
        """One step over all micro-batches; gradients are left in `main_grad`.

        batch: micro-batch by its number, on any rank of its pipeline. Gives the losses of those micro-batches whose
        last stage is here, by number, so nobody has to know in which order they came.
        """
        run = _Step(self, batch)
        self.measured = []
        began = self.began = time.perf_counter()
        for work in self.work:
            start = time.perf_counter()
            run.do(work)
            self.measured.append(Measured(work.actions, start - began, time.perf_counter() - began))
        run.mailbox.finish()
        assert not run.chunks, "the schedule left work behind"
        return run.losses


class _Step:
    """State of one training step on one rank."""

    def __init__(self, executor: Executor, batch: Callable[[int], Microbatch]) -> None:
        self.executor, self.batch = executor, batch
        self.losses: dict[int, StageLoss] = {}
        self.batches: dict[int, Microbatch] = {}
        # by stage and micro-batch, from F to the end of B or W
        self.chunks: dict[tuple[int, int], Chunk] = {}

        def shape(message: Message) -> tuple[int, ...]:
            tokens = self.microbatch(message.microbatch).tokens
            return (tokens.shape[0], tokens.shape[1] - 1, executor.stages.hidden_size)

        self.mailbox = Mailbox(
            executor.schedule, executor.mesh, executor.groups,
            incoming=executor.incoming, shape=shape, dtype=executor.dtype, device=executor.device,
        )  # fmt: skip

    def microbatch(self, number: int) -> Microbatch:
        if number not in self.batches:
            self.batches[number] = self.batch(number)
        return self.batches[number]

    def do(self, work: Work) -> None:
        """Run the phases in their order; a chunk takes its input before its first phase and sends after its last."""
        for action in work.actions:
            self.executor.on_action(action)
        begun: set[Action] = set()
        finished: set[Action] = set()
        # Messages of two ranks match by order alone, so those of a pair leave in the order of the schedule's list.
        to_send = deque(action for action in work.actions if action.kind != "W")
        for placed in work.phases:
            if placed.action not in begun:
                begun.add(placed.action)
                self._begin(placed.action)
            self.chunks[_key(placed.action)].run(placed.phase)
            if completes(placed, num_links=self.executor.stages.num_links(placed.action.stage)):
                finished.add(placed.action)
                while to_send and to_send[0] in finished:
                    self._send(to_send.popleft())
        for action in work.actions:
            if action.kind in "BW":
                del self.chunks[_key(action)]

    def _begin(self, action: Action) -> None:
        executor, key = self.executor, _key(action)
        needed = executor.schedule.inputs(action)
        tensor = None if needed is None else self.mailbox.receive(needed)
        if action.kind == "F":
            halves = executor.halves.get(key, 1)
            chunk = self.chunks[key] = executor.stages.new_chunk(
                action.stage, self.microbatch(action.microbatch), halves
            )
            chunk.begin(tensor)
            executor.peak_live = max(executor.peak_live, len(self.chunks))
            assert len(self.chunks) <= executor.peak_allowed, f"{len(self.chunks)} live at {action.describe()}"
        elif action.kind in "BI":
            self.chunks[key].begin_backward(tensor)

    def _send(self, action: Action) -> None:
        chunk, message = self.chunks[_key(action)], self.executor.schedule.output(action)
        if action.kind == "F":
            tensor, chunk.output = chunk.output, None
            if chunk.loss is not None:
                self.losses[action.microbatch] = chunk.loss
        else:
            tensor, chunk.input_grad = chunk.input_grad, None
        if message is not None:
            assert tensor is not None
            self.mailbox.send(message, tensor)


def _key(action: Action) -> tuple[int, int]:
    return action.stage, action.microbatch
