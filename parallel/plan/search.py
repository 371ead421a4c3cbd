"""Legal layouts of a run on its GPUs, ranked by speed under the memory limit; and why the others are none. No torch.

Every layout is first weighed by its slowest rank and the schedule's formula for the bubble; the best of those that fit
are then simulated, and ranked by that.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from parallel.pipeline.actions import Schedule
from parallel.pipeline.schedules import ScheduleError, stages_per_rank_of
from parallel.pipeline.split import SplitError
from parallel.plan.advice import RECOMPUTE
from parallel.plan.cost import Chain, price
from parallel.plan.feasible import problems
from parallel.plan.job import Job, fp8_problem
from parallel.plan.memory import held_by, of_job
from parallel.plan.step import end_of_step, seconds

SCHEDULES = ("1f1b", "zbv", "dualpipev", "dualpipe")
MICRO_BATCHES = (1, 2, 4)
PRECISIONS = ("fp8", "bf16")
SIMULATED = 8
MOST_GPUS = 1 << 15  # where the search for a count that can ends


@dataclass(frozen=True)
class Candidate:
    """A layout that fits. weighed: seconds of a step by formula; step_seconds: simulated, None where not.

    given: the job that was searched for.
    """

    job: Job
    given: Job
    memory_bytes: float
    weighed: float
    step_seconds: float | None = None

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Simulated where it was, else weighed."""
        return self.job.tokens_per_step / (self.step_seconds or self.weighed) / self.job.num_gpus

    def words(self) -> str:
        """The overrides that make it of the job that was given."""
        p = self.job.parallel
        words = (
            f"parallel.pipeline={p.pipeline} parallel.data={p.data} parallel.expert={p.expert} "
            f"parallel.schedule={p.schedule} parallel.recompute={p.recompute} "
            f"train.micro_batch_size={self.job.micro_batch_size} train.precision={self.job.precision}"
        )
        return " ".join([words, *self.job.split_words(self.given), *self.job.fp8_words(self.given)])

    @property
    def is_own(self) -> bool:
        """Whether it is the layout that was given."""
        here, there = ((job.parallel, job.micro_batch_size, job.precision) for job in (self.job, self.given))
        return here == there


@dataclass
class Rejections:
    """How many layouts were looked at and were none, by class of reason, with the first of each in full."""

    looked_at: int = 0
    number: dict[str, int] = field(default_factory=dict)
    example: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, example: str) -> None:
        """Count one."""
        self.number[kind] = self.number.get(kind, 0) + 1
        self.example.setdefault(kind, example)


@dataclass(frozen=True)
class Found:
    """candidates: the fastest first. smallest_gpus: where none fits, the smallest count of GPUs on which one does."""

    candidates: tuple[Candidate, ...]
    rejections: Rejections
    looked_at: int
    smallest_gpus: int | None = None


def search(
    job: Job, *, precisions: Sequence[str] = PRECISIONS, simulated: int = SIMULATED, gpus: int | None = None
) -> Found:
    """Layouts of the job's model, batch and GPUs; its own layout is one of those looked at, and always simulated.

    gpus: instead of the job's own number, whose layout is then none of them. precisions: its own is looked at in its
    own precision if that is one of them.
    """
    rejections = Rejections()
    wanted = job.num_gpus if gpus is None else gpus
    own = list(_own(job, rejections)) if wanted == job.num_gpus and job.precision in precisions else []
    begin = job if wanted == job.num_gpus else on_gpus(job, wanted)
    found = [replace(c, given=job) for c in _fitting(begin, rejections, precisions)]
    others = sorted((c for c in found if all(c.job != o.job for o in own)), key=lambda c: c.weighed)
    rejections.looked_at -= len(found) - len(others)  # the own layout again
    timed = [*own, *(replace(c, step_seconds=seconds(c.job)) for c in others[:simulated])]
    ranked = (*sorted(timed, key=lambda c: c.step_seconds or 0.0), *others[simulated:])
    smallest = None if ranked else _smallest(begin, precisions)
    return Found(ranked, rejections, rejections.looked_at, smallest)


def on_gpus(job: Job, gpus: int) -> Job:
    """The job on another number of GPUs, in a layout from which a search can begin."""
    return job.with_parallel(
        pipeline=1, data=gpus, expert=1, schedule="1f1b", stages_per_rank=None, layers_per_stage=None
    )


def _own(job: Job, rejections: Rejections) -> Iterator[Candidate]:
    """The job's own layout, with its own split and recomputation, if it can be and fits."""
    rejections.looked_at += 1
    layout = job.in_fp8() if job.precision == "fp8" else job
    what = f"its own, {_described(layout)}"
    try:
        reason = _illegal(layout)
        if reason is None:
            schedule = layout.short_schedule()
            most = max(rank.total for rank in of_job(layout, schedule, layout.stages(schedule)))
            if most <= job.hardware.memory_bytes:
                time = seconds(layout)
                yield Candidate(layout, job, most, time, time)
                return
            reason = "memory", f"{most / 2**30:.0f} GiB, {job.hardware.memory_bytes / 2**30:.0f} there"
    except (ScheduleError, SplitError) as error:
        reason = "schedule", str(error)
    rejections.add(reason[0], f"{what}: {reason[1]}")


def _described(layout: Job) -> str:
    p = layout.parallel
    return (
        f"pipeline {p.pipeline}, expert {p.expert}, {p.schedule}, micro-batch {layout.micro_batch_size}, "
        f"{layout.precision}"
    )


def _fitting(job: Job, rejections: Rejections, precisions: Sequence[str]) -> Iterator[Candidate]:
    """Every layout that fits, weighed; the others are counted."""
    for layout in layouts(job, precisions):
        rejections.looked_at += 1
        what = _described(layout)
        reason = _illegal(layout)
        if reason is not None:
            rejections.add(reason[0], f"{what}: {reason[1]}")
            continue
        try:
            yield from _least_recomputed(layout, job, what, rejections)
        except (ScheduleError, SplitError) as error:
            rejections.add("schedule", f"{what}: {error}")


def layouts(job: Job, precisions: Sequence[str]) -> Iterator[Job]:
    """Every combination of axes, schedule, micro-batch and precision, legal or not.

    Recomputation is chosen by what fits.
    """
    gpus = job.num_gpus
    forms = {name: job.in_fp8() if name == "fp8" else replace(job, precision=name) for name in precisions}
    for pipeline in _divisors(gpus):
        if pipeline > 4 * job.model.num_hidden_layers:
            continue
        data = gpus // pipeline
        for expert in _divisors(data):
            for schedule in SCHEDULES if pipeline > 1 else SCHEDULES[:1]:
                for micro in MICRO_BATCHES:
                    changed = replace(
                        job.parallel, pipeline=pipeline, data=data, expert=expert, schedule=schedule,
                        stages_per_rank=None, layers_per_stage=None,
                    )  # fmt: skip
                    for precision in precisions:
                        yield replace(forms[precision], parallel=changed, micro_batch_size=micro)


def _illegal(job: Job) -> tuple[str, str] | None:
    """Class and sentence of the first thing that is wrong without looking at memory."""
    parallel, model = job.parallel, job.model
    stages = parallel.pipeline * stages_per_rank_of(parallel.schedule, parallel.stages_per_rank)
    if stages > model.num_hidden_layers:
        return "more stages than layers", f"{stages} stages for {model.num_hidden_layers} layers"
    if model.n_routed_experts % parallel.expert:
        return "experts do not divide", f"{model.n_routed_experts} experts over {parallel.expert} ranks"
    samples = job.micro_batch_size * parallel.data
    if job.global_batch_size % samples:
        return "batch does not divide", f"{job.global_batch_size} sequences over {samples}"
    if job.precision == "fp8" and (problem := fp8_problem(job.model)):
        return "no FP8 on tensor cores", problem
    size = job.hardware.gpus_per_node
    if parallel.expert > size and parallel.expert % size:
        return "expert group cuts a node", f"{parallel.expert} ranks on nodes of {size}"
    found = problems(job)
    if not found:
        return None
    kind = "one layer does not fit" if any("one layer takes" in text for text in found) else "cluster or gate"
    return kind, found[0]


def _least_recomputed(job: Job, given: Job, what: str, rejections: Rejections) -> Iterator[Candidate]:
    """The job with the least recomputation that fits; given: what was searched for."""
    schedule = job.short_schedule()
    stages = job.stages(schedule)
    limit = job.hardware.memory_bytes
    least = _states_bytes(job, schedule, stages)
    for level in RECOMPUTE if least <= limit else ():
        other = job.with_parallel(recompute=level)
        least = max(rank.total for rank in of_job(other, schedule, stages))
        if least <= limit:
            yield Candidate(other, given, least, weigh(other, schedule, stages))
            return
    rejections.add(
        "memory", f"{what}: {least / 2**30:.0f} GiB or more with everything recomputed, {limit / 2**30:.0f} there"
    )


def _states_bytes(job: Job, schedule: Schedule, stages: tuple[range, ...]) -> float:
    """Weights, gradients, masters and moments of the fullest rank, which whatever it computes comes on top of."""
    shard = 0 if job.offload else (0 if job.precision == "fp32" else 4) + 2 * job.moments_bytes
    held = held_by(job, schedule, stages)
    weight = {True: 1, False: 4 if job.precision == "fp32" else 2}  # by whether it is in FP8 alone
    return max(sum(h.parameters * (weight[h.alone] + 4 + shard / h.group) for h in rank) for rank in held)


def weigh(job: Job, schedule: Schedule, stages: tuple[range, ...]) -> float:
    """Seconds of a step by formula: the slowest rank's work, the bubble of the mean stage, and what follows."""
    costs = price(schedule, stages, job.shape(), job.hardware, job.calibration, bare=job.bare)
    pairs = job.parallel.schedule in ("dualpipe", "dualpipev") and job.parallel.overlap != "off"
    works = [_work(chain) for chain in (costs.paired if pairs else costs.alone)]
    each = [max(compute, moved) if pairs else compute + moved for compute, moved, _ in works]
    copies = len(schedule.placement)
    ranks = [sum(each[stage] for stage in schedule.stages_of(rank)) / copies for rank in range(schedule.num_ranks)]
    mean = sum(ranks) / len(ranks)
    weights = sum(weight for _, _, weight in works) / len(ranks)
    last = job.parallel.pipeline - 1
    idle = {
        "1f1b": last * mean,
        "zbv": last * max(0.0, mean / 3 - weights) / 2,
        "dualpipev": last * (5 / 3 * mean - 3 * weights) / 2,
        "dualpipe": (last - 1) / 2 * (5 / 3 * mean - 3 * weights),
    }[job.parallel.schedule]
    ends = [end_of_step(job, held) for held in held_by(job, schedule, stages)]
    after = max(end.update + end.communication for end in ends)
    return job.num_microbatches * max(ranks) + max(0.0, idle) + after


def _work(chain: Chain) -> tuple[float, float, float]:
    """Computation, transfers and weight gradients of a stage's chunk, forward and backward."""
    moved = sum(x.dispatch + x.combine + x.dispatch_grad + x.combine_grad for x in chain.links)
    weights = chain.end.weights + sum(x.attend_weights + x.shared_weights + x.experts_weights for x in chain.links)
    forward = sum(x.attend + x.shared + x.experts for x in chain.links)
    back = sum(x.attend_grad + x.shared_grad + x.experts_grad for x in chain.links)
    return forward + back + weights + chain.end.forward + chain.end.grad, moved, weights


def _smallest(job: Job, precisions: Sequence[str]) -> int | None:
    """GPUs in whole nodes on which some layout fits: by doublings, then the least between the last two.

    The batch grows where it has to. A smaller count than the job's own is not looked at.
    """

    def fits(gpus: int) -> bool:
        larger = replace(on_gpus(job, gpus), global_batch_size=max(job.global_batch_size, gpus))
        return next(_fitting(larger, Rejections(), precisions), None) is not None

    node = job.hardware.gpus_per_node
    low = job.num_gpus
    high = node
    while high <= low:
        high *= 2
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_GPUS:
            return None
    return next((gpus for gpus in range(low // node * node + node, high, node) if fits(gpus)), high)


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
