"""A bucket of ZeRO-1: parameters that the same ranks hold, flat in memory, one shard of them this rank's."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.fp8.weights import WeightBlocks
from model.weight_grad import forget, settle

ALIGN_ELEMENTS = 64  # every shard starts at a multiple of 256 bytes of FP32


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank and its place in the whole model.

    name: global name; shape: global shape; offset: flat element of the global tensor at which this rank's part (an
    expert stack's slice, else all of it) starts. group: ranks that hold the same part. decay: weight decay applies.
    blocks: in which the modules read it in FP8 and in no other form; None: they read it in the model's dtype.
    """

    name: str
    weight: nn.Parameter
    shape: tuple[int, ...]
    offset: int
    group: dist.ProcessGroup
    decay: bool
    blocks: WeightBlocks | None = None


@dataclass(frozen=True)
class Piece:
    """A stretch of one parameter inside a shard.

    offset: flat element of the global tensor where it starts; start, stop: elements of the shard.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    start: int
    stop: int


class Bucket:
    """Parameters with the same group and decay, flattened; one shard of it is this rank's.

    weights: all of them in the model's dtype, which the modules see (other buckets may have them in another form);
    grads: FP32 accumulators (`main_grad`). master: this rank's FP32 shard (in FP32 models the weights' own memory);
    grad: its reduced gradient; step_grad: the same beside the master, where the optimizer reads it. host: keep master
    and step_grad in host memory.
    """

    def __init__(self, parameters: list[LocalParameter], dtype: torch.dtype, *, host: bool = False) -> None:
        self.parameters, self.group, self.decay = parameters, parameters[0].group, parameters[0].decay
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        device = parameters[0].weight.device
        unit = self.size * ALIGN_ELEMENTS
        total = math.ceil(sum(p.weight.numel() for p in parameters) / unit) * unit
        wide = torch.zeros(total, dtype=torch.float32, device=device)
        self.grads = torch.zeros(total, dtype=torch.float32, device=device)
        self.shard = slice(self.rank * total // self.size, (self.rank + 1) * total // self.size)
        start = 0
        for parameter in parameters:
            weight = parameter.weight
            stop = start + weight.numel()
            wide[start:stop] = weight.detach().flatten()
            weight.main_grad = self.grads[start:stop].view(weight.shape)  # type: ignore[attr-defined]
            start = stop
        # The masters start from the weights as they were given, before rounding.
        self._take(wide, dtype)
        self.grad = self.grads[self.shard] if self.size == 1 else torch.zeros_like(self.master)
        self.step_grad = self.grad
        if host:
            self.master, self.step_grad = in_host_memory(self.master), in_host_memory(self.grad)

    def _take(self, wide: Tensor, dtype: torch.dtype) -> None:
        """Keep the shard of the weights, FP32 with all of them, and let the modules read them in their form."""
        self.weights = wide if dtype == torch.float32 else wide.to(dtype)
        self.master = wide[self.shard] if self.weights is wide else wide[self.shard].clone()
        self.lay_weights(self.weights)

    def find_scales(self) -> dist.Work | None:
        """The first part of giving every rank what became of the masters; what it began has to be waited for."""
        return None

    def round_own(self) -> None:
        """The second: this rank's share, in the form that the modules read."""
        own = self.weights[self.shard]
        if own.data_ptr() != self.master.data_ptr():
            own.copy_(self.master)

    def gather(self) -> dist.Work | None:
        """The last: everyone's share to everyone; what it began has to be waited for."""
        if self.size == 1:
            return None
        return dist.all_gather_single(self.weights, self.weights[self.shard], group=self.group, async_op=True)

    def lay_weights(self, weights: Tensor) -> None:
        """Make a flat tensor, of the same values, the memory that the modules' weights lie in."""
        self.weights, start = weights, 0
        for parameter in self.parameters:
            stop = start + parameter.weight.numel()
            parameter.weight.data = weights[start:stop].view(parameter.weight.shape)
            start = stop

    def forget_gradients(self) -> None:
        """The next contribution to each gradient takes the place of what is there."""
        for parameter in self.parameters:
            forget(parameter.weight)

    def settle_gradients(self) -> None:
        """Make `grads` the sum of what came since they were forgotten, also where nothing did."""
        for parameter in self.parameters:
            settle(parameter.weight)

    def pieces(self) -> Iterator[Piece]:
        """What the shard holds, in order; padding left out."""
        start = 0
        for p in self.parameters:
            stop = start + p.weight.numel()
            low, high = max(start, self.shard.start), min(stop, self.shard.stop)
            if low < high:
                yield Piece(p.name, p.shape, p.offset + low - start, low - self.shard.start, high - self.shard.start)
            start = stop


def in_host_memory(tensor: Tensor) -> Tensor:
    """A copy there, pinned where the original is on a GPU."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda).copy_(tensor.detach())
