"""`expertpipe plan --simulate-cluster`: all ranks of a run in this process, before a cluster is asked for."""

import json
import resource
import time

from launcher.plan.text import wrapped
from parallel.plan.cluster import simulate_cluster, summary
from parallel.plan.cluster_faults import faults
from parallel.plan.feasible import memory_problems
from parallel.plan.job import Job
from parallel.plan.step import plan

SOUND = "every send has its receive in order, every collective all its members, nothing waits in a circle, memory fits"


def cluster_command(job: Job, *, as_json: bool) -> int:
    """Prints what was found; 1 if anything is wrong, memory that does not fit among it."""
    start = time.perf_counter()
    cluster = simulate_cluster(job)
    found = faults(cluster)
    seconds = time.perf_counter() - start
    memory = [rank.total for rank in plan(job).memory]
    found += memory_problems(job)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    tree = {
        **summary(cluster), "faults": found, "seconds": seconds, "process_bytes": peak,
        "memory_bytes_per_pipeline_rank": memory,
    }  # fmt: skip
    if as_json:
        print(json.dumps(tree))
        return int(bool(found))
    lines = [
        f"{tree['ranks']} ranks, {tree['groups']} process groups that all create in one order and "
        f"{tree['dispatcher_groups']:,} of the dispatchers' own, {tree['messages']:,} messages, "
        f"{tree['transfers']:,} transfers of experts with {tree['transfer_collectives']:,} collectives, "
        f"{tree['gradient_collectives']:,} collectives of gradients",
        *(found or [SOUND]),
        f"memory by pipeline rank, GiB: {' '.join(f'{size / 2**30:.0f}' for size in memory)} of "
        f"{job.hardware.memory_bytes / 2**30:.0f}",
        f"{seconds:.1f} s, {peak / 2**30:.2f} GiB in this process",
    ]
    print("\n".join(part for line in lines for part in wrapped(line)))
    return int(bool(found))
