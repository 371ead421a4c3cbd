"""A plan for people: a table of at most 80 columns with bars."""

import textwrap

from parallel.plan.advice import Change, bound_by, pair_work
from parallel.plan.recipe import EXTENSIONS, Hours, has_ramp
from parallel.plan.step import Plan

WIDTH, BAR = 80, 34
_WORDS = {
    "1F": "forward alone",
    "1B": "backward alone",
    "1W": "weight gradients alone",
    "1F1B": "overlapped pairs",
    "bubble": "idle",
    "optimizer": "update of the shards",
    "exposed_communication": "gradients, weights out",
}


def text(found: Plan, cost: Hours, helps: list[Change]) -> str:
    """The whole plan."""
    return "\n".join(
        [*_head(found), "", *_time(found), "", *_memory(found), "", *_cost(found, cost), *_advice(found, helps)]
    )


def _head(found: Plan) -> list[str]:
    job, numbers = found.job, found.parameters
    p = job.parallel
    layout = f"pipeline {p.pipeline} x data {p.data}, expert {p.expert}, {found.schedule.name}, {job.precision}"
    sizes = " ".join(str(len(stage)) for stage in found.stages)
    active, mtp = f"active {numbers.active / 1e9:.1f}B", f"MTP {numbers.mtp / 1e9:.1f}B"
    lines = [
        f"{job.num_gpus} {job.hardware.name}: {layout}",
        f"parameters {numbers.main / 1e9:.1f}B, {active}, {mtp}; layers a stage {sizes}",
        f"{job.num_microbatches} micro-batches of {job.micro_batch_size} x {job.sequence_length} tokens; kernels: "
        f"{job.calibration.source}",
    ]
    return [part for line in lines for part in wrapped(line)]


def _time(found: Plan) -> list[str]:
    step = found.step_seconds
    lines = [
        f"step {step:.3f} s   {found.tokens_per_second_per_gpu:,.0f} tokens/s/GPU   MFU {found.mfu_causal:.1%} causal, "
        f"{found.mfu_full:.1%} full"
    ]
    for key, seconds in sorted(found.split.rows().items(), key=lambda row: -row[1]):
        lines.append(f"  {_WORDS[key]:<23}{seconds:8.3f} s {seconds / step:6.1%} {bar(seconds / step)}")
    return lines


def _memory(found: Plan) -> list[str]:
    limit, worst = found.job.hardware.memory_bytes, found.fullest_rank
    verdict = "fits" if found.fits else "DOES NOT FIT"
    memory = found.memory[worst]
    has = f"{memory.total / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    lines = [f"memory of pipeline rank {worst}, the fullest: {has}, {verdict}"]
    for kind, size in sorted(memory.rows().items(), key=lambda row: -row[1]):
        lines.append(f"  {kind:<23}{size / 2**30:8.2f} GiB {size / limit:5.1%} {bar(size / limit)}")
    totals = [f"{rank.total / 2**30:.0f}" for rank in found.memory]
    lines += wrapped("every rank, GiB: " + " ".join(totals))
    return lines


def _cost(found: Plan, cost: Hours) -> list[str]:
    line = f"{found.job.tokens / 1e12:.3g}T tokens: {cost.total / 1e3:,.0f}K GPU-hours, {cost.days:.1f} days, "
    line += f"${cost.dollars / 1e6:,.2f}M at ${cost.dollars_per_gpu_hour:g}"
    if has_ramp(found.job):
        names = " and ".join(f"{length // 1024}K" for length, _, _ in EXTENSIONS)
        line += f"; of these {cost.ramp / 1e3:,.0f}K while the batch grows"
        line += f" and {sum(cost.extensions) / 1e3:,.0f}K at {names}"
    return wrapped(line)


def _advice(found: Plan, helps: list[Change]) -> list[str]:
    compute, moved = pair_work(found.costs)
    lines = wrapped(
        f"bound by {bound_by(found)}: a pair computes {1e3 * compute:.0f} ms and transfers {1e3 * moved:.0f} ms"
    )
    for change in helps:
        saved = change.saved_seconds / found.step_seconds
        fits = "" if change.fits == found.fits else ("  fits" if change.fits else "  does not fit")
        lines += wrapped(f"  {change.what}: {change.step_seconds:.3f} s, {saved:+.1%}{fits}")
    return lines


def bar(share: float) -> str:
    """A bar for a share of one."""
    return "#" * round(min(1.0, share) * BAR)


def wrapped(line: str) -> list[str]:
    """Lines of at most 80 columns."""
    return textwrap.wrap(line, WIDTH, subsequent_indent="  ") or [""]
