"""The one executor of every schedule: interprets a rank's work, phase by phase, over its chunks."""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.transformer import Microbatch, StageLoss
from parallel.mesh import Mesh
from parallel.pipeline.actions import Action, Message, Schedule
from parallel.pipeline.check import check
from parallel.pipeline.chunk import Chunk, Stages
from parallel.pipeline.overlap import Work, completes, halves_of, joins_pairs, plan, sending
from parallel.pipeline.p2p import Lanes, Mailbox, incoming_messages
from parallel.pipeline.phases import Phase

OnAction = Callable[[Action], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """Actions that ran as one, and when: seconds since the step began."""

    actions: tuple[Action, ...]
    start: float
    end: float


Key = tuple[int, int]  # of a chunk: stage, micro-batch


@dataclass(frozen=True, slots=True)
class _Op:
    """A phase with all that the loop must know of it, so that nothing is worked out while the step runs.

    begins: its action, if this is the first phase of that; needed: what the action takes in. leaving: actions whose
    results leave after it, in the order of the schedule's list, and as which message.
    """

    key: Key
    phase: Phase
    begins: Action | None
    needed: Message | None
    leaving: tuple[tuple[Action, Message | None], ...]


@dataclass(frozen=True, slots=True)
class _Task:
    """A work ready to run; ended: chunks of which nothing is left after it."""

    actions: tuple[Action, ...]
    ops: tuple[_Op, ...]
    ended: tuple[Key, ...]


def _prepared(schedule: Schedule, work: Work, num_links: Callable[[int], int]) -> _Task:
    """A chunk takes its input before its first phase and sends when it is complete, in the order of `sending`."""
    ops: list[_Op] = []
    begun: set[Action] = set()
    finished: set[Action] = set()
    to_send = deque(sending(work))
    for placed in work.phases:
        action = placed.action
        begins = None if action in begun else action
        begun.add(action)
        leaving: list[tuple[Action, Message | None]] = []
        if completes(placed, num_links=num_links(action.stage)):
            finished.add(action)
            while to_send and to_send[0] in finished:
                leaving.append((to_send[0], schedule.output(to_send.popleft())))
        needed = None if begins is None else schedule.inputs(begins)
        ops.append(_Op(_key(action), placed.phase, begins, needed, tuple(leaving)))
    return _Task(work.actions, tuple(ops), tuple(_key(action) for action in work.actions if action.kind in "BW"))


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
        groups: Lanes,
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
        work = plan(schedule, mesh.pipeline_rank, num_links=stages.num_links, level=overlap)
        self.tasks = [_prepared(schedule, one, stages.num_links) for one in work]
        self.halves = halves_of(schedule, overlap)
        self.incoming = incoming_messages(schedule, mesh.pipeline_rank, pairs_joined=joins_pairs(overlap))
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
        for task in self.tasks:
            start = time.perf_counter()
            run.do(task)
            self.measured.append(Measured(task.actions, start - began, time.perf_counter() - began))
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
        self.chunks: dict[Key, Chunk] = {}

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

    def do(self, task: _Task) -> None:
        """Run the phases in their order."""
        for action in task.actions:
            self.executor.on_action(action)
        for op in task.ops:
            if op.begins is not None:
                self._begin(op.begins, op.key, op.needed)
            self.chunks[op.key].run(op.phase)
            for action, message in op.leaving:
                self._send(action, message)
            if op.needed is not None:
                self.mailbox.post_ahead()  # now that the device has work and nobody waits for what it did
        for key in task.ended:
            del self.chunks[key]

    def _begin(self, action: Action, key: Key, needed: Message | None) -> None:
        """Whatever need not follow the message is done before it is waited for."""
        executor, forward = self.executor, action.kind == "F"
        if forward:
            halves = executor.halves.get(key, 1)
            self.chunks[key] = executor.stages.new_chunk(action.stage, self.microbatch(action.microbatch), halves)
        chunk = self.chunks[key]
        tensor = None if needed is None else self.mailbox.receive(needed)
        if forward:
            chunk.begin(tensor)
            executor.peak_live = max(executor.peak_live, len(self.chunks))
            assert len(self.chunks) <= executor.peak_allowed, f"{len(self.chunks)} live at {action.describe()}"
        elif action.kind in "BI":
            chunk.begin_backward(tensor)

    def _send(self, action: Action, message: Message | None) -> None:
        chunk = self.chunks[_key(action)]
        if action.kind == "F":
            tensor, chunk.output = chunk.output, None
            if chunk.loss is not None:
                self.losses[action.microbatch] = chunk.loss
        else:
            tensor, chunk.input_grad = chunk.input_grad, None
        if message is not None:
            assert tensor is not None
            self.mailbox.send(message, tensor)


def _key(action: Action) -> Key:
    return action.stage, action.microbatch
