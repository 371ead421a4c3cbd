"""The one executor of every schedule: interprets a rank's list of actions over its stages."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from model.transformer import Microbatch, StageLoss, Transformer
from model.weight_grad import set_sink
from parallel.mesh import Groups, Mesh
from parallel.pipeline.actions import Action, Message, Schedule, parts
from parallel.pipeline.check import check
from parallel.pipeline.p2p import Mailbox
from parallel.pipeline.weight_grad import DeferredSink

OnAction = Callable[[Action], None]


class Executor:
    """Runs training steps of one rank.

    stages: the stages this rank holds, by number. on_action: told each action before it starts. Peak of live stage
    activations is held to the schedule's own at run time.
    """

    def __init__(
        self,
        schedule: Schedule,
        mesh: Mesh,
        groups: Groups,
        stages: Mapping[int, Transformer],
        *,
        dtype: torch.dtype,
        device: torch.device,
        on_action: OnAction = lambda action: None,
    ) -> None:
        self.schedule, self.mesh, self.groups, self.stages = schedule, mesh, groups, stages
        self.dtype, self.device, self.on_action = dtype, device, on_action
        self.peak_allowed = check(schedule).live_activations[mesh.pipeline_rank]
        self.peak_live = 0
        self.sink = DeferredSink()
        for stage in stages.values():
            set_sink(stage, self.sink)

    def step(self, batch: Callable[[int], Microbatch]) -> dict[int, StageLoss]:
        """One step over all micro-batches; gradients are left in `main_grad`.

        batch: micro-batch by its number, on any rank of its pipeline. Gives the losses of those micro-batches whose
        last stage is here, by number, so nobody has to know in which order they came.
        """
        run = _Step(self, batch)
        for step in self.schedule.ranks[self.mesh.pipeline_rank]:
            for action in parts(step):
                self.on_action(action)
                run.do(action)
        run.mailbox.finish()
        assert not run.graphs and not self.sink.num_waiting, "the schedule left work behind"
        return run.losses


class _Step:
    """State of one training step on one rank."""

    def __init__(self, executor: Executor, batch: Callable[[int], Microbatch]) -> None:
        self.executor, self.batch = executor, batch
        self.losses: dict[int, StageLoss] = {}
        self.batches: dict[int, Microbatch] = {}
        # (stage, micro-batch) -> input and output of the forward whose backward has not run
        self.graphs: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.live = 0
        hidden = next(iter(executor.stages.values())).config.hidden_size

        def shape(message: Message) -> tuple[int, ...]:
            tokens = self.microbatch(message.microbatch).tokens
            return (tokens.shape[0], tokens.shape[1] - 1, hidden)

        self.mailbox = Mailbox(
            executor.schedule, executor.mesh, executor.groups, shape=shape, dtype=executor.dtype, device=executor.device
        )

    def microbatch(self, number: int) -> Microbatch:
        if number not in self.batches:
            self.batches[number] = self.batch(number)
        return self.batches[number]

    def do(self, action: Action) -> None:
        if action.kind == "F":
            self.forward(action)
        elif action.kind == "W":
            self.executor.sink.flush(action.stage, action.microbatch)
            self.live -= 1
        elif action.kind == "I":
            with self.executor.sink.deferring(action.stage, action.microbatch):
                self.backward(action)
        else:
            self.backward(action)
            self.live -= 1

    def forward(self, action: Action) -> None:
        schedule, stage = self.executor.schedule, self.executor.stages[action.stage]
        needed = schedule.inputs(action)
        hidden = None if needed is None else self.mailbox.receive(needed).requires_grad_()
        result = stage(hidden, self.microbatch(action.microbatch))
        if isinstance(result, StageLoss):
            self.losses[action.microbatch] = StageLoss(result.loss.detach(), result.main, result.mtp)
            result = result.loss
        self.graphs[action.stage, action.microbatch] = (hidden, result)
        message = schedule.output(action)
        if message is not None:
            self.mailbox.send(message, result)
        self.live += 1
        self.executor.peak_live = max(self.executor.peak_live, self.live)
        assert self.live <= self.executor.peak_allowed, f"{self.live} live activations at {action.describe()}"

    def backward(self, action: Action) -> None:
        schedule = self.executor.schedule
        hidden, result = self.graphs.pop((action.stage, action.microbatch))
        needed = schedule.inputs(action)
        torch.autograd.backward(result, None if needed is None else self.mailbox.receive(needed))
        message = schedule.output(action)
        if message is not None:
            assert hidden is not None and hidden.grad is not None
            self.mailbox.send(message, hidden.grad)
