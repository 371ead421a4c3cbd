"""`expertpipe plan --search`: layouts that fit, the fastest first, and why the others are none."""

import json

from launcher.plan.text import wrapped
from launcher.plan.units import seconds
from parallel.plan.hardware import check_cluster
from parallel.plan.job import Job
from parallel.plan.search import PRECISIONS, Candidate, Found, search

SHOWN = 8


def search_command(job: Job, *, gpus: int | None, precision: str | None, as_json: bool) -> int:
    """Prints what was found; 1 if nothing fits.

    gpus: instead of the run's own number; HardwareError if they are not whole nodes. precision: None to look at FP8 and
    BF16.
    """
    check_cluster(job.hardware, job.num_gpus if gpus is None else gpus)
    found = search(job, precisions=(precision,) if precision else PRECISIONS, gpus=gpus)
    if as_json:
        print(json.dumps(as_tree(found)))
    else:
        print("\n".join(text(found)))
    return int(not found.candidates)


def as_tree(found: Found) -> dict[str, object]:
    """As JSON has it."""
    return {
        "looked_at": found.looked_at,
        "layouts": [_row(candidate) for candidate in found.candidates],
        "rejected": [
            {"reason": kind, "number": number, "example": found.rejections.example[kind]}
            for kind, number in sorted(found.rejections.number.items(), key=lambda item: -item[1])
        ],
        "smallest_gpus": found.smallest_gpus,
    }


def _row(candidate: Candidate) -> dict[str, object]:
    p = candidate.job.parallel
    return {
        "pipeline": p.pipeline, "data": p.data, "expert": p.expert, "schedule": p.schedule, "recompute": p.recompute,
        "precision": candidate.job.precision, "micro_batch_size": candidate.job.micro_batch_size,
        "own": candidate.is_own, "memory_bytes": candidate.memory_bytes,
        "step_seconds": candidate.step_seconds, "weighed_seconds": candidate.weighed,
        "tokens_per_second_per_gpu": candidate.tokens_per_second_per_gpu, "overrides": candidate.words(),
    }  # fmt: skip


def text(found: Found) -> list[str]:
    """At most 80 columns."""
    lines = [f"{found.looked_at} layouts, {len(found.candidates)} fit"]
    if found.candidates:
        lines.append("  PP  data    EP schedule    micro recompute     GiB      step tokens/s/GPU")
    shown = [c for i, c in enumerate(found.candidates) if i < SHOWN or c.is_own]
    for c in shown:
        p = c.job.parallel
        time = "weighed" if c.step_seconds is None else seconds(c.step_seconds)
        lines.append(
            f"{p.pipeline:4}{p.data:6}{p.expert:6} {p.schedule[-11:]:<11}{c.job.micro_batch_size:6} "
            f"{p.recompute:<8}{c.job.precision:<5}{c.memory_bytes / 2**30:6.1f}{time:>10}"
            f"{c.tokens_per_second_per_gpu:12,.0f}{' own' if c.is_own else ''}"
        )
    if found.candidates:
        lines += ["", *wrapped(found.candidates[0].words())]
        if found.candidates[0].given.bare:
            lines.append("and --as-published, whose engine no overrides choose")
    elif found.smallest_gpus:
        lines.append(f"nothing fits; the smallest count of GPUs on which something does is {found.smallest_gpus}")
    else:
        lines.append("nothing fits on any count of GPUs that was tried: shorter sequences, or a GPU with more memory")
    lines.append("")
    for kind, number in sorted(found.rejections.number.items(), key=lambda item: -item[1]):
        lines += wrapped(f"{number} {kind}: {found.rejections.example[kind]}")
    return lines
