"""What bounds a run, and what would help: every change planned again, none of it from a list of sayings. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from parallel.pipeline.schedules import ScheduleError
from parallel.pipeline.split import SplitError
from parallel.plan.cost import StageCosts
from parallel.plan.job import Job, fp8_problem
from parallel.plan.kernels import Machine
from parallel.plan.layers import layer_bill
from parallel.plan.step import Plan, fits, seconds

# Classes of kernels that somebody could make faster, as users call them.
COMPUTED = {
    "grouped_gemm": "the experts' products", "linear_gemm": "the linears' products", "attention": "attention",
    "quantise": "quantisation", "norm": "the norms", "elementwise": "the elementwise passes",
}  # fmt: skip
FASTER = 0.9  # of its time, for a kernel that was worked on

RECOMPUTE = ("none", "report", "attend", "layer")  # each takes longer than the one before it and holds less


@dataclass(frozen=True)
class Change:
    """One change and what it does: seconds of the step saved, and whether every rank still fits."""

    what: str
    step_seconds: float
    saved_seconds: float
    fits: bool


def bound_by(found: Plan) -> str:
    """memory, bubble, all_to_all or computation: what most of the step's time, or its start, hangs on.

    memory: the fullest rank does not fit. bubble: ranks idle for longer than anything else takes. all_to_all: in the
    pairs, transfers take longer than what is computed beside them.
    """
    if not found.fits:
        return "memory"
    compute, moved = pair_work(found.costs)
    busy = found.split.step - found.split.bubble
    if found.split.bubble > busy:
        return "bubble"
    return "all_to_all" if moved > compute else "computation"


def pair_work(costs: StageCosts) -> tuple[float, float]:
    """Seconds of a forward and a backward on the mean stage: computed, and travelled."""
    compute = moved = 0.0
    for chain in costs.paired:
        for layer in chain.links:
            moved += layer.dispatch + layer.combine + layer.dispatch_grad + layer.combine_grad
            compute += layer.attend + layer.shared + layer.experts
            compute += layer.attend_grad + layer.shared_grad + layer.experts_grad
            compute += layer.attend_weights + layer.shared_weights + layer.experts_weights
        compute += chain.end.forward + chain.end.grad + chain.end.weights
    stages = len(costs.paired)
    return compute / stages, moved / stages


def changes(found: Plan, *, most: int = 3) -> list[Change]:
    """The changes that save most time; where the run does not fit, those that make it fit come first."""
    tried = []
    for what, job in candidates(found.job, fits=found.fits):
        try:
            does = fits(job)
            if found.fits and not does:
                continue
            per_token = seconds(job) / job.tokens_per_step * found.job.tokens_per_step
        except (ScheduleError, SplitError):
            continue
        tried.append(Change(what, per_token, found.step_seconds - per_token, does))
    useful = [c for c in tried if c.saved_seconds > 0.002 * found.step_seconds or (c.fits and not found.fits)]
    return sorted(useful, key=lambda c: (-c.fits, -c.saved_seconds))[:most]


def assumptions(job: Job) -> list[str]:
    """What the price of a step takes for granted of the run, a line each; empty where it takes it as it is."""
    if job.precision != "fp8" or not job.emulates:
        return []
    said = f"fp8.backend={job.fp8.backend} is an emulation, priced as if its products ran in FP8 on tensor cores"
    problem = fp8_problem(job.model)
    if problem:
        return [f"{said}, which they cannot: {problem}"]
    return [f"{said}, for which set {' '.join(job.in_fp8().fp8_words(job))}"]


def candidates(job: Job, *, fits: bool) -> Iterator[tuple[str, Job]]:
    """Single changes of the configuration, the batch or the cluster; fits: whether the job does as it is."""
    parallel = job.parallel
    if job.precision != "fp8" and fp8_problem(job.model) is None:
        narrow = job.in_fp8()
        yield " ".join(["train.precision=fp8", *narrow.fp8_words(job)]), narrow
    if parallel.expert > 1:
        if parallel.dispatcher == "flat":
            yield "parallel.dispatcher=collective", job.with_parallel(dispatcher="collective")
        wires = {"dispatch_wire": "fp8", "dispatch_grad_wire": "fp8"}
        wires = {key: wire for key, wire in wires.items() if getattr(parallel, key) != wire}
        if wires and parallel.dispatcher == "flat":  # which has its own wires alone
            wires["dispatcher"] = "collective"
        if wires:
            yield " ".join(f"parallel.{key}={word}" for key, word in wires.items()), job.with_parallel(**wires)
        if parallel.overlap != "all":
            yield "parallel.overlap=all", job.with_parallel(overlap="all")
    if not fits and not job.offload:
        yield job.to_offload, replace(job, offload=True)
    here = RECOMPUTE.index(parallel.recompute)
    for level in RECOMPUTE[here + 1 :] if not fits else RECOMPUTE[:here]:  # less is faster, more is smaller
        yield f"parallel.recompute={level}", job.with_parallel(recompute=level)
    for name in ("1f1b", "zbv", "dualpipev", "dualpipe") if parallel.expert > 1 else ("1f1b", "zbv"):
        if name != parallel.schedule and parallel.pipeline > 1:
            other = job.with_parallel(schedule=name, layers_per_stage=None, stages_per_rank=None)
            yield " ".join([f"parallel.schedule={name}", *other.split_words(job)]), other
    for size in (2 * job.micro_batch_size, job.micro_batch_size // 2):
        if size and job.global_batch_size % (size * parallel.data) == 0:
            yield f"train.micro_batch_size={size}", replace(job, micro_batch_size=size)
    if parallel.pipeline > 1:
        doubled = 2 * job.global_batch_size
        yield f"train.global_batch_size={doubled}", replace(job, global_batch_size=doubled)
    if parallel.expert > job.hardware.gpus_per_node:
        faster = replace(job.hardware, ib_bytes_per_second=2 * job.hardware.ib_bytes_per_second)
        yield "twice the InfiniBand bandwidth", replace(job, hardware=faster)
    shape = job.shape()
    machine = Machine.beside_all_to_all(job.hardware, job.calibration, expert=shape.expert, fp32=shape.element == 4)
    bill = layer_bill(shape, machine, moe=True)
    largest = max(COMPUTED, key=bill.kind)
    factors = {**job.calibration.factors, largest: FASTER * job.calibration.factor(largest)}
    text = f"{1 - FASTER:.0%} off the time of {COMPUTED[largest]}"
    yield text, replace(job, calibration=replace(job.calibration, factors=factors))
