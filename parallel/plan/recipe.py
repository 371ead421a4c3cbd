"""Days, GPU-hours and money of a whole run, with the growing batch at its start and the longer contexts at its end."""

from bisect import bisect
from dataclasses import dataclass, replace

from parallel.pipeline.simulate_phases import simulate_phases
from parallel.plan.cost import price
from parallel.plan.job import Job
from parallel.plan.memory import of_job
from parallel.plan.step import Plan, seconds

RAMP_TOKENS = 469e9  # report section 4.2: 3,072 to 15,360 sequences in the first 469B tokens, steps not published
RAMP_FROM = 3072
RAMP_STEPS = 16  # equal shares of the tokens, the batch growing evenly: our choice
EXTENSIONS = ((32768, 1920, 1000), (131072, 480, 1000))  # sequence length, sequences a step, steps: report section 4.3


@dataclass(frozen=True)
class Hours:
    """GPU-hours of pretraining with its ramp, of the ramp alone, and of each extension phase.

    assumed: what of these the configuration does not have, a line each.
    """

    pretraining: float
    ramp: float
    extensions: tuple[float, ...]
    num_gpus: int
    dollars_per_gpu_hour: float
    assumed: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """All phases."""
        return self.pretraining + sum(self.extensions)

    @property
    def days(self) -> float:
        """On all GPUs at once."""
        return self.total / self.num_gpus / 24

    @property
    def dollars(self) -> float:
        """At the price per hour."""
        return self.total * self.dollars_per_gpu_hour


def step_seconds(job: Job, plan: Plan) -> float:
    """Of a job that differs from a plan's in batch or sequence length alone."""
    schedule = job.schedule()
    costs = price(schedule, plan.stages, job.shape(), job.hardware, job.calibration, bare=job.bare)
    level = job.parallel.overlap if job.parallel.expert > 1 else "off"
    end = plan.split.optimizer + plan.split.exposed_communication
    return simulate_phases(schedule, costs, level=level).makespan + end


def hours(plan: Plan, *, price_per_hour: float | None = None) -> Hours:
    """Of the plan's run. The ramp is that of the report where the run is long enough for it and its batch larger."""
    job = plan.job
    per_hour = job.hardware.dollars_per_gpu_hour if price_per_hour is None else price_per_hour
    gpu_hours = job.num_gpus / 3600
    full = plan.step_seconds / job.tokens_per_step
    growth = job.ramp or (report_ramp(job.global_batch_size) if has_ramp(job) else ())
    if not growth:
        return Hours(job.tokens * full * gpu_hours, 0.0, (), job.num_gpus, per_hour)
    assumed = []
    if not job.ramp:
        assumed.append(
            f"the report's growing batch, {RAMP_FROM:,} to {job.global_batch_size:,} sequences over the first "
            f"{RAMP_TOKENS / 1e9:.0f}B tokens, where the run's is constant"
        )
    ramp = _ramp_seconds(plan, growth) * gpu_hours
    rest = (job.tokens - sum(tokens for _, tokens in growth)) * full * gpu_hours
    extensions = []
    for length, sequences, steps in EXTENSIONS if has_ramp(job) else ():
        longer, fits = cut_to_fit(plan, length, sequences)
        extensions.append(steps * seconds(longer) * gpu_hours)
        assumed.append(
            f"the report's extension to {length // 1024}K, {steps:,} steps of {sequences:,} sequences, each cut over "
            f"{longer.cut} ranks, which the engine cannot do" + ("" if fits else "; no cut of them fits the GPUs")
        )
    return Hours(ramp + rest, ramp, tuple(extensions), job.num_gpus, per_hour, tuple(assumed))


def extension(plan: Plan, length: int, sequences: int) -> Job:
    """The plan's job at a longer context, on the same ranks; see `cut_to_fit`."""
    return cut_to_fit(plan, length, sequences)[0]


def cut_to_fit(plan: Plan, length: int, sequences: int) -> tuple[Job, bool]:
    """The plan's job at a longer context, and whether it fits; if not, with the largest cut that was tried.

    A whole sequence does not fit a GPU, and the report does not say what it did: here every sequence is cut over as few
    ranks as make it fit (and divide over the pipelines). The engine cannot do that yet.
    """
    job, samples = plan.job, plan.job.micro_batch_size * plan.job.parallel.data
    longest = max(1, length // 1024)
    cuts = [n for n in range(1, longest + 1) if length % n == 0 and sequences * n % samples == 0]
    longer = replace(job, sequence_length=length, global_batch_size=sequences, ramp=())
    for cut in cuts or [1]:
        longer = replace(longer, cut=cut)
        memory = of_job(longer, longer.short_schedule(), plan.stages)
        if max(rank.total for rank in memory) <= job.hardware.memory_bytes:
            return longer, True
    return longer, False


def has_ramp(job: Job) -> bool:
    """Whether the report's extensions are counted, and its growing batch where the run's is constant."""
    fits = RAMP_FROM % (job.micro_batch_size * job.parallel.data) == 0
    return job.tokens > 2 * RAMP_TOKENS and job.global_batch_size > RAMP_FROM and fits


def report_ramp(batch: int) -> tuple[tuple[int, float], ...]:
    """The report's growth to `batch` sequences, in equal shares of its tokens."""
    share = RAMP_TOKENS / RAMP_STEPS
    return tuple((round(RAMP_FROM + (batch - RAMP_FROM) * (i + 0.5) / RAMP_STEPS), share) for i in range(RAMP_STEPS))


def _ramp_seconds(plan: Plan, ramp: tuple[tuple[int, float], ...]) -> float:
    """The step is simulated at the first batch, at two micro-batches a rank and at the last; straight between them."""
    job = plan.job
    samples = job.micro_batch_size * job.parallel.data
    first, full = ramp[0][0] // samples * samples, 2 * job.parallel.pipeline * samples
    between = [full] if first < full < job.global_batch_size else []
    batches: list[int] = [first, *between, job.global_batch_size]
    known = [step_seconds(replace(job, global_batch_size=batch), plan) for batch in batches[:-1]]
    times = [*known, plan.step_seconds]
    total = 0.0
    for batch, tokens in ramp:
        at = max(0, min(bisect(batches, batch), len(batches) - 1) - 1)
        share = (batch - batches[at]) / (batches[at + 1] - batches[at])
        took = times[at] + share * (times[at + 1] - times[at])
        total += tokens / (batch * job.sequence_length) * took
    return total
