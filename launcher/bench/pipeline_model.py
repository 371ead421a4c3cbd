"""The real tiny model on four processes under every schedule: tokens a second and the largest process's peak memory.

For `expertpipe bench pipeline`. Each schedule gets processes of its own, because a process's peak never falls; rank 0
prints its row.
"""

import json
import resource
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from launcher.bench.step import build_for_bench
from launcher.check.run import checked
from launcher.local import run_local
from launcher.runtime import process_group
from launcher.step import tokens_per_step, train_step
from parallel.pipeline.schedules import SCHEDULES

RANKS = 4


@dataclass(frozen=True)
class ModelRow:
    """One schedule on the tiny model: medians of training steps on random tokens, which have no cost and no ideal.

    layout: pipeline x data ranks, expert parallel inside data. peak_rss_bytes: of the largest process, everything
    included. spread: (longest - shortest) / median.
    """

    engine: str
    schedule: str
    layout: str
    overlap: str
    ranks: int
    microbatches: int
    cost_ms: None
    ideal_ms: None
    measured_ms: float
    ratio: None
    spread: float
    tokens_per_second: float
    peak_rss_bytes: int
    peak_live_activations: int
    repetitions: int


def overrides(schedule: str, overlap: str) -> list[str]:
    """The run: experiment=tiny, two pipeline ranks of two stages at most, two data ranks that share the experts."""
    return ["experiment=tiny", f"parallel.schedule={schedule}", f"parallel.overlap={overlap}", "train.device=cpu"]


def cases() -> list[tuple[str, str]]:
    """Schedule and overlap: each schedule as configured, and DualPipe at every level."""
    return [(name, "pairs") for name in SCHEDULES] + [("dualpipe", "off"), ("dualpipe", "all")]


def measure_as_rank(schedule: str, overlap: str, repetitions: int, *, json_lines: bool) -> int:
    """What each process does."""
    config = checked(overrides(schedule, overlap), with_data=False)
    with process_group(config.train) as process:
        run = build_for_bench(config, process)
        times = []
        for _ in range(repetitions + 1):
            dist.barrier()
            start = time.perf_counter()
            train_step(run)
            times.append(time.perf_counter() - start)
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        largest = torch.tensor([kib, run.executor.peak_live])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        if process.rank == 0:
            median = statistics.median(times[1:])
            p = config.parallel
            row = ModelRow(
                engine="model",
                schedule=schedule,
                layout=f"{p.pipeline}x{p.data}, expert {p.expert}",
                overlap=overlap,
                ranks=p.world_size,
                microbatches=run.executor.schedule.num_microbatches,
                cost_ms=None,
                ideal_ms=None,
                ratio=None,
                measured_ms=1000 * median,
                spread=(max(times[1:]) - min(times[1:])) / median,
                tokens_per_second=tokens_per_step(run) / median,
                peak_rss_bytes=1024 * int(largest[0]),
                peak_live_activations=int(largest[1]),
                repetitions=repetitions,
            )
            print(json.dumps(asdict(row)) if json_lines else line(row), flush=True)
    return 0


def measure(repetitions: int, folder: Path, *, json_lines: bool) -> int:
    """All cases one after the other, each in processes of its own; the exit code, that of the first to fail."""
    if not json_lines:
        print(HEAD, flush=True)
    for schedule, overlap in cases():
        argv = ["bench", "pipeline", "--as-rank", "--model", schedule, overlap, "--repetitions", str(repetitions)]
        code = run_local([*argv, *["--json"] * json_lines], world_size=RANKS, run_dir=folder, threads=1)
        if code:
            print(f"expertpipe: the processes of schedule {schedule} failed, see above", file=sys.stderr)
            return code
    return 0


HEAD = f"{'tiny model':<12}{'overlap':<8}{'layout':<16}{'M':>3}{'ms':>8}{'spread':>8}{'tok/s':>8}{'MiB':>7}{'live':>6}"


def line(row: ModelRow) -> str:
    """At most 80 columns."""
    return (
        f"{row.schedule:<12}{row.overlap:<8}{row.layout:<16}{row.microbatches:>3}{row.measured_ms:>8.0f}"
        f"{row.spread:>8.1%}{row.tokens_per_second:>8.0f}{row.peak_rss_bytes / 2**20:>7.0f}"
        f"{row.peak_live_activations:>6}"
    )
