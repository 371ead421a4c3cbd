"""What a step takes beside its chunks: a step in two halves is a step, and a hollow pipeline leaves nothing behind."""

import pytest
import torch

from launcher.bench.step import build_for_bench
from launcher.config import RunConfig
from launcher.plan.measured.rest import frame_cpu, step_in_two
from launcher.runtime import process_group
from launcher.step import train_step
from tests.distributed import run_distributed
from tests.launcher.spine import config


def masters(run_config: RunConfig, whole: bool) -> tuple[list[torch.Tensor], int, list[float]]:
    """This rank's weights after three steps, whole ones or in two, with hollow pipelines between; positive times."""
    with process_group(run_config.train) as process:
        run, times = build_for_bench(run_config, process), []
        for _ in range(3):
            if whole:
                train_step(run)
                continue
            times.append(frame_cpu(run, level=run_config.parallel.overlap))
            taken = step_in_two(run)
            times += [taken.pipeline_cpu, taken.after_seconds]
        return [bucket.master.clone() for bucket in run.zero1.buckets], run.progress.step, times


@pytest.mark.parametrize(("schedule", "overlap"), [("1f1b", "pairs"), ("dualpipe", "all")])
def test_a_step_in_two_is_a_step_and_a_hollow_pipeline_changes_nothing(schedule: str, overlap: str) -> None:
    run_config = config(
        "unused", pipeline=2, expert=2, data=2, schedule=schedule, overlap=overlap, microbatches=4
    )  # fmt: skip
    plain, halved = (run_distributed(4, masters, run_config, whole) for whole in (True, False))
    for (ours, steps, times), (theirs, expected, _) in zip(halved, plain, strict=True):
        assert steps == expected == 3 and len(times) == 9
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(time > 0 for time in times)
        for frame, pipeline, _ in zip(*[iter(times)] * 3, strict=True):
            assert frame < pipeline  # which computes as well
