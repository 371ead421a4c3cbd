"""ZeRO-1: every rank keeps the FP32 masters and moments of one shard of the weights it shares with others.

Parameters that the same ranks hold live in flat buckets. A step reduce-scatters the FP32 gradients of a bucket over
its group (for a DualPipe stage 2 x data ranks, the mirror pair included; for experts fewer), the optimizer updates the
shard, and the new weights are gathered (ZeRO, arXiv 1910.02054, stage 1).
"""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from model.fp8.formats import QuantisedTensor
from model.fp8.watch import TensorStats
from parallel.bucket import Bucket, LocalParameter
from parallel.rounded_bucket import RoundedBucket


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


class Zero1:
    """Gradients and weights of one rank, in buckets of at most about `bucket_bytes` of FP32 gradient.

    dtype: what the modules compute with from here on, whatever the weights were initialised in; those with `blocks` are
    in FP8 and have no wide copy. offload: masters, and with them an optimizer's moments, in host memory.
    """

    def __init__(
        self,
        parameters: Iterable[LocalParameter],
        *,
        dtype: torch.dtype = torch.float32,
        bucket_bytes: int = 1 << 30,
        offload: bool = False,
    ) -> None:
        kinds: dict[tuple[int, bool, bool], list[list[LocalParameter]]] = {}
        for p in parameters:
            open_buckets = kinds.setdefault((id(p.group), p.decay, p.blocks is not None), [[]])
            if open_buckets[-1] and 4 * sum(q.weight.numel() for q in [*open_buckets[-1], p]) > bucket_bytes:
                open_buckets.append([])
            open_buckets[-1].append(p)
        self.buckets = [
            (RoundedBucket if rounded else Bucket)(bucket, dtype, host=offload)
            for (_, _, rounded), lists in kinds.items() for bucket in lists
        ]  # fmt: skip

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
        """Round the masters to what the modules read and gather every rank's shard."""
        _wait(bucket.find_scales() for bucket in self.buckets)
        for bucket in self.buckets:
            bucket.round_own()
        _wait(bucket.gather() for bucket in self.buckets)

    def rounded_weights(self) -> dict[str, QuantisedTensor]:
        """What modules read in FP8, by name; the same memory from one update to the next."""
        rounded = (bucket for bucket in self.buckets if isinstance(bucket, RoundedBucket))
        return {name: tensor for bucket in rounded for name, tensor in bucket.tensors()}

    def weight_stats(self) -> list[TensorStats]:
        """What rounding did to those weights, of whole weights; all ranks of their groups call it together."""
        rounded = (bucket for bucket in self.buckets if isinstance(bucket, RoundedBucket))
        return [stats for bucket in rounded for stats in bucket.stats()]

    def zero_gradients(self) -> None:
        """Forget the gradients of the step."""
        for bucket in self.buckets:
            bucket.forget_gradients()


def _wait(works: Iterable[dist.Work | None]) -> None:
    """Begin them all, then wait."""
    for work in list(works):
        if work is not None:
            work.wait()
