"""torch's own pipeline engine on slept costs: the peer of `expertpipe bench pipeline`."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleDualPipeV, ScheduleZBVZeroBubble

from parallel.pipeline.phase_costs import PhaseCosts
from parallel.pipeline.slept import SleptDevice

SCHEDULES = {"1f1b": Schedule1F1B, "zbv": ScheduleZBVZeroBubble, "dualpipev": ScheduleDualPipeV}
WIDTH = 4


class _InputGradient(torch.autograd.Function):
    """Identity whose backward is a chunk's I: the gradient leaves when it is computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: SleptDevice, seconds: float) -> Tensor:
        ctx.device, ctx.seconds = device, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.device.compute(ctx.seconds)
        ctx.device.synchronize()
        return grads[0].contiguous(), None, None


class _WeightGradient(torch.autograd.Function):
    """Identity whose backward is a chunk's W. Autograd runs it before the I of the same B, which was made earlier."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, device: SleptDevice, seconds: float) -> Tensor:
        ctx.device, ctx.seconds = device, seconds
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.device.compute(ctx.seconds)
        return grads[0].contiguous(), None, None


class SleptModule(nn.Module):
    """x -> x + weight; sleeps F in forward, I on the gradient's way to x, W on its way to the weight.

    device: of the rank, the same for all of its stages, by the rules that ours keeps to.
    """

    def __init__(self, costs: PhaseCosts, device: SleptDevice) -> None:
        super().__init__()
        assert not costs.num_layers, "torch's engine runs a stage in one piece"
        seconds = (costs.end, costs.end_grad, costs.end_weights)
        self._forward, self._input, self._weight = (float(x) for x in seconds)  # type: ignore[arg-type]
        self.device = device
        self.weight = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """x [1, WIDTH] -> the same shape."""
        self.device.compute(self._forward)
        self.device.synchronize()
        through = _InputGradient.apply(x, self.device, self._input)
        return through + _WeightGradient.apply(self.weight, self.device, self._weight)  # type: ignore[operator]


class TorchEngine:
    """One of torch's schedules over slept stages on all ranks of the default group."""

    def __init__(self, schedule: str, *, num_microbatches: int, costs: PhaseCosts, device: SleptDevice) -> None:
        self._rank, self._num_ranks = dist.get_rank(), dist.get_world_size()
        self._num_microbatches = num_microbatches
        per_rank = 1 if schedule == "1f1b" else 2
        mine = [self._rank, 2 * self._num_ranks - 1 - self._rank][:per_rank]
        self._device = device
        stages = [
            PipelineStage(SleptModule(costs, device), number, per_rank * self._num_ranks, torch.device("cpu"))
            for number in mine
        ]
        self._is_first, self._is_last = 0 in mine, per_rank * self._num_ranks - 1 in mine
        build: Any = SCHEDULES[schedule]
        self._schedule = build(
            stages[0] if per_rank == 1 else stages, num_microbatches, loss_fn=_loss, scale_grads=False
        )

    def step(self) -> None:
        """One training step."""
        rows = torch.zeros(self._num_microbatches, WIDTH, requires_grad=True)
        arguments = (rows,) if self._is_first else ()
        target = torch.zeros(self._num_microbatches, WIDTH) if self._is_last else None
        self._schedule.step(*arguments, target=target, return_outputs=False)
        self._device.synchronize()


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).sum()
