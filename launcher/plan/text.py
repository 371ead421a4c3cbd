"""A plan for people: a table of at most 80 columns with bars."""

import textwrap

from launcher.plan.units import count, days, dollars, gpu_hours, seconds, size
from parallel.plan.advice import Change, assumptions, bound_by, pair_work
from parallel.plan.recipe import EXTENSIONS, Hours
from parallel.plan.step import Plan

WIDTH, BAR = 80, 30
NAMED = 0.0005  # share of a whole below which a row is left out
TIMES = {
    "1F": "forward alone",
    "1B": "backward alone",
    "1W": "weight gradients alone",
    "1F1B": "forward beside backward",
    "bubble": "idle",
    "optimizer": "update of the shards",
    "exposed_communication": "gradients, weights out",
}
KINDS = {
    "weights": "weights",
    "gradients": "gradients, FP32",
    "masters": "master weights",
    "moments": "AdamW's moments",
    "ema": "average of the weights",
    "activations": "kept for the backward",
    "working": "of the phase computing",
    "all_to_all": "rows to and from experts",
    "p2p": "messages between stages",
    "buffers": "tables, routers, scratch",
    "nccl": "CUDA and NCCL",
    "margin": "margin, fragmentation",
}


def text(found: Plan, cost: Hours, helps: list[Change]) -> str:
    """The whole plan."""
    return "\n".join(
        [*_head(found), "", *_time(found), "", *_memory(found), "", *_cost(found, cost), "", *_advice(found, helps)]
    )


def _head(found: Plan) -> list[str]:
    job, numbers = found.job, found.parameters
    p = job.parallel
    sizes = " ".join(str(len(stage)) for stage in found.stages)
    lines = [
        f"{job.num_gpus:,} {job.hardware.name}: pipeline {p.pipeline} x data {p.data}, experts over {p.expert}, "
        f"{found.schedule.name}, {job.precision}, overlap={p.overlap}, recompute={p.recompute}",
        f"{count(numbers.main)} parameters, {count(numbers.active)} of them active, and {count(numbers.mtp)} of MTP; "
        f"layers by stage {sizes}",
        f"a step: {job.num_microbatches} micro-batches of {job.micro_batch_size} x {job.sequence_length} tokens a "
        "pipeline",
        f"kernels as in: {job.calibration.source}",
        *(f"assumed: {line}" for line in assumptions(job)),
    ]
    return [part for line in lines for part in wrapped(line)]


def _time(found: Plan) -> list[str]:
    step = found.step_seconds
    lines = [
        f"step {seconds(step)}   {found.tokens_per_second_per_gpu:,.0f} tokens/s/GPU   MFU {found.mfu_causal:.1%} "
        f"causal, {found.mfu_full:.1%} full"
    ]
    for key, value in time_rows(found):
        lines.append(f"  {TIMES[key]:<24}{seconds(value, like=step):>12} {value / step:6.1%} {bar(value / step)}")
    return lines


def time_rows(found: Plan) -> list[tuple[str, float]]:
    """Kinds of work with their seconds, the longest first; what takes next to none is left out."""
    rows = sorted(found.split.rows().items(), key=lambda row: -row[1])
    return [(key, value) for key, value in rows if value >= NAMED * found.step_seconds]


def _memory(found: Plan) -> list[str]:
    limit, worst = found.job.hardware.memory_bytes, found.fullest_rank
    verdict = "fits" if found.fits else "DOES NOT FIT"
    memory = found.memory[worst]
    has = f"{memory.total / 2**30:.1f} of {limit / 2**30:.1f} GiB"
    lines = [f"memory of pipeline rank {worst}, the fullest: {has}, {verdict}"]
    for kind, value in memory_rows(found):
        lines.append(f"  {KINDS[kind]:<24}{size(value):>12} {value / limit:6.1%} {bar(value / limit)}")
    totals = [f"{rank.total / 2**30:.1f}" for rank in found.memory]
    lines += wrapped("every pipeline rank, GiB: " + " ".join(totals))
    return lines + [part for line in host_lines(found) for part in wrapped(line)]


def host_lines(found: Plan) -> list[str]:
    """What the rank that keeps most in host memory has there, and its node; none where nothing is."""
    rank = max(range(len(found.memory)), key=lambda rank: found.memory[rank].host.total)
    host = found.memory[rank].host
    if not host.total:
        return []
    kinds = "; ".join(f"{KINDS[kind]} {size(value)}" for kind, value in host.rows().items() if value)
    ranks = min(found.job.num_gpus, found.job.hardware.gpus_per_node)
    return [f"host memory of pipeline rank {rank}: {kinds}; {size(ranks * host.total)} on a node of {ranks} such ranks"]


def memory_rows(found: Plan) -> list[tuple[str, float]]:
    """Kinds of memory of the fullest rank with their bytes, the largest first; what is next to none is left out."""
    memory = found.memory[found.fullest_rank]
    rows = sorted(memory.rows().items(), key=lambda row: -row[1])
    return [(kind, value) for kind, value in rows if value >= NAMED * memory.total]


def cost_line(found: Plan, cost: Hours) -> str:
    """GPU-hours, days and money of the run."""
    line = f"{count(found.job.tokens)} tokens: {gpu_hours(cost.total)} GPU-hours, {days(cost.days)}, "
    line += f"{dollars(cost.dollars)} at ${cost.dollars_per_gpu_hour:g} a GPU-hour"
    if cost.ramp:
        line += f"; of these {gpu_hours(cost.ramp)} while the batch grows"
    if cost.extensions:
        names = " and ".join(f"{length // 1024}K" for length, _, _ in EXTENSIONS)
        line += f" and {gpu_hours(sum(cost.extensions))} at {names}"
    return line


def _cost(found: Plan, cost: Hours) -> list[str]:
    lines = [cost_line(found, cost), *(f"assumed: {line}" for line in cost.assumed)]
    return [part for line in lines for part in wrapped(line)]


def _advice(found: Plan, helps: list[Change]) -> list[str]:
    lines = wrapped(bound_line(found))
    if helps:
        lines.append("what would help most, each change planned by itself:")
    for change in helps:
        lines += wrapped(f"  {change_line(found, change)}")
    return lines


def bound_line(found: Plan) -> str:
    """What the run hangs on, and the pair of chunks that says so."""
    compute, moved = pair_work(found.costs)
    return (
        f"bound by {bound_by(found)}: a forward and a backward of a stage compute for {seconds(compute)} and transfer "
        f"for {seconds(moved)}"
    )


def change_line(found: Plan, change: Change) -> str:
    """A change, the step that it gives, and whether that is what makes the run fit."""
    share = change.saved_seconds / found.step_seconds
    fits = "" if change.fits == found.fits else (", and it fits" if change.fits else ", but it does not fit")
    return f"{change.what}: {seconds(change.step_seconds)}, {abs(share):.1%} {'less' if share >= 0 else 'more'}{fits}"


def bar(share: float) -> str:
    """A bar for a share of one."""
    return "#" * round(min(1.0, share) * BAR)


def wrapped(line: str) -> list[str]:
    """Lines of at most 80 columns; what is indented stays so."""
    indent = " " * (len(line) - len(line.lstrip()))
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent + "  ", break_long_words=False) or [""]
