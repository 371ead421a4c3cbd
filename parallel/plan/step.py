"""A whole step: the pipeline from `cost`, then gradients, update and weights between ranks. No torch."""

from dataclasses import dataclass, replace

from model.counts import Counts, FlopsPerToken, counts, flops_per_token
from parallel.pipeline.actions import Schedule
from parallel.pipeline.simulate_phases import PhaseTimeline, simulate_phases
from parallel.plan.cost import Split, StageCosts, price, split_of
from parallel.plan.job import Job
from parallel.plan.kernels import HBM_SHARE, LINK_SHARE
from parallel.plan.memory import Holding, RankMemory, fullest, held_by, of_job


@dataclass(frozen=True)
class Plan:
    """What a run will be: `split` of its step, memory by pipeline rank, and where it comes from."""

    job: Job
    schedule: Schedule
    stages: tuple[range, ...]
    costs: StageCosts
    timeline: PhaseTimeline
    split: Split
    memory: tuple[RankMemory, ...]

    @property
    def step_seconds(self) -> float:
        """Of the constant batch."""
        return self.split.step

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """In the constant batch."""
        return self.job.tokens_per_step / self.step_seconds / self.job.num_gpus

    @property
    def parameters(self) -> Counts:
        """Of the model."""
        return counts(self.job.model)

    @property
    def flops_per_token(self) -> FlopsPerToken:
        """MTP not counted, as in arXiv 2505.09343, table 4."""
        return flops_per_token(self.job.model, self.job.sequence_length, mtp=False)

    @property
    def mfu_causal(self) -> float:
        """Of the BF16 peak, attention over the positions that a token sees."""
        return self.flops_per_token.causal * self.tokens_per_second_per_gpu / self.job.hardware.bf16_flops

    @property
    def mfu_full(self) -> float:
        """Of the BF16 peak, attention over the whole sequence."""
        return self.flops_per_token.full * self.tokens_per_second_per_gpu / self.job.hardware.bf16_flops

    @property
    def fullest_rank(self) -> int:
        """Pipeline rank with most memory."""
        return fullest(self.memory)

    @property
    def fits(self) -> bool:
        """Whether every rank's memory fits the GPU."""
        return self.memory[self.fullest_rank].total <= self.job.hardware.memory_bytes


def plan(job: Job) -> Plan:
    """Plan a run that the launcher's checks have passed."""
    found = _timed(job)
    return replace(found, memory=of_job(job, found.schedule, found.stages))


def _timed(job: Job) -> Plan:
    """A plan without its memory."""
    schedule = job.schedule()
    stages, shape = job.stages(schedule), job.shape()
    level = job.parallel.overlap if job.parallel.expert > 1 else "off"
    costs = price(schedule, stages, shape, job.hardware, job.calibration, bare=job.bare)
    timeline = simulate_phases(schedule, costs, level=level)
    held = held_by(job, schedule, stages)
    ends = [end_of_step(job, rank) for rank in held]
    split = replace(
        split_of(timeline),
        optimizer=max(end.update for end in ends),
        exposed_communication=max(end.communication for end in ends),
    )
    return Plan(job, schedule, stages, costs, timeline, split, ())


def fits(job: Job) -> bool:
    """Whether every rank's memory fits the GPU."""
    schedule = job.short_schedule()
    return max(rank.total for rank in of_job(job, schedule, job.stages(schedule))) <= job.hardware.memory_bytes


def seconds(job: Job) -> float:
    """Of a step. Of many micro-batches two smaller numbers are simulated and drawn out straight.

    A schedule in its steady state follows that.
    """
    ranks, number = job.parallel.pipeline, job.num_microbatches
    low, high = 2 * ranks, 2 * ranks + 4
    samples = job.micro_batch_size * job.parallel.data
    if not job.settles or number <= high or samples * low % job.cut or samples * high % job.cut:
        return _timed(job).step_seconds
    short, longer = (_timed(replace(job, global_batch_size=samples * n // job.cut)).step_seconds for n in (low, high))
    return longer + (number - high) * (longer - short) / (high - low)


def estimate(job: Job) -> tuple[float, bool]:
    """`seconds` of a step, and whether it `fits`."""
    return seconds(job), fits(job)


@dataclass(frozen=True)
class EndOfStep:
    """Seconds after the pipeline: update of the shards in memory, and what crosses ranks for it."""

    update: float
    communication: float


def end_of_step(job: Job, held: tuple[Holding, ...]) -> EndOfStep:
    """Reduce-scatter of FP32 gradients, AdamW on the shard, all-gather of weights; nothing of it hidden.

    Weights that are held in FP8 alone are gathered in one byte, their masters read twice more to round them, and their
    bytes transposed. With masters in host memory reduced gradients cross PCIe, and weights back, twice in FP32 where
    they are rounded on the GPU; the update is taken to run at PCIe's rate too, near which a GPU's share of its
    machine's memory lies. For an average of the weights the masters are copied there; the averaging is beside the next
    step.

    A group of more ranks than a node is taken to use all adapters of its nodes (rings through every adapter), so that
    NVLink bounds it; the experts' groups have one rank on a node, each with one adapter.
    """
    hardware = job.hardware
    wide = 4 if job.precision == "fp32" else 2
    travel = update = 0.0
    for h in held:
        element = 1 if h.alone else wide
        if h.group > 1:
            spread = not h.expert and h.group >= hardware.gpus_per_node
            one_node = job.num_gpus <= hardware.gpus_per_node
            link = hardware.nvlink_bytes_per_second if spread or one_node else hardware.ib_bytes_per_second
            travel += h.parameters * (4 + element) * (1 - 1 / h.group) / (LINK_SHARE * link)
        shard = h.parameters / h.group
        # masters, moments and gradients read, the first two written; gradients cleared, norms read
        moved = shard * (3 * 4 + 4 * job.moments_bytes) + h.parameters * (4 + element) + shard * 4
        host = 0.0
        if job.offload:
            moved = h.parameters * (4 + element) + shard * 4
            host = shard * (3 * 4 + 4 * job.moments_bytes) + shard * (4 + (2 * 4 if h.alone else element))
        if h.alone:
            moved += 2 * 4 * shard + 2 * h.parameters
        if job.ema:
            host += shard * (2 * 4 if job.offload else 4)
        update += moved / (HBM_SHARE * hardware.hbm_bytes_per_second)
        update += host / (LINK_SHARE * hardware.host_bytes_per_second)
    return EndOfStep(update, travel)
