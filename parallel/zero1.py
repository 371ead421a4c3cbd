"""ZeRO-1: every rank keeps the FP32 masters and moments of one shard of the weights it shares with others.

Parameters that the same ranks hold live in flat buckets. A step reduce-scatters the FP32 gradients of a bucket over
its group (for a DualPipe stage 2 x data ranks, the mirror pair included; for experts fewer), the optimizer updates the
shard, and the new weights are gathered (ZeRO, arXiv 1910.02054, stage 1).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.weight_grad import forget, settle

ALIGN_ELEMENTS = 64  # every shard starts at a multiple of 256 bytes of FP32


@dataclass(frozen=True)
class LocalParameter:
    """A parameter of this rank and its place in the whole model.

    name: global name; shape: global shape; offset: flat element of the global tensor at which this rank's part (an
    expert stack's slice, else all of it) starts. group: ranks that hold the same part. decay: weight decay applies.
    """

    name: str
    weight: nn.Parameter
    shape: tuple[int, ...]
    offset: int
    group: dist.ProcessGroup
    decay: bool


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


class ShardOptimizer(Protocol):
    """What ZeRO asks of an optimizer over shards: `optim.adamw.AdamW` and its kin. steps: updates so far."""

    steps: int

    @property
    def shards(self) -> Sequence[Any]:
        """One for each bucket, in their order; frozen dataclasses with a field `grad`."""
        ...

    def step(self, *, lr: float, grad_scale: float) -> None:
        """Count one step and update every shard, gradients times grad_scale."""
        ...

    def update(self, shard: Any, *, lr: float, grad_scale: float) -> None:
        """Update one shard in the step counted last."""
        ...


class Bucket:
    """Parameters with the same group and decay, flattened; one shard of it is this rank's.

    weights: all of them in the model's dtype, which the modules see; grads: FP32 accumulators (`main_grad`).
    master: this rank's FP32 shard (in FP32 models the weights' own memory); grad: its reduced gradient; step_grad: the
    same beside the master, where the optimizer reads it. host: keep master and step_grad in host memory.
    """

    def __init__(self, parameters: list[LocalParameter], dtype: torch.dtype, *, host: bool = False) -> None:
        self.parameters, self.group, self.decay = parameters, parameters[0].group, parameters[0].decay
        self.size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        device = parameters[0].weight.device
        unit = self.size * ALIGN_ELEMENTS
        total = math.ceil(sum(p.weight.numel() for p in parameters) / unit) * unit
        wide = torch.zeros(total, dtype=torch.float32, device=device)
        self.weights = wide if dtype == torch.float32 else torch.empty(total, dtype=dtype, device=device)
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
        self.master = wide[self.shard] if wide is self.weights else wide[self.shard].clone()
        self.weights.copy_(wide)
        self.lay_weights(self.weights)
        self.grad = self.grads[self.shard] if self.size == 1 else torch.zeros_like(self.master)
        self.step_grad = self.grad
        if host:
            self.master, self.step_grad = in_host_memory(self.master), in_host_memory(self.grad)

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


class Zero1:
    """Gradients and weights of one rank, in buckets of at most about `bucket_bytes` of FP32 gradient.

    dtype: what the modules compute with from here on, whatever the weights were initialised in. offload: masters, and
    with them an optimizer's moments, in host memory.
    """

    def __init__(
        self,
        parameters: Iterable[LocalParameter],
        *,
        dtype: torch.dtype = torch.float32,
        bucket_bytes: int = 1 << 30,
        offload: bool = False,
    ) -> None:
        kinds: dict[tuple[int, bool], list[list[LocalParameter]]] = {}
        for p in parameters:
            open_buckets = kinds.setdefault((id(p.group), p.decay), [[]])
            if open_buckets[-1] and 4 * sum(q.weight.numel() for q in [*open_buckets[-1], p]) > bucket_bytes:
                open_buckets.append([])
            open_buckets[-1].append(p)
        self.buckets = [Bucket(bucket, dtype, host=offload) for lists in kinds.values() for bucket in lists]

    def reduce_gradients(self) -> None:
        """Sum each bucket's gradients over its group into the owners' shards."""
        for bucket in self.buckets:
            bucket.settle_gradients()
        works = [
            dist.reduce_scatter_single(bucket.grad, bucket.grads, group=bucket.group, async_op=True)
            for bucket in self.buckets
            if bucket.size > 1
        ]
        for work in works:
            assert work is not None
            work.wait()

    def update(self, optimizer: ShardOptimizer, *, lr: float, grad_scale: float) -> None:
        """Update the masters from the reduced gradients times grad_scale; `publish_update` follows."""
        for bucket in self.buckets:
            if bucket.step_grad is not bucket.grad:
                bucket.step_grad.copy_(bucket.grad)
        optimizer.step(lr=lr, grad_scale=grad_scale)

    def publish_update(self) -> None:
        """Bring what `update` did to every rank's weights."""
        self.publish_weights()

    def publish_weights(self) -> None:
        """Round the masters to the model's dtype and gather every rank's shard."""
        works = []
        for bucket in self.buckets:
            own = bucket.weights[bucket.shard]
            if own.data_ptr() != bucket.master.data_ptr():
                own.copy_(bucket.master)
            if bucket.size > 1:
                works.append(dist.all_gather_single(bucket.weights, own, group=bucket.group, async_op=True))
        for work in works:
            assert work is not None
            work.wait()

    def zero_gradients(self) -> None:
        """Forget the gradients of the step."""
        for bucket in self.buckets:
            bucket.forget_gradients()
