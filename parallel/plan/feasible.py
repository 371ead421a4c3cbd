"""What no plan can be made of: clusters, placements and GPUs that cannot hold the model; each with what would work."""

import math

from model.counts import block_shapes
from parallel.expert.placement import Placement
from parallel.pipeline.schedules import ScheduleError
from parallel.pipeline.split import SplitError
from parallel.plan.advice import candidates
from parallel.plan.hardware import HardwareError, check_cluster, check_precision
from parallel.plan.job import Job
from parallel.plan.memory import layer_kept_bytes, of_job, setting_of


def problems(job: Job) -> list[str]:
    """Every reason why a run cannot be on its cluster whatever its layout in the pipeline, one line each.

    `memory_problems` judges the memory of the whole.
    """
    found = []
    for rule in (_nodes, _precision, _gate, _one_layer):
        try:
            rule(job)
        except ValueError as error:
            found.append(str(error))
    return found


def memory_problems(job: Job) -> list[str]:
    """One line if the fullest rank does not fit, with a single change that would make it."""
    ranks = _peaks(job)
    rank, limit = max(range(len(ranks)), key=ranks.__getitem__), job.hardware.memory_bytes
    if ranks[rank] <= limit:
        return []
    found = (
        f"pipeline rank {rank} would hold {size(ranks[rank])}, {job.hardware.name} has {size(limit)} "
        f"(parallel.schedule={job.parallel.schedule}, parallel.recompute="
        f"{job.parallel.recompute}): "
    )
    for what, other in candidates(job, fits=False):
        if other.hardware is not job.hardware or other.global_batch_size != job.global_batch_size:
            continue
        try:
            most = max(_peaks(other))
        except (ScheduleError, SplitError):
            continue
        if most <= limit:
            return [f"{found}use {what}, which holds {size(most)}"]
    return [f"{found}no single change makes it fit; expertpipe plan --search looks at all layouts"]


def _peaks(job: Job) -> list[float]:
    """Bytes of every pipeline rank; of a step no longer than its memory needs to reach its peak."""
    schedule = job.short_schedule()
    return [rank.total for rank in of_job(job, schedule, job.stages(schedule))]


def _nodes(job: Job) -> None:
    check_cluster(job.hardware, job.num_gpus)


def _precision(job: Job) -> None:
    check_precision(job.hardware, job.precision)


def _gate(job: Job) -> None:
    """The gate's groups lie within nodes, so that a token reaches as many as it may."""
    model, parallel = job.model, job.parallel
    per_node = min(parallel.expert, parallel.ranks_per_node or job.hardware.gpus_per_node)
    placement = Placement(model.n_routed_experts, parallel.expert, per_node)
    if model.topk_group < model.n_group and placement.num_nodes > 1:
        try:
            placement.require_node_limit(n_group=model.n_group, topk_group=model.topk_group)
        except ValueError as error:
            fits = [
                n * per_node
                for n in range(1, model.n_group + 1)
                if model.n_group % n == 0 and model.n_routed_experts % (n * per_node) == 0
                and parallel.data % (n * per_node) == 0
            ]  # fmt: skip
            nearest = min(fits, key=lambda n: abs(n - parallel.expert), default=per_node)
            raise HardwareError(
                f"parallel.expert={parallel.expert}: {error}; or use parallel.expert={nearest}"
            ) from error


def _one_layer(job: Job) -> None:
    """One layer's weights, gradients and activations of one micro-batch fit a GPU."""
    needed = one_layer_bytes(job, job.parallel.expert)
    memory = job.hardware.memory_bytes
    if needed <= memory:
        return
    sizes = [n for n in range(1, job.parallel.data + 1) if job.parallel.data % n == 0]
    fits = [n for n in sizes if job.model.n_routed_experts % n == 0 and one_layer_bytes(job, n) <= memory]
    advice = f"parallel.expert={min(fits)}" if fits else f"a GPU with {size(needed)}, or shorter micro-batches"
    raise HardwareError(
        f"one layer takes {size(needed)} with parallel.expert={job.parallel.expert}, {job.hardware.name} has "
        f"{size(memory)}: use {advice}"
    )


def size(num_bytes: float) -> str:
    """In GiB, or MiB where that says more."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 1e8 else f"{num_bytes / 2**20:.1f} MiB"


def one_layer_bytes(job: Job, expert: int) -> float:
    """Weights and FP32 gradients of the largest layer on a rank, and what one micro-batch keeps there."""
    element = 4 if job.precision == "fp32" else 2
    moe = job.model.num_moe_layers > 0
    parameters = sum(
        math.prod(shape) / (expert if ".experts." in name else 1) for name, shape in block_shapes(job.model, moe=moe)
    )
    other = job.with_parallel(expert=expert)
    setting = setting_of(other.shape(), other.parallel, precision=job.precision, fp8=job.fp8)
    return parameters * (element + 4) + layer_kept_bytes(setting, moe=moe)
