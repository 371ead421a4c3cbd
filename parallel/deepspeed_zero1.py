"""ZeRO-1 by DeepSpeed's own stage-1 optimizer, behind the interface of `zero1.Zero1` (`optim.zero1=deepspeed`).

One `DeepSpeedZeroOptimizer` a bucket, over the bucket's group: dense weights over mirror and data ranks, experts over
fewer. To it a bucket is a single flat parameter, so its partitions are the shards of our own ZeRO-1, a checkpoint is
the same, and every layout reads it. DeepSpeed's are the partition, the reduction (to each owner, FP32, summed and not
averaged), the FP32 masters, the order of the step, the copy to the model's dtype and the all-gather. Ours are what it
cannot know of: the accumulators (`main_grad`), the norm over all groups and its clip, and AdamW on a partition, with
moments of either width.

The class is a private part of DeepSpeed, which its engine builds; what it takes is compared before it is called.
"""

import inspect
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.bucket import Bucket, LocalParameter
from parallel.zero1 import ShardOptimizer, Zero1

TESTED_FROM, TESTED_UNTIL = "0.19.8", "0.20"


class MissingDeepSpeed(ValueError):
    """DeepSpeed is asked for and not there, or is not one that this works with."""

    user_error = True


class _Partition(torch.optim.Optimizer):
    """The optimizer that DeepSpeed is given: hands the gradient of its one partition to whoever steps."""

    def __init__(self, weights: nn.Parameter) -> None:
        super().__init__([weights], {})
        self.apply: Callable[[Tensor], None] | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update the partition that DeepSpeed has put in the place of the weights."""
        (partition,) = self.param_groups[0]["params"]
        assert self.apply is not None and partition.grad is not None
        self.apply(partition.grad)


class _Engine:
    """DeepSpeed's optimizer for one bucket. After it is made, weights and master of the bucket are its memory."""

    def __init__(self, bucket: Bucket, backend: Any, *, offload: bool) -> None:
        self.bucket = bucket
        # Not the modules' own parameters: its hooks on them would look for gradients where we keep none.
        self.flat = nn.Parameter(bucket.weights)
        self.partition = _Partition(self.flat)
        self.theirs = backend.make(self.partition, self.flat, bucket.group, offload=offload)
        master = self.theirs.single_partition_of_fp32_groups[0].detach()
        assert master.shape == bucket.master.shape, "DeepSpeed cuts a bucket into other partitions than ours"
        master.copy_(bucket.master)  # it has rounded them with the weights
        bucket.lay_weights(self.flat.detach())
        bucket.master = master
        bucket.grad = bucket.step_grad = torch.empty(0)  # its own, of each step
        self.offload = offload

    def reduce(self) -> None:
        """Sum the bucket's gradients over its group; the partition's sum becomes bucket.grad."""
        self.bucket.settle_gradients()
        grads = self.bucket.grads.view_as(self.flat)
        setattr(self.flat, "grad_accum" if self.theirs.use_grad_accum_attribute else "grad", grads)
        self.theirs.reduce_gradients(pipeline_parallel=True)
        if self.offload:
            self.bucket.grad = self.theirs.single_partition_of_fp32_groups[0].grad
            return
        (self.bucket.grad,) = self.theirs.averaged_gradients[0]
        self.bucket.grad = self.bucket.grad.flatten()
        assert self.bucket.grad.shape == self.bucket.master.shape

    def step(self, apply: Callable[[Tensor], None]) -> None:
        """Update the partition by `apply`, which is given its gradient, and gather the weights."""
        self.partition.apply = apply
        self.theirs.step()

    def forget(self) -> None:
        """Drop reduced gradients, used or not: DeepSpeed would add the next ones to them."""
        self.flat.grad = self.flat.grad_accum = None  # type: ignore[attr-defined]
        self.theirs.averaged_gradients[0] = self.theirs.all_grad_tensors[0] = None


class _Backend:
    """The package: imported, of a known version, with the communication that torch has already opened."""

    def __init__(self, device: torch.device) -> None:
        require_version()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        import deepspeed  # type: ignore[import-not-found]
        from deepspeed import comm  # type: ignore[import-not-found]
        from deepspeed.accelerator import get_accelerator  # type: ignore[import-not-found]
        from deepspeed.runtime.zero import offload_config, stage_1_and_2  # type: ignore[import-not-found]
        from deepspeed.utils.timer import NoopTimer  # type: ignore[import-not-found]

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its import sets it
        # the name that it gathers by, which torch 2.13 still has
        warnings.filterwarnings("ignore", r"`torch\.distributed\.all_gather_into_tensor`", FutureWarning)
        name = get_accelerator().device_name()
        if name != device.type:
            raise MissingDeepSpeed(
                f"optim.zero1=deepspeed: DeepSpeed has chosen the accelerator {name}, the run is on {device.type}: "
                f"set DS_ACCELERATOR={device.type} in the environment"
            )
        if not comm.is_initialized():
            # An operation for inference over shared memory, which it compiles for a minute on a CPU at this point, and
            # waits for without end where another build was killed. Nothing here calls it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            comm.init_distributed(dist_backend=dist.get_backend(), verbose=False)
        self._kind, self._timer, self._offload = stage_1_and_2.DeepSpeedZeroOptimizer, NoopTimer, offload_config
        self._pin_memory = device.type == "cuda"

    def make(self, partition: _Partition, flat: nn.Parameter, group: dist.ProcessGroup, *, offload: bool) -> Any:
        """Stage 1 over `group` for one flat parameter: sums in FP32, no clip, no loss scale, nothing overlapped."""
        options: dict[str, Any] = {
            "param_names": {flat: "bucket"},
            "timers": self._timer(),
            "optimizer_params": {},
            "dp_process_group": group,
            "partition_grads": False,  # stage 1
            "communication_data_type": torch.float32,
            "gradient_accumulation_dtype": torch.float32,
            "gradient_average": False,
            # Reduced where they lie, one slice to each owner: a bucket is larger than this, so no buffer is filled.
            "contiguous_gradients": True,
            "reduce_bucket_size": 1,
            "use_multi_rank_bucket_allreduce": False,
            "check_grad_overflow": False,
            "compute_grad_norm": offload,  # the norm over all groups is ours; offloading insists on its own beside it
            "verbose": False,
        }
        if offload:
            options["offload_optimizer_config"] = self._offload.DeepSpeedZeroOffloadOptimizerConfig(
                device="cpu", pin_memory=self._pin_memory
            )
        unknown = set(options) - set(inspect.signature(self._kind.__init__).parameters)
        if unknown:
            raise MissingDeepSpeed(
                f"optim.zero1=deepspeed: DeepSpeed {version('deepspeed')} does not know {', '.join(sorted(unknown))} "
                f"(tested from {TESTED_FROM}, below {TESTED_UNTIL}): use optim.zero1=plain"
            )
        return self._kind(partition, **options)


class DeepSpeedZero1(Zero1):
    """As `Zero1`. Gradients of a bucket are changed by its reduction, as DeepSpeed reduces where they lie."""

    def __init__(
        self,
        parameters: Iterable[LocalParameter],
        *,
        dtype: torch.dtype = torch.float32,
        bucket_bytes: int = 1 << 30,
        offload: bool = False,
    ) -> None:
        super().__init__(parameters, dtype=dtype, bucket_bytes=bucket_bytes)
        backend = _Backend(self.buckets[0].weights.device)
        self._engines = [_Engine(bucket, backend, offload=offload) for bucket in self.buckets]

    def reduce_gradients(self) -> None:
        """Sum each bucket's gradients over its group into the owners' partitions."""
        for engine in self._engines:
            engine.reduce()

    def update(self, optimizer: ShardOptimizer, *, lr: float, grad_scale: float) -> None:
        """DeepSpeed's step for every bucket, `optimizer` updating the partition; the weights are gathered too."""
        optimizer.steps += 1
        for engine, shard in zip(self._engines, optimizer.shards, strict=True):

            def apply(grad: Tensor, shard: Any = shard) -> None:
                optimizer.update(replace(shard, grad=grad), lr=lr, grad_scale=grad_scale)

            engine.step(apply)

    def publish_update(self) -> None:
        """Nothing: DeepSpeed's step has."""

    def publish_weights(self) -> None:
        """Round the masters to the model's dtype and gather every rank's shard."""
        for engine in self._engines:
            engine.theirs.update_lp_params()

    def zero_gradients(self) -> None:
        """Forget the gradients of the step, accumulated and reduced."""
        super().zero_gradients()
        for engine in self._engines:
            engine.forget()


def require_version() -> str:
    """Version of DeepSpeed; MissingDeepSpeed unless it is installed and one that this works with."""
    needed = f"{TESTED_FROM} or newer, below {TESTED_UNTIL}"
    try:
        found = version("deepspeed")
    except PackageNotFoundError:
        raise MissingDeepSpeed(
            f"optim.zero1=deepspeed: DeepSpeed is not installed ({needed} is needed): "
            "pip install -e .[deepspeed], or use optim.zero1=plain"
        ) from None
    if not _numbers(TESTED_FROM) <= _numbers(found) < _numbers(TESTED_UNTIL):
        raise MissingDeepSpeed(
            f"optim.zero1=deepspeed: DeepSpeed {found} is installed, {needed} is needed: use optim.zero1=plain"
        )
    return found


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdecimal())
